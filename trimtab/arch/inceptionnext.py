"""InceptionNeXt's mixer: a large depthwise kernel taken apart into a square, two bands and nothing at all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Architecture, Card
from trimtab.parts.convolving import at_least_one, odd, same_width


@dataclass(frozen=True)
class InceptionNeXt(Architecture):
    """y = x + g * MLP(BN(M x)), M x = [x_1, D_kk x_2, D_1b x_3, D_b1 x_4]: most channels are not mixed in space.

    x_2, x_3 and x_4 have `share` of the channels each; D are depthwise convolutions with kernels k x k, 1 x b and
    b x 1. MLP is two pointwise convolutions with a GELU between.

    Args:
        share: of the channels, for each of the three branches (paper: 1/8).
        square: k (paper: 3).
        band: b (paper: 11).
        expansion: inner width of the MLP over the channels (paper: 4).
        scale: g at the start, a number a channel that is learned (paper: 1e-6).

    Reference: Yu et al. 2023, arXiv:2303.16900, section 3: MetaNeXt, and the Inception depthwise convolution.
    Departures: no stochastic depth.

    >>> InceptionNeXt().build(16, 16)(torch.zeros(1, 16, 5, 7)).shape
    torch.Size([1, 16, 5, 7])
    """

    share: float = 0.125
    square: int = 3
    band: int = 11
    expansion: int = 4
    scale: float = 1e-6

    card = Card(
        "inceptionnext",
        catalogue=(294,),
        paper="arXiv:2303.16900",
        claim="The block processes more images a second than the same block with a 7x7 depthwise kernel, and a small "
        "network of it is not less accurate.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block of so many channels.

        Raises:
            UserError: other channels in than out, an even kernel, or branches of no channel or of more than there are.
        """
        channels = same_width("inceptionnext", inputs, outputs)
        odd("inceptionnext", self.square, self.band)
        at_least_one("inceptionnext", self.expansion)
        branch = int(channels * self.share)
        if not 0 < 3 * branch <= channels:
            raise UserError(
                f"inceptionnext was asked for three branches of {self.share} of {channels} channels; that is {branch} "
                f"each, and there must be 1 to {channels // 3}"
            )
        mixer = InceptionDWConv(channels, branch, self.square, self.band)
        return MetaNeXtBlock(mixer, channels, self.expansion * channels, self.scale)


class InceptionDWConv(nn.Module):
    """The mixer of plain ints, see `InceptionNeXt`; it keeps the shape `[n, channels, h, w]`."""

    def __init__(self, channels: int, branch: int, square: int, band: int) -> None:
        super().__init__()
        self.widths = (channels - 3 * branch, branch, branch, branch)
        shapes = ((square, square), (1, band), (band, 1))
        self.branches = nn.ModuleList(
            nn.Conv2d(branch, branch, shape, padding=(shape[0] // 2, shape[1] // 2), groups=branch) for shape in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        """The mixed images."""
        kept, *parts = x.split(self.widths, 1)
        return torch.cat([kept, *(branch(part) for branch, part in zip(self.branches, parts, strict=True))], 1)


class MetaNeXtBlock(nn.Module):
    """x + g * MLP(BN(mixer(x))) around any mixer that keeps the shape `[n, channels, h, w]`."""

    def __init__(self, mixer: nn.Module, channels: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1))
        self.scale = nn.Parameter(torch.full((channels, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        """The output images."""
        return x + self.scale * self.mlp(self.norm(self.mixer(x)))
