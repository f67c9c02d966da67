"""SGD: the gradient itself, its momentum, or the sign of either."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Optimiser


@dataclass(frozen=True)
class SGD(Optimiser):
    """d = m with m = momentum m + g; d = g without momentum; with `sign`, d = sign(m).

    Args:
        momentum: share of the last direction that is kept (0: no state).
        sign: step by the sign of each number alone.

    Raises:
        UserError: a momentum outside of 0 to below 1.

    Reference: Robbins and Monro 1951; momentum: Polyak 1964, doi:10.1016/0041-5553(64)90137-5; signs: Bernstein et al.
        2018, arXiv:1802.04434, algorithm 1.
    Departures: none.

    >>> SGD().state_bytes((100, 10)), SGD(momentum=0.9).state_bytes((100, 10))
    (0, 4000)
    """

    momentum: float = 0.0
    sign: bool = False

    card = Card("sgd", claim="The baseline: no state at all.", keeps=frozenset({"deterministic"}))

    def init(self, param: Tensor) -> dict[str, Any]:
        """The momentum, zero, where there is one."""
        if not 0 <= self.momentum < 1:
            raise UserError(
                f"sgd was given momentum={self.momentum} for a parameter of shape {tuple(param.shape)}; "
                "it is 0 to below 1"
            )
        return {"step": 0} | ({"mean": torch.zeros_like(param)} if self.momentum else {})

    def step(self, grad: Tensor, state: dict[str, Any], param: Tensor) -> Tensor:
        """The gradient, its momentum, or the sign."""
        state["step"] += 1
        along = state["mean"].mul_(self.momentum).add_(grad) if self.momentum else grad
        return along.sign() if self.sign else along

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the momentum in fp32."""
        return 4 * prod(shape) if self.momentum else 0
