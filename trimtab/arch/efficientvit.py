"""EfficientViT's block: cascaded group attention between two layers of feed-forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.errors import UserError
from trimtab.core.method import Architecture, Card
from trimtab.parts.convolving import ConvNorm, FeedForward, Residual, at_least_one, odd, same_width


@dataclass(frozen=True)
class EfficientViT(Architecture):
    """A sandwich: F(D(x)), one attention, F(D(x)) again, each added to its input; heads see a share of the channels.

    Head j of h attends on x_j' = x_j + y_{j-1}, its own share of the channels and what the head before gave out:
    y_j = V softmax((T_j Q)^T K / sqrt(d) + b_j), with Q, K and V a pointwise convolution of x_j', T_j a depthwise one
    and b_j a number for each distance (rows, columns) between two places. The heads' outputs go through a ReLU and a
    pointwise convolution. D is a 3x3 depthwise convolution, F two pointwise ones; all have batch norm.

    Args:
        key: d, channels of Q and K of a head (paper: 16).
        kernels: sides of the T_j, one a head, so that there are as many heads (paper: 5 for each; 7, 5, 3, 3 in M4).
        expansion: inner width of F over the channels (paper: 2).
        window: places attend within windows of so many rows and columns (paper: 7).

    Reference: Liu et al. 2023, arXiv:2305.07027, section 3: sandwich layout, cascaded group attention.
    Departures: no stochastic depth. The window fits any image: the numbers b_j are kept by distance, and a smaller
        image uses those that it needs.

    >>> EfficientViT(kernels=(3, 3)).build(16, 16)(torch.zeros(1, 16, 9, 5)).shape
    torch.Size([1, 16, 9, 5])
    """

    key: int = 16
    kernels: tuple[int, ...] = (5, 5, 5, 5)
    expansion: int = 2
    window: int = 7

    card = Card(
        "efficientvit",
        catalogue=(73,),
        paper="arXiv:2305.07027",
        claim="At equal accuracy a network of the block processes more images a second than one that alternates "
        "multi-head attention and feed-forward, and its heads look at more different things.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block of so many channels.

        Raises:
            UserError: other channels in than out, channels that the heads cannot share, an even kernel, or a number
                below 1.
        """
        channels = same_width("efficientvit", inputs, outputs)
        odd("efficientvit", *self.kernels)
        at_least_one("efficientvit", self.key, self.expansion, self.window)
        if not self.kernels or channels % len(self.kernels):
            raise UserError(
                f"efficientvit was asked for {len(self.kernels)} heads (kernels) on {channels} channels; every head "
                "needs as many channels as the others"
            )

        def side() -> list[nn.Module]:
            depthwise = ConvNorm(channels, channels, 3, groups=channels, scale=0.0)
            return [Residual(depthwise), Residual(FeedForward(channels, self.expansion * channels))]

        attention = CascadedGroupAttention(channels, self.key, self.kernels, self.window)
        return nn.Sequential(*side(), Residual(attention), *side())


class CascadedGroupAttention(nn.Module):
    """The attention of plain ints, see `EfficientViT`; it keeps the shape `[n, channels, h, w]`."""

    def __init__(self, channels: int, key: int, kernels: tuple[int, ...], window: int) -> None:
        super().__init__()
        heads, self.window = len(kernels), window
        self.sizes = (key, key, channels // heads)
        self.qkv = nn.ModuleList(ConvNorm(channels // heads, sum(self.sizes)) for _ in kernels)
        self.near = nn.ModuleList(ConvNorm(key, key, kernel, groups=key) for kernel in kernels)
        self.biases = nn.Parameter(torch.zeros(heads, window, window))
        self.project = nn.Sequential(nn.ReLU(), ConvNorm(channels, channels, scale=0.0))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the input."""
        n, c, *size = x.shape
        high, wide = (min(self.window, s) for s in size)
        x = functional.pad(x, (0, -size[1] % wide, 0, -size[0] % high))
        rows, cols = x.shape[2] // high, x.shape[3] // wide
        x = x.view(n, c, rows, high, cols, wide).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, high, wide)
        x = self._attended(x).view(n, rows, cols, c, high, wide).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(n, c, rows * high, cols * wide)[:, :, : size[0], : size[1]]

    def _attended(self, x: Tensor) -> Tensor:
        """Attention within windows `[windows, channels, high, wide]`."""
        found: list[Tensor] = []
        for j, part in enumerate(x.chunk(len(self.qkv), 1)):
            q, k, v = self.qkv[j](part + found[-1] if found else part).split(self.sizes, 1)
            weights = self.attention(j, self.near[j](q), k)
            found.append((v.flatten(2) @ weights.transpose(1, 2)).view_as(part))
        return self.project(torch.cat(found, 1))

    def attention(self, head: int, q: Tensor, k: Tensor) -> Tensor:
        """Where a head looks, `[windows, queries, keys]`, of its Q and K `[windows, key, high, wide]`."""
        high, wide = q.shape[2:]
        down, right = ((i[:, None] - i).abs() for i in (torch.arange(s, device=q.device) for s in (high, wide)))
        distance = (down[:, None, :, None], right[None, :, None, :])  # rows, columns x rows, columns
        bias = self.biases[head][distance].reshape(high * wide, high * wide)
        return (q.flatten(2).transpose(1, 2) @ k.flatten(2) * q.shape[1] ** -0.5 + bias).softmax(-1)
