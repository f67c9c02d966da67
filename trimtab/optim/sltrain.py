"""SLTrain: pretraining with a low-rank product and a few single entries in place of every matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.lowrank_delta import gaussian, rank_of
from trimtab.parts.sparse_factors import SparseFactors


@dataclass(frozen=True)
class SLTrain(Wrapper):
    """W = (alpha / r) B A + S, S having trained values at a share of places that are drawn once; the level gives r.

    A is drawn as LoRA's, B begins at zero, and S within 1 / sqrt(in). The module's own matrix is forgotten: this is
    for training from nothing.

    Args:
        density: share of the places of S (0.03).
        alpha: scale of the product, divided by r (32).

    Raises:
        UserError: a density outside of 0 to 1, or a rank above the matrix's.

    Reference: Han et al. 2024, arXiv:2406.02214, sections 3 and 4, algorithm 1.
    Departures: places are held in 32 bits, the authors hold 64.

    >>> from trimtab.core.level import Rank
    >>> wrapped = SLTrain().wrap(nn.Linear(100, 50), Rank(4), rng=torch.Generator().manual_seed(0))
    >>> wrapped.nbytes, wrapped(torch.randn(3, 100)).shape
    (3600, torch.Size([3, 50]))
    """

    density: float = 0.03
    alpha: float = 32.0

    card = Card(
        "sltrain",
        catalogue=(256,),
        paper="arXiv:2406.02214",
        claim="Near full-rank pretraining and below low rank alone, for fewer bytes of weights and state.",
        leaves=frozenset({"trainable"}),
        keeps=frozenset({"deterministic", "shape"}),
        levels=("r8", "r16"),
        kinds=frozenset({"linear"}),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear of the module's shape, from nothing."""
        if not 0 <= self.density <= 1:
            raise UserError(f"sltrain was asked for a density of {self.density}; it is 0 to 1")
        if not isinstance(module, nn.Linear):
            raise UserError(f"sltrain was given a {type(module).__name__}; a linear is needed")
        rank = rank_of("sltrain", level, module)
        rows, cols = module.weight.shape
        index = torch.randperm(rows * cols, generator=rng)[: round(self.density * rows * cols)].sort().values
        values = (torch.rand(len(index), generator=rng) * 2 - 1) / cols**0.5
        factor = gaussian(rank, cols, rng)
        return SparseFactors(module, factor, torch.zeros(rows, rank), values, index, self.alpha / rank)
