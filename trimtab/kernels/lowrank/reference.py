"""What a low-rank weight computes, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def adapted(y: Tensor, x: Tensor, corrections: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
    """Each row of a batch with the correction of its own adapter (Sheng et al. 2023, arXiv:2311.03285, section 5.3).

    z[i] = y[i] + left_i right_i x[i]

    Args:
        y: what the shared weight gives, `[m, rows]`, fp32.
        x: `[m, cols]`, fp32.
        corrections: for each row left `[rows, rank]` and right `[rank, cols]`, halves of any rank, or None.

    Returns:
        `[m, rows]`, fp32.
    """
    rows = [y[i] if c is None else y[i] + low_rank(*c, x[i : i + 1])[0] for i, c in enumerate(corrections)]
    return torch.stack(rows)
