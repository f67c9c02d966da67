"""MobileNetV3's block: an inverted residual with squeeze-and-excite and the hard swish."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Architecture, Card
from trimtab.parts.convolving import ConvNorm, SqueezeExcite, at_least_one, odd


@dataclass(frozen=True)
class MobileNetV3(Architecture):
    """y = P(S(a(D(a(E x))))), + x where stride and widths allow: expand, depthwise, squeeze-and-excite, project.

    E, D and P are convolutions with batch norm, pointwise, depthwise and pointwise. The activation a is h-swish(x) =
    x relu6(x + 3) / 6, or ReLU in the paper's first layers; S scales every channel by a gate of all of them, with
    relu6(x + 3) / 6 in place of a sigmoid.

    Args:
        kernel: side of D's kernel (paper: 3 or 5).
        stride: of D.
        expansion: widths of D over those of the input (paper: 1 to 6).
        squeeze: S is there, its inner width a quarter of D's.
        hard: h-swish; else ReLU.

    Reference: Howard et al. 2019, arXiv:1905.02244, section 5, tables 1 and 2.
    Departures: the expanded width is the nearest whole number; the paper rounds to multiples of 8. The paper's search
        by NetAdapt is no part of the block.

    >>> import torch
    >>> MobileNetV3(stride=2).build(8, 16)(torch.zeros(1, 8, 6, 6)).shape
    torch.Size([1, 16, 3, 3])
    """

    kernel: int = 3
    stride: int = 1
    expansion: float = 6.0
    squeeze: bool = True
    hard: bool = True

    card = Card(
        "mobilenetv3",
        catalogue=(151,),
        paper="arXiv:1905.02244",
        claim="The hard swish takes less time than the swish, and the accuracy is the same within noise.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block between so many channels.

        Raises:
            UserError: an even kernel, or a number below 1.
        """
        odd("mobilenetv3", self.kernel)
        at_least_one("mobilenetv3", inputs, outputs, self.stride)
        if inputs * self.expansion < 1:
            raise UserError(
                f"mobilenetv3 was asked for {inputs} channels expanded by {self.expansion}; that is less than one"
            )
        hidden = round(inputs * self.expansion)
        return InvertedResidual(inputs, hidden, outputs, self.kernel, self.stride, self.squeeze, self.hard)


class InvertedResidual(nn.Module):
    """The block of plain ints, see `MobileNetV3`; `[n, inputs, h, w]` -> `[n, outputs, h / stride, w / stride]`."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int, squeeze: bool, hard: bool
    ) -> None:
        super().__init__()

        def activation() -> nn.Module:
            return nn.Hardswish() if hard else nn.ReLU()

        expand = [ConvNorm(inputs, hidden), activation()] if hidden != inputs else []
        gate = [SqueezeExcite(hidden, max(1, hidden // 4), nn.Hardsigmoid())] if squeeze else []
        depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.branch = nn.Sequential(*expand, depthwise, activation(), *gate, ConvNorm(hidden, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The output images."""
        return x + self.branch(x) if self.residual else self.branch(x)
