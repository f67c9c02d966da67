"""AQT: accuracy against the cost of inference, bits counted, of one family of networks at 16, 8 and 4 bits."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.adapt.aqt import AQT
from trimtab.core.claim import Check, Claim
from trimtab.core.level import parse_level
from trimtab.parts.trained_grid import rounded_rows
from trimtab.quant.rtn import RTN
from trimtab.tasks.digits import digits

WIDTHS = {16: (2, 4, 8), 8: (3, 6, 12), 4: (4, 8, 16)}
RATES = (2e-2, 8e-2)
BATCH, EPOCHS, TRAINED = 50, 12, 1000
OUTER = 8  # bits of the first and the last product where the others have fewer

CLAIM = Claim(
    method="aqt",
    statement="At equal cost of inference, multiplications times their bits, residual networks trained at 4 and 8 bits "
    "are more accurate than those of 16.",
    source="Abdolrashidi et al. 2021, arXiv:2105.03536, abstract, figures 1 and 3, section 4",
    figure="ImageNet: the curve of bf16 is below those of 8 and 4 bits, mostly 4 bits the best; ResNet-50 77.09 % at 4",
    setting="Residual networks of two blocks and widths of 2 to 16 channels on 1,000 handwritten digits, 12 passes of "
    "AdamW, the better of two rates by 197 digits more; convolutions are products of patches, weights a scale a row, "
    "inputs a scale a patch, the first and the last product at 8 bits. A multiplication costs the bits of its inputs; "
    "16 bits are computed in fp32. Curves are joined by lines over the logarithm of the cost.",
    metric="accuracy on 600 other digits. gain4, gain8: the curve above that of 16 bits, the mean over the costs of "
    "either's networks; over8: that of 4 bits above that of 8; qat4, rounded4: trained at 4 bits, and trained at 16 "
    "and rounded, the mean over three widths; gap: accuracy on the 1,000 digits less that on the others, at equal "
    "width; train4: processor time of a step at 4 bits over one at 16",
    checks=(
        Check("4 bits are above 16 bits at equal cost", "gain4", ">", 0.0),
        Check("8 bits are above 16 bits at equal cost", "gain8", ">", 0.0),
        Check("4 bits are not below 8 bits at equal cost", "over8", ">=", 0.0),
        Check("networks trained at 4 bits are above those rounded to 4 bits after training", "qat4", ">", "rounded4"),
        Check("the gap between digits trained on and others is smaller at 4 bits", "gap4", "<", "gap16"),
    ),
    seeds=(0, 1, 2, 3),
)


class Patches(nn.Module):
    """A convolution as a product of patches, so that it is a linear for all that is put on one."""

    def __init__(self, inside: int, width: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.linear = nn.Linear(inside * size * size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, c, h, w]` to `[n, width, h / stride, w / stride]`."""
        side = x.shape[-1] // self.stride
        rows = functional.unfold(x, self.size, padding=self.size // 2, stride=self.stride).transpose(1, 2)
        return self.linear(rows).transpose(1, 2).unflatten(2, (side, side))


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is one more where the width changes."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.one, self.two = Patches(inside, width, 3, stride), Patches(width, width, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.short = nn.Identity() if inside == width else Patches(inside, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, inside, h, w]` to `[n, width, h / stride, w / stride]`."""
        y = functional.relu(self.norms[0](self.one(x)))
        return functional.relu(self.norms[1](self.two(y)) + self.short(x))


class Net(nn.Module):
    """A first convolution, two blocks, a linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.norm = Patches(1, width, 3), nn.BatchNorm2d(width)
        self.body = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[n, 1, 8, 8]` to logits."""
        return self.head(self.body(functional.relu(self.norm(self.stem(images)))).mean((2, 3)))


def linears(net: nn.Module) -> dict[str, int]:
    """Path of every linear, and how many rows of an image it reads."""
    return {
        path: 1 if path == "head" else 64 if path.startswith(("stem", "body.0")) else 16
        for path, module in net.named_modules()
        if isinstance(module, nn.Linear)
    }


def bits_of(path: str, bits: int) -> int:
    """Bits of a product in a network of so many."""
    return max(bits, OUTER) if path.startswith(("stem", "head")) else bits


def cost(width: int, bits: int) -> float:
    """Multiplications of an image, each times its bits."""
    net = Net(width)
    return sum(rows * net.get_submodule(p).weight.numel() * bits_of(p, bits) for p, rows in linears(net).items())


def at_bits(net: Net, bits: int) -> Net:
    """The network with every linear trained on its grid."""
    for path in linears(net):
        own = bits_of(path, bits)
        net.set_submodule(path, AQT().wrap(net.get_submodule(path), parse_level(f"{own}b/row/sym")))
    return net


class Rounded(nn.Module):
    """A trained linear rounded to nearest, inputs too."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = RTN().solve(linear.weight.detach(), parse_level(f"{bits}b/row/sym")).dense()
        self.weight, self.bias, self.bits = weight, linear.bias, bits

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        return functional.linear(rounded_rows(x, self.bits), self.weight, self.bias)


@dataclass(frozen=True)
class Trained:
    """A network, its accuracies on the digits trained on, on those it was chosen by and on the others, and seconds."""

    net: Net
    seen: float
    chosen: float
    other: float
    seconds: float


@cache
def data() -> dict[str, tuple[Tensor, Tensor]]:
    """Digits to train on, to choose by, and to judge by."""
    images, labels = digits("train")
    others = [digits(split) for split in ("search", "test")]
    return {
        "seen": (images[:TRAINED], labels[:TRAINED]),
        "chosen": (images[TRAINED:], labels[TRAINED:]),
        "other": (torch.cat([o[0] for o in others]), torch.cat([o[1] for o in others])),
    }


def accuracy(net: nn.Module, part: str) -> float:
    """Share of the digits of a part that a network names."""
    images, labels = data()[part]
    net.eval()
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean())


def once(width: int, bits: int, rate: float, seed: int) -> Trained:
    """A network trained at a rate."""
    torch.manual_seed(seed)
    net = Net(width) if bits == 16 else at_bits(Net(width), bits)
    images, labels = data()["seen"]
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS * TRAINED // BATCH)
    rng, taken = torch.Generator().manual_seed(seed), []
    net.train()
    for _ in range(EPOCHS):
        for items in torch.randperm(TRAINED, generator=rng).split(BATCH):
            start = time.process_time()
            loss = functional.cross_entropy(net(images[items]), labels[items])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            taken.append(time.process_time() - start)
    return Trained(net, *(accuracy(net, p) for p in ("seen", "chosen", "other")), sorted(taken)[len(taken) // 2])


def above(points: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """How far a curve of (cost, accuracy) is above another, the mean over the costs of its points that both reach."""

    def along(curve: list[tuple[float, float]], c: float) -> float:
        for (a, low), (b, high) in itertools.pairwise(curve):
            if a <= c <= b:
                return low + (high - low) * math.log(c / a) / math.log(b / a)
        raise ValueError(c)

    reach = max(points[0][0], other[0][0]), min(points[-1][0], other[-1][0])
    costs = sorted({c for c, _ in (*points, *other) if reach[0] <= c <= reach[1]})
    return sum(along(points, c) - along(other, c) for c in costs) / len(costs)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    nets = {
        (bits, width): max((once(width, bits, rate, seed) for rate in RATES), key=lambda t: t.chosen)
        for bits, widths in {**WIDTHS, 16: (*WIDTHS[16], WIDTHS[4][-1])}.items()
        for width in widths
    }
    curves = {bits: [(cost(w, bits), nets[bits, w].other) for w in widths] for bits, widths in WIDTHS.items()}
    rounded = []
    for width in WIDTHS[4]:
        net = nets[16, width].net
        for path in linears(net):
            net.set_submodule(path, Rounded(net.get_submodule(path), bits_of(path, 4)))  # type: ignore[arg-type]
        rounded.append(accuracy(net, "other"))
    same = WIDTHS[4]
    gaps = {bits: [nets[bits, w].seen - nets[bits, w].other for w in same] for bits in (16, 4)}
    found = {f"b{bits}_w{w}": nets[bits, w].other for bits, widths in WIDTHS.items() for w in widths}
    found |= {f"cost{bits}_w{w}": cost(w, bits) for bits, widths in WIDTHS.items() for w in widths}
    return found | {
        **{"gain4": above(curves[4], curves[16]), "gain8": above(curves[8], curves[16])},
        **{"over8": above(curves[4], curves[8])},
        **{"qat4": sum(nets[4, w].other for w in same) / len(same), "rounded4": sum(rounded) / len(rounded)},
        **{"gap16": sum(gaps[16]) / len(same), "gap4": sum(gaps[4]) / len(same)},
        "train4": nets[4, 8].seconds / nets[16, 8].seconds,
    }
