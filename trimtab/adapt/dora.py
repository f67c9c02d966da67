"""DoRA: the lengths of the matrix's rows and their directions are trained apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frozen
from trimtab.parts.lowrank_delta import LowRank, gaussian, rank_of, scale_of


@dataclass(frozen=True)
class DoRA(Wrapper):
    """W' = m (W0 + s B A) / ||W0 + s B A||, row by row; m, B and A are trained, and m = ||W0|| at first.

    The paper's columns are rows here, for it writes the matrix the other way round. The norm is a constant to the
    gradient (section 4.3), so that the backward pass is LoRA's and one sum.

    Args:
        alpha: scale of the product (LoRA's).
        scaling: `rank` or `root`, see LoRA.

    Reference: Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.
    Departures: the norm is worked out without the sum W0 + s B A being formed.

    >>> from trimtab.core.level import Rank
    >>> layer = nn.Linear(32, 16)
    >>> wrapped = DoRA().wrap(layer, Rank(4), rng=torch.Generator().manual_seed(0))
    >>> x = torch.randn(3, 32)
    >>> bool(torch.allclose(wrapped(x), layer(x), atol=1e-5)), wrapped.magnitude.shape
    (True, torch.Size([16]))
    """

    alpha: float = 16.0
    scaling: Literal["rank", "root"] = "rank"

    card = Card(
        "dora",
        paper="arXiv:2402.09353",
        claim="Lower loss than LoRA at equal rank.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear with a low-rank delta and trained row lengths.

        Raises:
            UserError: the level is no rank or above the matrix's, or a field has an unknown value.
        """
        rank, base = rank_of("dora", level, module), Frozen(module)
        a, b = gaussian(rank, base.in_features, rng), torch.zeros(base.out_features, rank)
        return LowRank(module, a, b, scale_of(self.alpha, rank, self.scaling), magnitude=True)
