"""VoVNet's one-shot aggregation: all layers of a block are gathered once, at its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.method import Architecture, Card
from trimtab.parts.convolving import ConvNorm, at_least_one


@dataclass(frozen=True)
class VoVNet(Architecture):
    """y = P [x, x_1, ..., x_L], x_i = C_i(x_{i-1}), x_0 = x: a chain of equal widths, concatenated once.

    C_i is a 3x3 convolution and P a pointwise one, each with batch norm and ReLU. A dense block feeds each layer with
    all before it, so that its inputs grow and are read again and again; at equal channels in and out a convolution
    touches the least memory.

    Args:
        layers: L (paper: 5).
        width: channels of each layer; 0: those of the output over 2, about as in the paper's VoVNet-27-slim.

    Reference: Lee et al. 2019, arXiv:1904.09730, section 3.2 and figure 1 (b).
    Departures: none.

    >>> VoVNet(width=8).build(12, 24)(torch.zeros(1, 12, 5, 5)).shape
    torch.Size([1, 24, 5, 5])
    """

    layers: int = 5
    width: int = 0

    card = Card(
        "vovnet",
        catalogue=(292,),
        paper="arXiv:1904.09730",
        claim="At equal arithmetic the block takes less time and touches less memory than a dense block, at no loss of "
        "accuracy.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block between so many channels.

        Raises:
            UserError: a number below 1.
        """
        width = self.width or max(1, outputs // 2)
        at_least_one("vovnet", inputs, outputs, self.layers, width)
        return OneShotAggregation(inputs, width, outputs, self.layers)


class OneShotAggregation(nn.Module):
    """The block of plain ints, see `VoVNet`; `[n, inputs, h, w]` -> `[n, outputs, h, w]`."""

    def __init__(self, inputs: int, width: int, outputs: int, layers: int) -> None:
        super().__init__()
        widths = [inputs, *[width] * (layers - 1)]
        self.chain = nn.ModuleList(nn.Sequential(ConvNorm(w, width, 3), nn.ReLU()) for w in widths)
        self.gather = nn.Sequential(ConvNorm(inputs + layers * width, outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """The output images."""
        parts = [x]
        for layer in self.chain:
            parts.append(layer(parts[-1]))
        return self.gather(torch.cat(parts, 1))
