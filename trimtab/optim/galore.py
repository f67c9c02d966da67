"""GaLore: Adam in the subspace of the gradient's leading singular vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.method import Card, Optimiser
from trimtab.parts.moments import adam, at_least_one, begin, leading, lift, moment_bytes, narrowed, project


@dataclass(frozen=True)
class GaLore(Optimiser):
    """Project the gradient onto its r leading singular vectors, take Adam's step there, and project back.

    R = P^T G; d = alpha P Adam(R); P holds the leading left singular vectors of G (right ones where G is tall), and is
    found anew every T steps. The moments stay as they are when P changes.

    Args:
        rank: r (128).
        scale: alpha (0.25).
        every: T (200).
        betas, eps: Adam's (0.9, 0.999, 1e-6).

    Raises:
        UserError: a rank or T below 1.

    Reference: Zhao et al. 2024, arXiv:2403.03507, algorithm 2.
    Departures: P comes from a randomised range finder in place of a whole decomposition, which would hold up a step for
        many times its length. Parameters that are no matrix of both sides above r take Adam's step.

    >>> GaLore(rank=4).state_bytes((100, 10))
    3360
    """

    rank: int = 128
    scale: float = 0.25
    every: int = 200
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    card = Card(
        "galore",
        paper="arXiv:2403.03507",
        claim="The baseline of projected moments: near AdamW's loss with the state of a low rank.",
        keeps=frozenset({"deterministic"}),
    )

    def init(self, param: Tensor) -> dict[str, Any]:
        """Moments of the projected gradient, and the basis; Adam's own where it is no larger matrix than the rank."""
        at_least_one("galore", param, rank=self.rank, every=self.every)
        shape = narrowed(tuple(param.shape), self.rank)
        if shape is None:
            return begin(tuple(param.shape), param)
        return begin(shape, param) | {"basis": param.new_zeros(min(param.shape), self.rank)}

    def step(self, grad: Tensor, state: dict[str, Any], param: Tensor, *, rng: torch.Generator) -> Tensor:
        """The direction, in the parameter's shape."""
        if "basis" not in state:
            return adam(grad, state, self.betas, self.eps)
        if state["step"] % self.every == 0:
            state["basis"].copy_(leading(grad, self.rank, rng))
        narrow = adam(project(grad, state["basis"]), state, self.betas, self.eps)
        return lift(narrow, state["basis"], tuple(grad.shape)).mul_(self.scale)

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the projected moments and the basis in fp32."""
        small = narrowed(shape, self.rank)
        return moment_bytes(small or shape) + (4 * min(shape) * self.rank if small else 0)
