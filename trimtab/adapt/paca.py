"""PaCA: a few input columns of each frozen matrix are trained in place of an adapter beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.core.method import Card, Wrapper
from trimtab.parts.column_delta import Columns
from trimtab.parts.frozen import Frozen
from trimtab.parts.lowrank_delta import rank_of


@dataclass(frozen=True)
class PaCA(Wrapper):
    """Train r random columns P = W[:, c] of a matrix: dL/dP = dL/dy^T x[:, c]; only x[:, c] is kept for it.

    The level's rank is the number of columns. They are drawn uniformly, as the paper does it by default; it finds that
    choosing them by weight or gradient norms gains nothing.

    Reference: Woo et al. 2025, arXiv:2503.01905, section 3, equations 6 to 9.
    Departures: what is stored and trained is the change of the columns, which begins at zero, so that the matrix
        below is shared, and may be packed; the paper writes into the matrix. The forward pass has one thin product more
        for it.

    >>> from trimtab.core.level import Rank
    >>> layer = nn.Linear(32, 16)
    >>> wrapped = PaCA().wrap(layer, Rank(4), rng=torch.Generator().manual_seed(0))
    >>> x = torch.randn(5, 32)
    >>> wrapped(x).sum().backward()
    >>> bool(torch.allclose(wrapped.columns.grad, torch.ones(5, 16).T @ x[:, wrapped.index]))
    True
    """

    card = Card(
        "paca",
        catalogue=(35,),
        paper="arXiv:2503.01905",
        claim="A step's time and kept bytes are below LoRA's at equal trained numbers, with the loss within noise.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear of which as many columns are trained as the level's rank says.

        Raises:
            UserError: the level is no rank, or above the matrix's.
        """
        count, base = rank_of("paca", level, module), Frozen(module)
        return Columns(module, torch.randperm(base.in_features, generator=rng)[:count])
