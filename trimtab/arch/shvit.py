"""SHViT's block: attention with one head on part of the channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Architecture, Card
from trimtab.parts.convolving import ConvNorm, FeedForward, Residual, at_least_one, same_width


@dataclass(frozen=True)
class SHViT(Architecture):
    """x <- x + D x, x <- x + P relu([A x_1, x_2]), x <- x + F x: local, global on a share of the channels, pointwise.

    D is a 3x3 depthwise convolution, F two pointwise ones with a ReLU between, and P a pointwise one; all have batch
    norm. x_1 are the first C_p = share * C channels, and A is attention with one head: Q, K and V come from a pointwise
    convolution of the normalised x_1 (one group over channels and places), A x_1 = V softmax(K^T Q / sqrt(d)).

    Args:
        share: of the channels that attention sees (paper: 1 / 4.67).
        key: d, the channels of Q and of K (paper: 16).
        expansion: inner width of F over C (paper: 2).

    Reference: Yun and Ro 2024, arXiv:2401.16456, section 3: single-head self-attention, and the block of figure 4.
    Departures: no stochastic depth.

    >>> SHViT().build(28, 28)(torch.zeros(1, 28, 4, 4)).shape
    torch.Size([1, 28, 4, 4])
    """

    share: float = 1 / 4.67
    key: int = 16
    expansion: int = 2

    card = Card(
        "shvit",
        catalogue=(291,),
        paper="arXiv:2401.16456",
        claim="A small network takes less time than one of multi-head attention with as many weights, and is not less "
        "accurate.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The block of so many channels.

        Raises:
            UserError: other channels in than out, a number below 1, or a share of no channel or of more than all.
        """
        channels = same_width("shvit", inputs, outputs)
        at_least_one("shvit", self.key, self.expansion)
        part = round(channels * self.share)
        if not 1 <= part <= channels:
            raise UserError(
                f"shvit was asked for attention on {self.share:.3g} of {channels} channels; that is {part}, and there "
                f"must be 1 to {channels}"
            )
        return nn.Sequential(
            Residual(ConvNorm(channels, channels, 3, groups=channels, scale=0.0)),
            Residual(SingleHeadAttention(channels, part, self.key)),
            Residual(FeedForward(channels, self.expansion * channels)),
        )


class SingleHeadAttention(nn.Module):
    """The attention of plain ints, see `SHViT`; it keeps the shape `[n, channels, h, w]`."""

    def __init__(self, channels: int, part: int, key: int) -> None:
        super().__init__()
        self.widths, self.sizes = (part, channels - part), (key, key, part)
        self.norm, self.qkv = nn.GroupNorm(1, part), ConvNorm(part, sum(self.sizes))
        self.project = nn.Sequential(nn.ReLU(), ConvNorm(channels, channels, scale=0.0))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the input."""
        seen, kept = x.split(self.widths, 1)
        q, k, v = (t.flatten(2) for t in self.qkv(self.norm(seen)).split(self.sizes, 1))
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)  # [n, queries, keys]
        mixed = (v @ weights.transpose(1, 2)).view_as(seen)
        return self.project(torch.cat([mixed, kept], 1))
