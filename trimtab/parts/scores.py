"""Scores of weights, and from scores to masks: which weights of each row stay at a sparsity level."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.core.errors import UserError
from trimtab.core.level import NM, Level, Sparse
from trimtab.formats.packed import Packed, pack_nm, pack_sparse


def keep_top(score: Tensor, count: int) -> Tensor:
    """Mask `[out, in]` of the `count` highest scores of each row; of equal scores one is picked.

    >>> keep_top(torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]), 2)
    tensor([[False,  True,  True],
            [ True, False,  True]])
    """
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(count, dim=1).indices, True)


def keep_nm(score: Tensor, n: int, m: int) -> Tensor:
    """Mask `[out, in]` of the `n` highest scores of every `m` neighbours in a row, of a short last group too.

    >>> keep_nm(torch.tensor([[1.0, 3.0, 2.0, 0.0, 9.0]]), 2, 4)
    tensor([[False,  True,  True, False,  True]])
    """
    rows, cols = score.shape
    groups = pad(score, (0, -cols % m), value=float("-inf")).reshape(-1, m)
    return keep_top(groups, n).reshape(rows, -1)[:, :cols]


def keep(score: Tensor, level: Level) -> Tensor:
    """Mask `[out, in]` of the weights that stay at a sparsity level, the highest scores first.

    Raises:
        UserError: the level is neither `Sparse` nor `NM`.
    """
    if isinstance(level, Sparse):
        return keep_top(score, level.kept(tuple(score.shape)) // len(score))
    if isinstance(level, NM):
        return keep_nm(score, level.n, level.m)
    raise UserError(f"{level} was asked of a pruning method, which takes levels like 50% or 2:4")


def pack_kept(weight: Tensor, mask: Tensor, level: Sparse | NM) -> Packed:
    """The stored form of a weight `[out, in]` of which `mask` stays."""
    shape = tuple(weight.shape)
    if isinstance(level, NM):
        return pack_nm(weight, mask, level, shape)
    return pack_sparse(weight, mask, level, shape)


def outlier_score(weight: Tensor) -> float:
    """Share of the entries that lie more than one standard deviation above the mean: |{w : (w - mean) / std > 1}| / n.

    Args:
        weight: any shape; 0 where all entries are equal.

    Reference: Dumitru et al. 2024, arXiv:2406.17415, section 3 (ZD score).

    >>> import torch
    >>> outlier_score(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    0.25
    """
    weight = weight.float()
    return float((weight - weight.mean() > weight.std(correction=0)).float().mean())
