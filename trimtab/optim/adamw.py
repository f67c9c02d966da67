"""AdamW: both moments of every number. The baseline of lean optimisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.core.method import Card, Optimiser
from trimtab.parts.moments import adam, begin, moment_bytes


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay, which the driver applies: d = m^ / (sqrt(v^) + eps).

    Args:
        betas: decay of the first and second moment (paper: 0.9, 0.999).
        eps: added to the root (paper: 1e-8).

    Reference: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    Departures: none.

    >>> AdamW().state_bytes((100, 10))
    8000
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    card = Card("adamw", claim="The baseline: two numbers of state a weight.", keeps=frozenset({"deterministic"}))

    def init(self, param: Tensor) -> dict[str, Any]:
        """Both moments, zero."""
        return begin(tuple(param.shape), param)

    def step(self, grad: Tensor, state: dict[str, Any], param: Tensor) -> Tensor:
        """Adam's direction."""
        return adam(grad, state, self.betas, self.eps)

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of both moments in fp32."""
        return moment_bytes(shape)
