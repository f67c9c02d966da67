"""UniRepLKNet: a few large kernels against more small ones, and the branches against the one kernel they become."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.arch.unireplknet import UniRepLKNet, UniRepLKNetBlock
from trimtab.core.claim import Check, Claim
from trimtab.parts.convolving import ConvNorm
from trimtab.tasks.contest import Contest, forward, in_turns, network, operations

WIDTH, LARGE, SMALL = 32, 3, 5

CLAIM = Claim(
    method="unireplknet",
    statement="A few large depthwise kernels see further than more small ones of as much arithmetic and are as "
    "accurate; the branches that they were trained with become one kernel of the same function.",
    source="Ding et al. 2023, arXiv:2311.15599, section 3",
    figure="88.0 % top-1 on ImageNet, faster than transformers",
    setting="Three blocks with kernels of 13x13, and five of 3x3, of 32 channels, factor 4, scale 1 at the start, on "
    "2,000 of CIFAR-10's images in patches of 2 x 2, 100 steps of 32. Arithmetic is counted of the merged network. "
    "Timed on 64 images, the processor's seconds, one thread, in turns.",
    metric="accuracy on 2,000 test images; side: of the smallest square around the middle, in places of 16, that "
    "holds half of the gradient of the middle place's output, mean over 64 training images; gap: largest difference "
    "of merged and unmerged outputs over the largest output",
    checks=(
        Check("the merged network computes the same", "gap", "<", 1e-4),
        Check("no more arithmetic than with small kernels", "large_operations", "<=", "small_operations"),
        Check("the large kernels see further", "large_side", ">", "small_side"),
        Check("the accuracy is not lower", "large", ">=", "small"),
        Check("merged it takes less time than in branches", "merged_seconds", "<", "branches_seconds"),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def large() -> nn.Module:
    """Blocks with large kernels and their branches."""
    return network(WIDTH, [UniRepLKNet(13, scale=1.0).build(WIDTH, WIDTH) for _ in range(LARGE)])


def small() -> nn.Module:
    """The same blocks with 3x3 kernels."""
    blocks = []
    for _ in range(SMALL):
        block = UniRepLKNetBlock(WIDTH, 5, 4 * WIDTH, 1.0)
        block.mixer = ConvNorm(WIDTH, WIDTH, 3, groups=WIDTH)
        blocks.append(block)
    return network(WIDTH, blocks)


def side(net: Any, images: torch.Tensor) -> float:
    """Side of the square around the middle that holds half of the gradient of the middle output."""
    inner = net[0](images).detach().requires_grad_(True)
    out = inner
    for block in net[1:-3]:
        out = block(out)
    middle = out.shape[2] // 2
    (grad,) = torch.autograd.grad(out[:, :, middle, middle].relu().sum(), inner)
    weight = grad.abs().sum(1)
    held = [weight[:, m - r : m + r + 1, m - r : m + r + 1].sum((1, 2)) for m in [middle] for r in range(middle)]
    inside = torch.stack(held) >= weight.sum((1, 2)) / 2
    return float((2 * inside.float().argmax(0) + 1).float().mean())


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest = Contest(lab.data, seed, steps=100, batch=32)
    branches: Any = contest.train(large)
    merged = nn.Sequential(*(m.merged() if hasattr(m, "merged") and i else m for i, m in enumerate(branches))).eval()
    other = contest.train(small)
    x = contest.data[0][:64]
    with torch.no_grad():
        one, all_ = merged(x), branches(x)
    times = in_turns({"merged": forward(merged, x), "branches": forward(branches, x), "small": forward(other, x)}, 7)
    found = {f"{name}_seconds": value for name, value in times.items()}
    found["gap"] = float((one - all_).abs().max() / all_.abs().max())
    for name, net in (("large", merged), ("small", other)):
        found |= {name: contest.accuracy(net), f"{name}_operations": operations(net, x)}
        found[f"{name}_side"] = side(net, x)
    return found
