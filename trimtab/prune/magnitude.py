"""Magnitude pruning: the smallest weights go, the baseline of every pruning method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.level import NM, Sparse
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed
from trimtab.parts.scores import keep, pack_kept


@dataclass(frozen=True)
class Magnitude(Solver):
    """Keep the weights with the largest |w|, of each row or of every m neighbours.

    Reference: Han, Pool, Tran and Dally 2015, arXiv:1506.02626, section 3, without the retraining.
    Departures: weights are compared within a row, as the level stores the same number in each, not within the layer.

    >>> import torch
    >>> weight = torch.tensor([[0.1, -2.0, 0.3, 1.0]])
    >>> Magnitude().solve(weight, Sparse(0.5)).dense()
    tensor([[ 0., -2.,  0.,  1.]])
    """

    card = Card(
        "magnitude",
        claim="The baseline: needs no data, and loses to methods that look at the inputs.",
        requires=frozenset({"float"}),
        leaves=frozenset({"sparse"}),
        keeps=frozenset({"shape", "deterministic", "monotone"}),
        levels=("70%", "60%", "2:4", "50%", "30%"),
        kinds=frozenset({"linear", "head", "conv"}),
    )

    def solve(self, weight: Tensor, level: Sparse | NM) -> Packed:
        """The weight `[out, in]` at a sparsity level.

        Raises:
            UserError: the level is not of sparsity.
        """
        weight = weight.float()
        return pack_kept(weight, keep(weight.abs(), level), level)
