"""Hydra: one low-rank branch beside the linear and one behind it, both folded in after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frame, Frozen
from trimtab.parts.lowrank_delta import delta_linear, gaussian, rank_of


@dataclass(frozen=True)
class Hydra(Wrapper):
    """h = W0 x + b0 + B1 A1 x + B2 A2 (W0 x + b0): folded, W = W0 + B1 A1 + B2 A2 W0 and b = b0 + B2 A2 b0.

    The level's rank is that of both branches together, each having half, so that the trained numbers are about LoRA's.

    Args:
        scale: what both products are multiplied by (paper: 1, tuned by task).

    Reference: Kim et al. 2023, arXiv:2309.06922, section 3, equations 5 and 6.
    Departures: both branches are linear; the paper's own experiments use these too.

    >>> from trimtab.core.level import Rank
    >>> layer, x = nn.Linear(32, 16), torch.randn(3, 32)
    >>> wrapped = Hydra().wrap(layer, Rank(4), rng=torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(wrapped(x), layer(x), atol=1e-6))
    True
    """

    scale: float = 1.0

    card = Card(
        "hydra",
        catalogue=(48,),
        paper="arXiv:2309.06922",
        claim="Two branches reach a loss that neither the parallel nor the sequential one alone does at equal numbers.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear with both branches.

        Raises:
            UserError: the level is no rank, above the matrix's, or below 2.
        """
        rank = rank_of("hydra", level, module)
        if rank < 2:
            raise UserError(f"hydra was asked for {level}; two branches need a rank of 2 or more")
        return _Branches(module, rank - rank // 2, rank // 2, self.scale, rng)


class _Branches(Frame):
    def __init__(self, module: nn.Module, parallel: int, behind: int, scale: float, rng: torch.Generator) -> None:
        super().__init__(module)
        base, self.scale = self.frozen, scale
        self.a = nn.Parameter(gaussian(parallel, base.in_features, rng))
        self.b = nn.Parameter(torch.zeros(base.out_features, parallel))
        self.a_behind = nn.Parameter(gaussian(behind, base.out_features, rng))
        self.b_behind = nn.Parameter(torch.zeros(base.out_features, behind))

    def forward(self, x: Tensor) -> Tensor:
        # x goes through W0 and the parallel branch at once; the branch behind reads what W0 alone gives, which is
        # the difference of two thin products away
        both = delta_linear(x, self.frozen, self.a, self.b, None, self.scale)
        inner = x @ self.a.to(x.dtype).T
        reads = both @ self.a_behind.to(x.dtype).T
        reads = reads - self.scale * (inner @ (self.a_behind @ self.b).to(x.dtype).T)
        return both + self.scale * (reads @ self.b_behind.to(x.dtype).T)

    @torch.no_grad()
    def factored(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        if self.frozen.bias is not None:  # the branch behind reads the bias as well
            return None
        behind = self.a_behind.float() @ self.frozen.weight().float()
        factors = torch.cat((self.b, self.b_behind), 1).float() * self.scale
        return torch.cat((self.a.float(), behind)), factors, None

    @torch.no_grad()
    def delta(self) -> Tensor:
        behind = self.b_behind.float() @ (self.a_behind.float() @ self.frozen.weight().float())
        return self.scale * (self.b.float() @ self.a.float() + behind)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        bias = self.frozen.bias
        if bias is not None:
            bias = bias + self.scale * (self.b_behind @ (self.a_behind @ bias.float())).to(bias.dtype)
        return Frozen(self.base).linear(self.frozen.weight().float() + self.delta(), bias)
