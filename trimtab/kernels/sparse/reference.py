"""What sparse weights compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def masked(mask: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """The kept weights go back to their places, zeros elsewhere, and the inputs are multiplied.

    y[i, r] = sum of values[k] x[i, c] over the kept (r, c), where k counts the kept ones before it, row by row

    Args:
        mask: `[rows, cols]`, true where a weight is kept.
        values: `[kept]`, halves.
        x: `[m, cols]`, fp32.

    Returns:
        `[m, rows]`, fp32.
    """
    return x @ torch.zeros(mask.shape).masked_scatter_(mask, values.float()).T


def nm(values: Tensor, places: Tensor, group: int, x: Tensor) -> Tensor:
    """`kept` of every `group` neighbours stay: each kept weight meets the input at its place of the group.

    y[i, r] = sum_g sum_k values[r, g, k] x[i, group g + places[r, g, k]]

    Args:
        values: `[rows, groups, kept]`, halves.
        places: `[rows, groups, kept]`, below `group`; those behind the last column hold zeros.
        group: neighbours in a group.
        x: `[m, cols]`, fp32, padded with zeros to whole groups here.

    Returns:
        `[m, rows]`, fp32.
    """
    rows, groups, _ = values.shape
    flat = torch.zeros(rows, groups, group).scatter_(2, places.long(), values.float()).reshape(rows, -1)
    return x @ flat[:, : x.shape[1]].T
