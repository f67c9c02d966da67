"""What a low-rank weight computes, in plain torch."""

from __future__ import annotations

from torch import Tensor


def low_rank(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """Two thin products instead of one wide one.

    y[i, r] = sum_k left[r, k] sum_c right[k, c] x[i, c]

    Args:
        left: `[rows, rank]`, halves.
        right: `[rank, cols]`, halves.
        x: `[m, cols]`, fp32.

    Returns:
        `[m, rows]`, fp32.
    """
    return x @ right.float().T @ left.float().T


def plus(base: Tensor, left: Tensor, right: Tensor, x: Tensor) -> Tensor:
    """A weight and the low-rank correction of its error (Yao et al. 2023, arXiv:2303.08302).

    y = base x + left (right x), for every row of x

    Args:
        base: `[rows, cols]`, fp32.
        left: `[rows, rank]`, halves.
        right: `[rank, cols]`, halves.
        x: `[m, cols]`, fp32.

    Returns:
        `[m, rows]`, fp32.
    """
    return x @ base.T + low_rank(left, right, x)
