"""Task arithmetic: add up what the parents changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.method import Card, Merger
from trimtab.parts.merging import changes, combine


@dataclass(frozen=True)
class TaskArithmetic(Merger):
    """Add the task vectors to the base: W = W_0 + lambda sum_i w_i (W_i - W_0).

    Args:
        scale: lambda (1; the paper chooses it on held-out data, 0.3 to 0.5 for several tasks).
        weight: w_i, one a parent (1).
        normalise: divide by the sum of the weights.

    Reference: Ilharco et al. 2022, arXiv:2212.04089, section 2.
    Departures: none; the weights by parent are a common extension, and 1 is the paper.

    >>> import torch
    >>> base = torch.zeros(2)
    >>> TaskArithmetic(scale=0.5).merge([base + 1, base + 3], base, weight=(1.0, 1.0))
    tensor([2., 2.])
    """

    scale: float = 1.0
    weight: float = 1.0
    normalise: bool = False

    card = Card(
        "task-arithmetic",
        paper="arXiv:2212.04089",
        claim="A baseline: the sum of task vectors does several tasks at once.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...]) -> Tensor:
        """The base and the weighted sum of the changes."""
        return base + combine(changes(tensors, base), weight, normalise=self.normalise).mul_(self.scale)
