"""MoS: the rows of all factors are put together from pools of pieces that matrices of one shape share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frame
from trimtab.parts.lowrank_delta import delta_linear, gaussian, rank_of, scale_of
from trimtab.parts.shared import Shared, drawn


@dataclass(frozen=True)
class MoS(Wrapper):
    """h = W0 x + s B A x, where each row of A, and column of B, is a few shards chosen once from pools.

    The level's rank e is what is trained: as many numbers as LoRA of rank e has over all matrices, most of them in two
    pools, one of shards of A and one of B, from which n matrices of one shape choose. Each matrix gets the rank
    r = `widen` e. What tells the matrices apart are the paper's four devices: each has a subset of the pool, the choice
    for B is not that for A (pair dissociation), a row is `shards` pieces that are chosen one by one (vector sharding),
    and `private` of the e ranks are its own (shard privatisation).

    Args:
        widen: r / e (paper: 4 to 8 at a budget of rank 2).
        shards: pieces of a row (paper: 4).
        private: ranks of a matrix that no other uses, below e (paper: 1 at e = 2).
        alpha: scale of the product, divided by r or its root.

    Reference: Wang et al. 2025, arXiv:2410.00938, sections 3.2 and 3.3, equations 5 to 8.
    Departures: matrices of one shape share a pool, where the paper has those of one name do so; a shard is chosen
        twice only once all were.

    >>> from trimtab.core.level import Rank
    >>> layer, rng = nn.Linear(32, 16), torch.Generator().manual_seed(0)
    >>> shared = Shared(((16, 32),) * 4)
    >>> four = [MoS().wrap(layer, Rank(1), rng=rng, shared=shared.at(i)) for i in range(4)]
    >>> len({p for f in four for p in f.parameters() if p.requires_grad}), four[0].factors()[0].shape
    (2, torch.Size([8, 32]))
    """

    widen: int = 8
    shards: int = 4
    private: int = 0
    alpha: float = 16.0

    card = Card(
        "mos",
        catalogue=(150,),
        paper="arXiv:2410.00938",
        claim="At an eighth of LoRA's trained numbers the loss is LoRA's within noise, and below that of pure sharing.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r1", "r2"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator, shared: Shared) -> nn.Module:
        """A linear whose factors are drawn from the pools of its shape.

        Raises:
            UserError: the level is no rank or above the matrix's, or a field makes no sense at it.
        """
        rank = rank_of("mos", level, module)
        if self.widen < 1 or self.shards < 1 or not 0 <= self.private < rank:
            asked = f"widen={self.widen}, shards={self.shards} and private={self.private}"
            raise UserError(
                f"mos was asked for {asked} at rank {rank}; the first two are 1 or more, and private is below the rank"
            )
        return _Shards(module, rank, self, rng, shared)


class _Shards(Frame):
    index_a: Tensor
    index_b: Tensor

    def __init__(self, module: nn.Module, rank: int, method: MoS, rng: torch.Generator, shared: Shared) -> None:
        super().__init__(module)
        self.shards = method.shards
        wide = min(rank * method.widen, self.in_features, self.out_features)
        self.scale = scale_of(method.alpha, wide, "rank")
        own = min(method.private, wide)
        common = (rank - method.private) * shared.alike * self.shards
        pools = shared.held.setdefault(("mos", shared.shape), {})
        if not pools:
            a = gaussian(common, self.in_features, rng)[:, : self._piece(self.in_features)]
            pools["a"] = nn.Parameter(a.clone())
            pools["b"] = nn.Parameter(torch.zeros(common, self._piece(self.out_features)))
        self.pool_a, self.pool_b = pools["a"], pools["b"]
        self.own_a = nn.Parameter(gaussian(own, self.in_features, rng)) if own else None
        self.own_b = nn.Parameter(torch.zeros(own, self.out_features)) if own else None
        count = (wide - own) * self.shards
        self.register_buffer("index_a", drawn(count, common, rng))
        self.register_buffer("index_b", drawn(count, common, rng))

    def _piece(self, length: int) -> int:
        return -(-length // self.shards)

    def _rows(self, own: Tensor | None, pool: Tensor, index: Tensor, length: int) -> Tensor:
        rows = pool.index_select(0, index).reshape(-1, self.shards * pool.shape[1])[:, :length]
        return rows if own is None else torch.cat((own, rows))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[r, in]` and B `[out, r]`, put together."""
        a = self._rows(self.own_a, self.pool_a, self.index_a, self.in_features)
        return a, self._rows(self.own_b, self.pool_b, self.index_b, self.out_features).T

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.frozen, *self.factors(), None, self.scale)

    @torch.no_grad()
    def delta(self) -> Tensor:
        a, b = self.factors()
        return self.scale * (b.float() @ a.float())
