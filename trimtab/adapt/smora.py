"""SMoRA: each rank of one low-rank pair is an expert; a router lets a token use a few of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frame, product
from trimtab.parts.lowrank_delta import gaussian, rank_of


@dataclass(frozen=True)
class SMoRA(Wrapper):
    """h = W0 x + s B (g(x) * A x): the router g keeps, token by token, the ranks with the k highest scores.

    A mixture of several LoRA experts is the same pair with ranks switched in blocks: `block=r/n` and `active=r/n` is
    that of n experts with top-1 routing, as LLaVA-MoLE has it.

    Args:
        active: ranks in use at a token; 0: an eighth of them, at least one block (paper: 8 of 64).
        block: ranks that are switched together (paper: 1).
        alpha: scale of the product, divided by the ranks in use.

    Reference: Zhao et al. 2025, arXiv:2501.15103, sections 3.1 and 3.2; top-1 routing of blocks: Chen et al. 2024,
        arXiv:2401.16160, equations 2 and 3.
    Departures: the weights of the chosen ranks are the softmax over the chosen scores times their number, so that equal
        scores leave the pair as it is; balance comes without a loss of its own.

    >>> from trimtab.core.level import Rank
    >>> layer, x = nn.Linear(32, 16), torch.randn(3, 32)
    >>> wrapped = SMoRA(active=2).wrap(layer, Rank(8), rng=torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(wrapped(x), layer(x), atol=1e-6)), int((wrapped.gates(x) != 0).sum())
    (True, 6)
    """

    active: int = 0
    block: int = 1
    alpha: float = 16.0

    card = Card(
        "smora",
        catalogue=(228, 235),
        paper="arXiv:2501.15103",
        claim="On mixed tasks, routing single ranks beats LoRA and a mixture of LoRAs of equal rank.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear with a routed low-rank delta.

        Raises:
            UserError: the level is no rank or above the matrix's, or its blocks do not come out even.
        """
        rank = rank_of("smora", level, module)
        active = self.active or max(self.block, rank // 8 // self.block * self.block)
        if self.block < 1 or rank % self.block or active % self.block or active > rank:
            raise UserError(
                f"smora was asked for {active} of {rank} ranks in blocks of {self.block}; the block divides "
                "both, and no more are in use than there are"
            )
        return _Routed(module, rank, active, self.block, self.alpha / active, rng)


class _Routed(Frame):
    def __init__(
        self, module: nn.Module, rank: int, active: int, block: int, scale: float, rng: torch.Generator
    ) -> None:
        super().__init__(module)
        self.active, self.block, self.scale = active // block, block, scale
        self.a = nn.Parameter(gaussian(rank, self.in_features, rng))
        self.b = nn.Parameter(torch.zeros(self.out_features, rank))
        self.router = nn.Parameter(gaussian(rank // block, self.in_features, rng))

    def gates(self, x: Tensor) -> Tensor:
        """The weight of each rank at each token; 0 where it is not in use."""
        scores = x @ self.router.to(x.dtype).T
        top = scores.topk(self.active, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, top.indices, top.values.softmax(-1) * self.active)
        return weights.repeat_interleave(self.block, dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        inner = (x @ self.a.to(x.dtype).T) * self.gates(x)
        return product(x, self.frozen) + self.scale * (inner @ self.b.to(x.dtype).T)
