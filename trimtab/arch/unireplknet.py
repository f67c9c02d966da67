"""UniRepLKNet's block: one large depthwise kernel, trained beside dilated small ones that it takes up afterwards."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Architecture, Card
from trimtab.parts.convolving import ConvNorm, SqueezeExcite, at_least_one, convolution, same_width, with_norm

BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Side of the large kernel -> (side, dilation) of the kernels beside it."""


@dataclass(frozen=True)
class UniRepLKNet(Architecture):
    """y = x + g * BN(W2 GRN(gelu(W1 SE(BN(R x))))), R x = sum_i BN_i(D_i x): depthwise kernels, a large one among them.

    D_0 has side k; the others are small and dilated. A dilated kernel is a large one with zeros between, so that after
    the training all are one: K = sum_i pad(spread(K_i, r_i) / s_i), and `merged()` holds it, with the norms and g
    folded too. SE is squeeze-and-excite; GRN scales every channel by its norm over the image, over the mean of all
    channels' norms.

    Args:
        kernel: k, 5 to 17 (paper: 13).
        expansion: rows of W1 over the channels (paper: 4).
        scale: g at the start, a number a channel that is learned (paper: 1e-6).

    Reference: Ding et al. 2023, arXiv:2311.15599, section 3: dilated reparam block, and the network's block; dilations
        as in the paper's code.
    Departures: W1 and W2 are pointwise convolutions rather than linears of permuted images, which is the same function.
        No stochastic depth.

    >>> block = UniRepLKNet(kernel=5).build(8, 8).eval()
    >>> x = torch.ones(1, 8, 6, 6)
    >>> bool(torch.allclose(block.merged()(x), block(x), atol=1e-6))
    True
    """

    kernel: int = 13
    expansion: int = 4
    scale: float = 1e-6

    card = Card(
        "unireplknet",
        catalogue=(105,),
        paper="arXiv:2311.15599",
        claim="The merged kernel gives the same as its branches; at equal arithmetic a few large kernels see further "
        "than many 3x3 ones, at no loss of accuracy.",
        keeps=frozenset({"deterministic", "mergeable"}),
        kinds=frozenset({"block"}),
    )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block of so many channels.

        Raises:
            UserError: other channels in than out, or a kernel of which the paper does not say what goes beside it.
        """
        channels = same_width("unireplknet", inputs, outputs)
        at_least_one("unireplknet", self.expansion)
        if self.kernel not in BRANCHES:
            raise UserError(
                f"unireplknet was asked for a kernel of side {self.kernel}; the paper has branches for "
                f"{', '.join(map(str, BRANCHES))}"
            )
        return UniRepLKNetBlock(channels, self.kernel, self.expansion * channels, self.scale)


class DilatedReparamBlock(nn.Module):
    """Parallel depthwise kernels of plain ints, see `UniRepLKNet`; it keeps the shape `[n, channels, h, w]`."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        pairs = ((kernel, 1), *BRANCHES[kernel])
        self.branches = nn.ModuleList(ConvNorm(channels, channels, k, groups=channels, dilation=r) for k, r in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the branches."""
        return torch.stack([branch(x) for branch in self.branches]).sum(0)

    def merged(self) -> nn.Conv2d:
        """The one convolution that computes the same out of training."""
        large, *small = (branch.merged() for branch in self.branches)  # type: ignore[operator]
        weight, bias = large.weight.detach().clone(), sum(conv.bias for conv in (large, *small))
        for conv in small:
            first, reach = large.padding[0] - conv.padding[0], large.padding[0] + conv.padding[0] + 1
            places = slice(first, reach, conv.dilation[0])
            weight[:, :, places, places] += conv.weight
        return convolution(weight, bias, like=large)


class GlobalResponseNorm(nn.Module):
    """x (1 + g n / mean(n)) + b, n_c = |x_c| over the image: channels that say much say more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.zeros(channels, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The scaled images."""
        norms = x.norm(dim=(2, 3), keepdim=True)
        return x * (1 + self.scale * norms / (norms.mean(1, keepdim=True) + 1e-6)) + self.shift


class UniRepLKNetBlock(nn.Module):
    """The block of plain ints, see `UniRepLKNet`; it keeps the shape `[n, channels, h, w]`."""

    def __init__(self, channels: int, kernel: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.mixer: nn.Module = DilatedReparamBlock(channels, kernel)
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.squeeze = SqueezeExcite(channels, max(1, channels // 4), nn.Sigmoid())
        self.up, self.response = nn.Conv2d(channels, hidden, 1), GlobalResponseNorm(hidden)
        self.down: nn.Module = ConvNorm(hidden, channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        """The output images."""
        inner = self.up(self.squeeze(self.norm(self.mixer(x))))
        return x + self.scale * self.down(self.response(nn.functional.gelu(inner)))

    def merged(self) -> nn.Module:
        """The block with one depthwise kernel and no norm in between, of the same function out of training."""
        plain = copy.deepcopy(self)
        mixer, norm, down = self.mixer, self.norm, self.down
        assert isinstance(mixer, DilatedReparamBlock) and isinstance(norm, nn.BatchNorm2d)
        assert isinstance(down, ConvNorm)
        plain.mixer, plain.norm = with_norm(mixer.merged(), norm), nn.Identity()
        last = down.merged()
        assert last.bias is not None
        bias = last.bias + (last.weight[:, :, 0, 0] @ self.response.shift[:, 0, 0])
        plain.down = convolution(self.scale[..., None] * last.weight, self.scale[:, 0, 0] * bias, like=last)
        with torch.no_grad():
            plain.response.shift.zero_()
            plain.scale.fill_(1)
        return plain
