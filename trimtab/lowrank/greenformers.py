"""LRT, the low-rank transformer of Greenformers: every linear map becomes two thin ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Rank
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed, pack_rank
from trimtab.parts.factors import truncated_svd


@dataclass(frozen=True)
class LRT(Solver):
    """Replace a weight by two thin ones, the truncated SVD of the trained weight.

    W ~ E D with E = U_r S_r^(1/2) `[out, r]` and D = S_r^(1/2) V_r^T `[r, in]`, where W = U S V^T. (The thesis writes W
    as `m x n`, its factors as `m x r` and `r x n`.)

    Fields: none; the rank is the level.

    Reference: Cahyawijaya 2021, arXiv:2108.10808, chapter 3 (Low-Rank Transformer); the same factorisation in Winata
        et al. 2020, arXiv:1910.13923.
    Departures: the thesis trains the factors from a random start; here they start from the trained weight, so that no
        training is needed. Healing afterwards is a separate step.

    >>> weight = torch.outer(torch.arange(1.0, 5.0), torch.ones(6))
    >>> packed = LRT().solve(weight, Rank(1), rng=torch.Generator())
    >>> bool((packed.dense() - weight).abs().max() < 1e-2)
    True
    """

    card = Card(
        "lrt",
        catalogue=(45,),
        paper="arXiv:2108.10808",
        claim="About half of the parameters stay near dense quality on short sequences; smaller and faster than dense.",
        requires=frozenset({"float"}),
        leaves=frozenset({"factored"}),
        keeps=frozenset({"shape", "deterministic", "monotone"}),
        levels=("r4", "r16", "r64"),
        kinds=frozenset({"linear", "head", "embedding", "conv"}),
    )

    def solve(self, weight: Tensor, level: Rank, *, rng: torch.Generator) -> Packed:
        """The factors of `weight [out, in]` at a rank.

        Raises:
            UserError: the level is no rank, or asks for a bias, which needs data that this method does not look at.
        """
        if not isinstance(level, Rank):
            raise UserError(f"lrt was asked for {level}; it takes ranks, like r16")
        if level.bias:
            raise UserError(
                f"lrt was asked for {level}, but it sees no data to take a mean of: use r{level.rank} or output-space"
            )
        left, right = truncated_svd(weight, level.rank, rng)
        return pack_rank(left, right, None, level, tuple(weight.shape))
