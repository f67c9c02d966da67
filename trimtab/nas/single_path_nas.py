"""Single-Path NAS: one large kernel holds all options, and thresholds say which parts of it are there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Relaxer


@dataclass(frozen=True)
class SinglePathNAS(Relaxer):
    """w = w_in + g(|w_out|^2 > t_k) w_out, and then so for the further channels: options are parts of one kernel.

    The options of a choice are blocks that differ in the side of their one depthwise kernel and in its channels; the
    largest alone is made. w_in is the inner square of its depthwise kernel, w_out the ring around it; of the channels,
    the first are those of the narrower option. g is 1 or 0, and has the gradient of a sigmoid of the difference. The
    thresholds t begin at 0 and are trained with the weights, on the same data, against CE + l log(seconds), the seconds
    being those of the options that the g say.

    Args:
        latency: l; 0 for none.

    Reference: Stamoulis et al. 2019, arXiv:1904.02877, section 3.
    Departures: squared norms are over their value at the start, so that a threshold has no unit and the sigmoid a
        gradient whatever the kernel's size. No option is to leave the block out. Seconds are measured of every option,
        where the paper adds up differences of them; they are over their value at the start.

    >>> def block(kernel, width=4):
    ...     return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
    >>> mixed = SinglePathNAS().mix([lambda: block(3), lambda: block(5)], ())
    >>> mixed(torch.zeros(1, 4, 6, 6)).shape, mixed.vote.weights().tolist()
    (torch.Size([1, 4, 6, 6]), [0.0, 1.0])
    """

    latency: float = 0.0

    card = Card(
        "single-path-nas",
        catalogue=(127,),
        paper="arXiv:1904.02877",
        claim="Weights and time of a step are well below those of a network of all paths, and what is found beats "
        "random networks that are as fast.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )
    bilevel: ClassVar[bool] = False

    def mix(self, makers: Sequence[Callable[..., nn.Module]], given: tuple[Any, ...], vote: Any = None) -> nn.Module:
        """The largest option, whose kernel is masked.

        Raises:
            UserError: an option has not exactly one depthwise convolution, or they are no grid of sides and widths.
        """
        with torch.device("meta"):
            shapes = [_shape(make(*given)) for make in makers]
        sides, widths = (sorted({shape[i] for shape in shapes}) for i in (0, 1))
        if sorted(shapes) != sorted((s, w) for s in sides for w in widths):
            raise UserError(
                f"single-path-nas was given options of sides and widths {shapes}; it takes every side with every width"
            )
        block = makers[shapes.index((sides[-1], widths[-1]))](*given)
        vote = vote or Thresholds(shapes, sides, widths)
        conv = _depthwise(block)
        parametrize.register_parametrization(conv, "weight", Superkernel(vote, conv.weight.detach()))
        return Single(block, vote)

    def weigh(self, loss: Tensor, seconds: Tensor, plain: float) -> Tensor:
        """The loss and the logarithm of the seconds."""
        return loss + self.latency * (seconds / plain).log()

    def choose(self, votes: Mapping[str, Any]) -> dict[str, int | None]:
        """What the thresholds say."""
        return {name: int(vote.weights().argmax()) for name, vote in votes.items()}


def _depthwise(block: nn.Module) -> nn.Conv2d:
    found = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    if len(found) != 1:
        raise UserError(
            f"single-path-nas was given an option with {len(found)} depthwise convolutions; it takes blocks with one"
        )
    return found[0]


def _shape(block: nn.Module) -> tuple[int, int]:
    conv = _depthwise(block)
    return conv.kernel_size[0], conv.out_channels


class Thresholds(nn.Module):
    """A vote whose weights are 1 for the option that the kernel's parts and the thresholds say, see `SinglePathNAS`."""

    def __init__(self, shapes: Sequence[tuple[int, int]], sides: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.shapes, self.sides, self.widths = list(shapes), list(sides), list(widths)
        self.outer = nn.Parameter(torch.zeros(len(sides) - 1))
        self.further = nn.Parameter(torch.zeros(len(widths) - 1))
        self.gates: dict[str, list[Tensor]] = {"sides": [], "widths": []}
        self.beside: list[Any] = [self]
        self.keep, self.nothing = 1, None

    def architecture(self) -> list[nn.Parameter]:
        """Its parameters."""
        return [self.outer, self.further]

    def weights(self) -> Tensor:
        """How much of each option there is, `[options]`: products of gates, each closing all those behind it."""
        along = {}
        for axis, sizes in (("sides", self.sides), ("widths", self.widths)):
            gates = self.gates[axis] or [self.outer.new_ones(()) for _ in sizes[1:]]
            open_ = torch.stack([self.outer.new_ones(()), *gates]).cumprod(0)
            closed = torch.cat([1 - torch.stack(gates), self.outer.new_ones(1)]) if gates else open_
            along[axis] = dict(zip(sizes, open_ * closed, strict=True))
        return torch.stack([along["sides"][side] * along["widths"][width] for side, width in self.shapes])

    def draw(self, rng: torch.Generator, learning: bool) -> None:
        """Nothing is drawn."""

    def settle(self) -> None:
        """Nothing is to be done."""


class Superkernel(nn.Module):
    """A depthwise kernel `[width, 1, side, side]` with those parts whose norm is above their threshold."""

    rings: Tensor
    bands: Tensor

    def __init__(self, vote: Thresholds, start: Tensor) -> None:
        super().__init__()
        self.vote = vote
        for name, parts in (("rings", self._rings(start)), ("bands", self._bands(start))):
            self.register_buffer(name, torch.stack([part.square().sum() for part in parts]))

    def forward(self, weight: Tensor) -> Tensor:
        """The kernel as it is used; the gates are left with the vote."""
        kernel, self.vote.gates["sides"] = gated(self._rings(weight), self.vote.outer, self.rings)
        kernel, self.vote.gates["widths"] = gated(self._bands(kernel), self.vote.further, self.bands)
        return kernel

    def _rings(self, weight: Tensor) -> list[Tensor]:
        whole = weight.shape[-1]

        def square(side: int) -> Tensor:
            edge = (whole - side) // 2
            return nn.functional.pad(weight[..., edge : whole - edge, edge : whole - edge], (edge,) * 4)

        return _parts([square(side) for side in self.vote.sides])

    def _bands(self, weight: Tensor) -> list[Tensor]:
        return _parts([torch.cat([weight[:w], torch.zeros_like(weight[w:])]) for w in self.vote.widths])


def _parts(nested: Sequence[Tensor]) -> list[Tensor]:
    """The first, and what each of the others adds to the one before."""
    return [nested[0], *(b - a for a, b in itertools.pairwise(nested))]


def gated(parts: Sequence[Tensor], thresholds: Tensor, units: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The sum of parts up to the first whose squared norm, over its unit, is not above its threshold, and the gates.

    >>> gated([torch.ones(2), torch.full((2,), 0.5)], torch.tensor([1.0]), torch.ones(2))[0].tolist()
    [1.0, 1.0]
    """
    total, open_, gates = parts[0], thresholds.new_ones(()), []
    for part, threshold, unit in zip(parts[1:], thresholds, units[1:], strict=True):
        difference = part.square().sum() / unit - threshold
        soft = difference.sigmoid()
        gates.append((difference > 0).float() + soft - soft.detach())
        open_ = open_ * gates[-1]
        total = total + open_ * part
    return total, gates


class Single(nn.Module):
    """The one block and its vote."""

    def __init__(self, block: nn.Module, vote: Thresholds) -> None:
        super().__init__()
        self.block, self.vote = block, vote

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return self.block(x)
