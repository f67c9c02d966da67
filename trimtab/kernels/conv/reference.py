"""What a sparse convolution computes, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sparse_conv(
    mask: Tensor,
    values: Tensor,
    bias: Tensor | None,
    x: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The kept weights go back to their places, zeros elsewhere, and torch's convolution runs.

    y[i, o, p, q] = bias[o] + sum over the kept (o, c, a, b) of values[k] x[i, c, p s + a d - pad, q s + b d - pad]

    Args:
        mask: `[out, in / groups, kernel height, kernel width]`, true where a weight is kept.
        values: `[kept]`, halves, in the order of the mask.
        bias: `[out]` or None.
        x: `[images, in, height, width]`, fp32.
        stride: rows and columns, as the three that follow.

    Returns:
        `[images, out, height', width']`, fp32.
    """
    weight = torch.zeros(mask.shape).masked_scatter_(mask, values.float())
    return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
