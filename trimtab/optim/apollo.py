"""APOLLO: the raw gradient, scaled channel by channel as Adam scales it in a random subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Optimiser
from trimtab.parts.moments import (
    adam,
    at_least_one,
    begin,
    bucketed,
    gaussian,
    moment_bytes,
    narrowed,
    project,
    scaled,
    signs,
)


@dataclass(frozen=True)
class APOLLO(Optimiser):
    """Scale each channel of the gradient by |Adam(R_j)| / |R_j|, R = P G being its random projection to rank r.

    d = alpha G diag(s), s_j = |R~_j| / |R_j|, R~ = M / (sqrt(V) + eps); M and V are Adam's moments of R; P has entries
    of variance 1 / r and is drawn anew every T steps from a seed. Channels run along the longer side.

    Args:
        rank: r (paper: a quarter of the width; its code: 256).
        scale: alpha squared (1).
        every: T, steps between two projections (200).
        projection: `gaussian` (paper), or `buckets`: sums of every r-th row with random signs, which cost one pass over
            the gradient in place of a product.
        betas, eps: Adam's (0.9, 0.999, 1e-6).

    Raises:
        UserError: a rank or T below 1, or an unknown projection.

    Reference: Zhu et al. 2025, arXiv:2412.05270, algorithm 1 and section 4.
    Departures: matrices of one shorter side share P, so that drawing it from its seed costs next to nothing.
        Growth is limited in directions whose bias is corrected, in the authors' code before. Parameters that are no
        matrix of both sides above r take Adam's step.

    >>> APOLLO(rank=4).state_bytes((100, 10)), APOLLO(rank=4).state_bytes((10,))
    (3200, 80)
    """

    rank: int = 256
    scale: float = 1.0
    every: int = 200
    projection: Literal["gaussian", "buckets"] = "gaussian"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6

    card = Card(
        "apollo",
        catalogue=(257,),
        paper="arXiv:2412.05270",
        claim="A loss on a par with AdamW's with the state of a low rank, and no decomposition.",
        keeps=frozenset({"deterministic"}),
    )

    def init(self, param: Tensor) -> dict[str, Any]:
        """Moments of the projected gradient, and the length of the last direction; Adam's own where it is no larger
        matrix than the rank.
        """
        at_least_one("apollo", param, rank=self.rank, every=self.every)
        if self.projection not in ("gaussian", "buckets"):
            raise UserError(
                f"apollo was given projection={self.projection!r} for a parameter of shape {tuple(param.shape)}; "
                "it is 'gaussian' or 'buckets'"
            )
        shape = narrowed(tuple(param.shape), self.rank)
        return begin(shape, param) | {"length": -1.0} if shape else begin(tuple(param.shape), param)

    def step(self, grad: Tensor, state: dict[str, Any], param: Tensor, *, seed: int) -> Any:
        """The gradient and its factors."""
        if "length" not in state:
            return adam(grad, state, self.betas, self.eps)
        side, drawn = min(grad.shape), seed + state["step"] // self.every
        if self.projection == "buckets":
            narrow = bucketed(grad, self.rank, signs(side, drawn))
        else:
            narrow = project(grad, gaussian(side, self.rank, drawn).to(grad.dtype))
        direction, factor = scaled(grad, narrow, state, False, self.betas, self.eps)
        return direction, factor * self.scale**0.5

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the projected moments in fp32."""
        return moment_bytes(narrowed(shape, self.rank) or shape)
