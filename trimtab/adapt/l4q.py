"""L4Q: LoRA below the rounding, trained together with the scales: what comes out is one quantised matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trimtab.core.level import Rank
from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frozen
from trimtab.parts.lowrank_delta import gaussian, rank_of, scale_of
from trimtab.parts.trained_grid import OnGrid, grid_of


@dataclass(frozen=True)
class L4Q(Wrapper):
    """W = s clamp(round((W0 + c B A) / s)), c = alpha / r: A, B and the step s are trained through the rounding.

    With R = (W0 + c B A) / s, the gradient of s is round(R) - R inside the range and its end outside; A and B get
    c B^T G and c G A^T of the matrix's gradient G, inside the range alone. Afterwards no factor is left: the matrix is
    at the level, and takes that level's bytes.

    Args:
        rank: r of the factors.
        alpha: scale of their product, divided by r or its root.
        scaling: `rank` or `root`, see LoRA.

    Reference: Jeon et al. 2024, arXiv:2402.04902, sections 3.2 and 3.3, equations 7 to 12; the step's gradient: Esser
        et al. 2020, arXiv:1902.08153, equation 3.
    Departures: a level with zero points keeps these as they were found, where the paper trains an offset, which no
        integer format stores; what is trained is the step's change relative to what it was, which takes the place of
        LSQ's scaling of its gradient; steps are rounded to the 16 bits that store them in every step.

    >>> from trimtab.core.level import Int
    >>> layer, x = nn.Linear(64, 16), torch.randn(3, 64)
    >>> wrapped = L4Q(rank=4).wrap(layer, Int(4, 32), rng=torch.Generator().manual_seed(0))
    >>> _ = wrapped.b.data.normal_()
    >>> bool(torch.allclose(wrapped.merged()(x), wrapped(x))), wrapped.packed().nbytes == Int(4, 32).bytes((16, 64))
    (True, True)
    """

    rank: int = 8
    alpha: float = 16.0
    scaling: Literal["rank", "root"] = "rank"

    card = Card(
        "l4q",
        catalogue=(305,),
        paper="arXiv:2402.04902",
        claim="At 3 bits, training through the rounding loses less than LoRA that is rounded when it is merged.",
        leaves=frozenset({"adapted", "trainable", "int"}),
        keeps=frozenset({"mergeable", "deterministic", "shape"}),
        levels=("3b/g32", "4b/g64"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear on a grid with a low-rank change below it.

        Raises:
            UserError: the level, or that of a packed module, has no 16-bit scales of integers; the rank is above the
                matrix's.
        """
        grid, rank, base = grid_of("l4q", level), rank_of("l4q", Rank(self.rank), module), Frozen(module)
        a, b = gaussian(rank, base.in_features, rng), torch.zeros(base.out_features, rank)
        return OnGrid(module, grid, a, b, scale_of(self.alpha, rank, self.scaling))
