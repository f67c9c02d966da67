"""APOLLO-Mini: the raw gradient, scaled as a whole as Adam scales it in a random direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.core.method import Card, Optimiser
from trimtab.parts.moments import adam, at_least_one, begin, gaussian, moment_bytes, narrowed, project, scaled


@dataclass(frozen=True)
class APOLLOMini(Optimiser):
    """APOLLO at rank 1 with one factor for the whole tensor: d = sqrt(scale) |Adam(R)| / |R| G, R = P G.

    Args:
        scale: alpha squared (128).
        every: T, steps between two projections (200).
        betas, eps: Adam's (0.9, 0.999, 1e-6).

    Raises:
        UserError: T below 1.

    Reference: Zhu et al. 2025, arXiv:2412.05270, section 4.3.
    Departures: as of APOLLO.

    >>> APOLLOMini().state_bytes((768, 2048))
    16384
    """

    scale: float = 128.0
    every: int = 200
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    card = Card(
        "apollo-mini",
        paper="arXiv:2412.05270",
        claim="A loss on a par with AdamW's with next to no state.",
        keeps=frozenset({"deterministic"}),
    )

    def init(self, param: Tensor) -> dict[str, Any]:
        """Moments of the projected gradient, and the length of the last direction; Adam's own of vectors."""
        at_least_one("apollo-mini", param, every=self.every)
        shape = narrowed(tuple(param.shape), 1)
        return begin(shape, param) | {"length": -1.0} if shape else begin(tuple(param.shape), param)

    def step(self, grad: Tensor, state: dict[str, Any], param: Tensor, *, seed: int) -> Any:
        """The gradient and its factor."""
        if "length" not in state:
            return adam(grad, state, self.betas, self.eps)
        basis = gaussian(min(grad.shape), 1, seed + state["step"] // self.every)
        direction, factor = scaled(grad, project(grad, basis.to(grad.dtype)), state, True, self.betas, self.eps)
        return direction, factor * self.scale**0.5

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the projected moments in fp32."""
        return moment_bytes(narrowed(shape, 1) or shape)
