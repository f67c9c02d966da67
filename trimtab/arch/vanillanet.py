"""VanillaNet's block: deep while it is trained, and one convolution once its inner activation has faded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Architecture, Card
from trimtab.parts.convolving import ConvNorm, at_least_one, pointwise_product


@dataclass(frozen=True)
class VanillaNet(Architecture):
    """y = S(pool(W2 a(W1 x))), a(x) = (1 - t) relu(x) + t x; t goes from 0 to 1, and then W2 W1 is one matrix.

    W1 and W2 are pointwise convolutions with batch norm. S is the series activation: S(x)_c = BN sum_ij w_cij
    relu(x)_c(i, j), a depthwise convolution of side 2n + 1 behind a ReLU, which sees a place's neighbours. There is no
    shortcut. The module's `fade(t)` sets t, which a training raises step by step; `merged()` has half the convolutions.

    Args:
        series: n (paper: 3).
        pool: side and stride of the largest-value pooling; 1 for none (paper: 2 where a stage begins).

    Reference: Chen et al. 2023, arXiv:2305.12972, section 3.1 (deep training) and 3.2 (series of activations).
    Departures: none. The paper fades t over the epochs, t = epoch / epochs; when is the training's to say.

    >>> block = VanillaNet(pool=2).build(8, 16)
    >>> block.fade(1.0)
    >>> block.eval().merged()(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 16, 3, 3])
    """

    series: int = 3
    pool: int = 1

    card = Card(
        "vanillanet",
        catalogue=(101,),
        paper="arXiv:2305.12972",
        claim="Once the activation has faded, the merged network gives the same with half the convolutions and in less "
        "time; trained deep and merged it is more accurate than the shallow one trained as it is.",
        keeps=frozenset({"deterministic", "mergeable"}),
        kinds=frozenset({"block"}),
    )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block between so many channels, its activation not faded at all.

        Raises:
            UserError: a number below 1, or a negative one for the series.
        """
        at_least_one("vanillanet", inputs, outputs, self.pool)
        if self.series < 0:
            raise UserError(f"vanillanet was asked for a series of {self.series}; it takes 0 or more")
        return VanillaBlock(inputs, outputs, self.series, self.pool)


class SeriesActivation(nn.Module):
    """Shifted ReLUs added up, see `VanillaNet`; it keeps the shape `[n, channels, h, w]`."""

    def __init__(self, channels: int, series: int) -> None:
        super().__init__()
        self.shifted = ConvNorm(channels, channels, 2 * series + 1, groups=channels)
        nn.init.trunc_normal_(self.shifted[0].weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """The activated images."""
        return self.shifted(x.relu())

    def merged(self) -> nn.Module:
        """ReLU and one convolution."""
        return nn.Sequential(nn.ReLU(), self.shifted.merged())


class VanillaBlock(nn.Module):
    """The block of plain ints, see `VanillaNet`; `[n, inputs, h, w]` -> `[n, outputs, h / pool, w / pool]`."""

    linear: Tensor

    def __init__(self, inputs: int, outputs: int, series: int, pool: int) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(inputs, inputs), ConvNorm(inputs, outputs)
        self.pool = nn.MaxPool2d(pool) if pool > 1 else nn.Identity()
        self.series = SeriesActivation(outputs, series)
        self.register_buffer("linear", torch.zeros(()))

    def fade(self, share: float) -> None:
        """Set t: 0 for a ReLU between the two convolutions, 1 for nothing."""
        self.linear.fill_(share)

    def forward(self, x: Tensor) -> Tensor:
        """The output images."""
        inner = self.first(x)
        inner = self.linear * inner + (1 - self.linear) * inner.relu()
        return self.series(self.pool(self.second(inner)))

    def merged(self) -> nn.Module:
        """The block with one pointwise convolution, of the same function out of training.

        Raises:
            UserError: the activation has not faded.
        """
        if float(self.linear) != 1:
            raise UserError(
                f"a block of vanillanet was to be merged at t = {float(self.linear):g}; only at 1, where nothing is "
                "left between its convolutions, are they one"
            )
        return nn.Sequential(
            pointwise_product(self.second.merged(), self.first.merged()), self.pool, self.series.merged()
        )
