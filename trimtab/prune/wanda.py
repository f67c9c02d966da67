"""Wanda: prune by weight times activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.level import NM, Sparse
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed
from trimtab.parts.scores import keep, pack_kept


@dataclass(frozen=True)
class Wanda(Solver):
    """Keep the weights of each row, or of every m neighbours, with the largest |W_ij| * ||X_j||, unchanged.

    ||X_j|| is here sqrt(gram_jj): the norm over the calibration samples, up to one factor.

    Reference: Sun, Liu, Bair and Kolter 2023, arXiv:2306.11695, equation 1 and section 3.
    Departures: none.

    >>> import torch
    >>> weight, gram = torch.tensor([[0.1, -2.0, 0.3, 1.0]]), torch.diag(torch.tensor([900.0, 1.0, 1.0, 1.0]))
    >>> Wanda().solve(weight, Sparse(0.5), gram=gram).dense().round(decimals=3)
    tensor([[ 0.1000, -2.0000,  0.0000,  0.0000]])
    """

    card = Card(
        "wanda",
        paper="arXiv:2306.11695",
        claim="Perplexity below magnitude pruning at 50 % and 2:4, without changing a weight.",
        requires=frozenset({"float"}),
        leaves=frozenset({"sparse"}),
        keeps=frozenset({"shape", "deterministic", "monotone"}),
        levels=("70%", "60%", "2:4", "50%", "30%"),
        kinds=frozenset({"linear", "head", "conv"}),
    )

    def solve(self, weight: Tensor, level: Sparse | NM, *, gram: Tensor) -> Packed:
        """The weight `[out, in]` at a sparsity level, given the gram `[in, in]` of its inputs.

        Raises:
            UserError: the level is not of sparsity.
        """
        weight = weight.float()
        return pack_kept(weight, keep(weight.abs() * gram.diagonal().clamp_min(0).sqrt(), level), level)
