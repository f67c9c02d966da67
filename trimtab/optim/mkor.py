"""MKOR: Kronecker factors whose inverses are kept, and changed by one rank at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Optimiser


@dataclass(frozen=True)
class MKOR(Optimiser):
    """d = momentum d + |G| / |L^-1 G R^-1| L^-1 G R^-1, with L <- gamma L + (1 - gamma) g g^T and R the same with a.

    a and g are the means of a linear's inputs and of its outputs' gradients. The inverses are changed directly, by the
    formula of Sherman and Morrison, in products of a matrix with a vector:
    L^-1 <- (L^-1 - (1 - gamma) u u^T / (gamma + (1 - gamma) g^T u)) / gamma, u = L^-1 g.

    Args:
        gamma: decay of the factors (0.9).
        every: steps between two changes of the inverses (10).
        limit: an inverse with a larger number than this is drawn towards the identity (100).
        stay: share of such an inverse that stays (0.95).
        momentum: of the direction (0.9).
        most: rows or columns up to which a matrix has inverses (2048); larger ones, as embeddings, take the momentum.

    Raises:
        UserError: gamma outside of above 0 to below 1, or every below 1.

    Reference: Mozaffari et al. 2023, arXiv:2306.01685, section 3, algorithm 1, equations 5 and 6.
    Departures: the exact inverse after a change of rank 1, where the paper's equations approximate it. Inverses are in
        fp32, the paper's in 16 bits. The momentum is that of plain SGD. No MKOR-H. What is no weight of a linear takes
        the momentum of its gradient.

    >>> MKOR().state_bytes((20, 30)), MKOR().state_bytes((20,))
    (7600, 80)
    """

    gamma: float = 0.9
    every: int = 10
    limit: float = 100.0
    stay: float = 0.95
    momentum: float = 0.9
    most: int = 2048

    card = Card(
        "mkor",
        catalogue=(74,),
        paper="arXiv:2306.01685",
        claim="Second order at the cost of products with vectors: fewer steps than SGD with momentum.",
        keeps=frozenset({"deterministic"}),
    )

    def init(self, param: Tensor) -> dict[str, Any]:
        """Both inverses, the identity, of a matrix; the momentum, zero."""
        if not 0 < self.gamma < 1 or self.every < 1:
            raise UserError(
                f"mkor was given gamma={self.gamma} and every={self.every} for a parameter of shape "
                f"{tuple(param.shape)}; gamma is above 0 and below 1, every 1 or more"
            )
        state: dict[str, Any] = {"step": 0, "mean": torch.zeros_like(param)}
        if self._inverted(tuple(param.shape)):
            state |= {"left": torch.eye(len(param)).to(param), "right": torch.eye(param.shape[1]).to(param)}
        return state

    def step(
        self, grad: Tensor, state: dict[str, Any], param: Tensor, *, inputs: Tensor | None, errors: Tensor | None
    ) -> Tensor:
        """The momentum of the gradient between both inverses."""
        if "left" in state and inputs is not None and errors is not None:
            if state["step"] % self.every == 0:
                self._change(state["left"], errors)
                self._change(state["right"], inputs)
            found = state["left"] @ grad @ state["right"]
            grad = found.mul_(grad.norm() / found.norm().clamp_min(1e-30))
        state["step"] += 1
        along: Tensor = state["mean"].mul_(self.momentum).add_(grad)
        return along

    def _change(self, inverse: Tensor, vector: Tensor) -> None:
        if float(inverse.abs().max()) > self.limit:
            inverse.mul_(self.stay).diagonal().add_(1 - self.stay)
        rank_one(inverse, vector.to(inverse.dtype), self.gamma)

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of momentum and inverses in fp32."""
        return 4 * (prod(shape) + (sum(n * n for n in shape) if self._inverted(shape) else 0))

    def _inverted(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and max(shape) <= self.most


def rank_one(inverse: Tensor, vector: Tensor, gamma: float) -> None:
    """Change the inverse of M into that of gamma M + (1 - gamma) v v^T, in place.

    >>> m, v = torch.diag(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 3.0])
    >>> inverse = torch.linalg.inv(m)
    >>> rank_one(inverse, v, 0.5)
    >>> bool(torch.allclose(inverse, torch.linalg.inv(0.5 * m + 0.5 * torch.outer(v, v)), atol=1e-6))
    True
    """
    along = inverse @ vector
    scale = (1 - gamma) / (gamma + (1 - gamma) * float(vector @ along))
    inverse.addr_(along, along, alpha=-scale).div_(gamma)
