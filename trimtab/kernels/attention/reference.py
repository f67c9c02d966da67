"""Attention of new tokens to everything that their sequence holds.

`out[t, h] = sum_j softmax_j(scale * q[t, h] . k[j, h / group]) v[j, h / group]` over the keys `j` that token `t` sees:
those at its own position and before, and of these the last `window` where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, window: int = 0) -> Tensor:
    """Attention of one sequence.

    Args:
        q: queries `[tokens, heads, size]` at positions `start`, `start + 1` and so on.
        k, v: keys and values `[start + tokens, kv heads, size]` of the whole sequence.
        scale: of the scores.
        window: keys that a query sees, itself included; 0: all.

    Returns:
        `[tokens, heads, size]`.
    """
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * torch.einsum("thc,jhc->htj", q, keys)
    age = torch.arange(start, start + len(q))[:, None] - torch.arange(len(k))
    hidden = (age < 0) | ((age >= window) if window else torch.zeros_like(age, dtype=torch.bool))
    return torch.einsum("htj,jhc->thc", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
