"""SLERP: from one model to another along the sphere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.method import Card, Merger


@dataclass(frozen=True)
class Slerp(Merger):
    """Between two tensors along the great circle: W = (sin((1 - t) a) W_1 + sin(t a) W_2) / sin(a), a their angle.

    Tensors that are nearly parallel, or opposite, are joined by a straight line: W = W_1 + t (W_2 - W_1).

    Args:
        t: how far to go, from 0, the first parent, to 1, the second (0.5).
        parallel: the cosine from which on tensors count as parallel (0.9995).

    Reference: Shoemake 1985, Animating rotation with quaternion curves, section 3.3; no paper proposes it for weights.
    Departures: a tensor is one vector of all its elements, as is usual where models are merged.

    >>> import torch
    >>> a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> Slerp().merge([a, b], None, gram=torch.eye(2))
    tensor([0.7071, 0.7071])
    """

    t: float = 0.5
    parallel: float = 0.9995

    most: ClassVar[int | None] = 2

    card = Card(
        "slerp",
        claim="A baseline: keeps the norms of tensors, which averaging shortens.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor | None, *, gram: Tensor) -> Tensor:
        """Between the first tensor and the second, given their inner products; one tensor alone stays as it is."""
        first, second = tensors[0], tensors[-1]
        norms = (gram.diagonal().sqrt()).tolist()
        product = norms[0] * norms[-1]
        cosine = max(-1.0, min(1.0, float(gram[0, -1]) / product)) if product > 0 else 1.0
        if abs(cosine) > self.parallel:
            return first + self.t * (second - first)
        angle = math.acos(cosine)
        left, right = (math.sin(part * angle) / math.sin(angle) for part in (1 - self.t, self.t))
        return (first * left).add_(second, alpha=right)
