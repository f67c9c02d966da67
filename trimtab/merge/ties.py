"""TIES: trim what the parents changed little, elect a sign, and average those that agree."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.method import Card, Merger
from trimtab.parts.merging import combine, kept


@dataclass(frozen=True)
class TIES(Merger):
    """Trim each task vector to its largest entries, elect a sign an element, and average what agrees with it.

    tau_i = W_i - W_0 where its magnitude is among the `density` largest, else 0; gamma = sgn(sum_i w_i tau_i);
    W = W_0 + lambda (sum of w_i tau_i with sgn(tau_i) = gamma) / (sum of their w_i).

    Args:
        density: k, the share of a task vector that is kept (0.2).
        scale: lambda (1).
        weight: w_i, one a parent (1).
        normalise: divide by the weights that agree (the paper's disjoint mean); else add up.

    Reference: Yadav et al. 2023, arXiv:2306.01708, section 4 and algorithm 1.
    Departures: the share is taken of each tensor and not of the whole model at once, so that one tensor is in memory
        at a time; where the signs tie, it is plus, and in the paper the more frequent sign of all elements.

    >>> import torch
    >>> base = torch.zeros(3)
    >>> one, two = torch.tensor([1.0, 2.0, 0.1]), torch.tensor([3.0, -1.0, 0.1])
    >>> TIES().merge([one, two], base, weight=(1.0, 1.0), threshold=(1.0, 1.0))
    tensor([2., 2., 0.])
    """

    density: float = 0.2
    scale: float = 1.0
    weight: float = 1.0
    normalise: bool = True

    card = Card(
        "ties",
        catalogue=(196,),
        paper="arXiv:2306.01708",
        claim="Above averaging and task arithmetic on several tasks; electing signs is part of the gain.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(
        self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...], threshold: tuple[float, ...]
    ) -> Tensor:
        """The base and the mean of the trimmed changes that agree in sign."""
        trimmed = [kept(tensor - base, least) for tensor, least in zip(tensors, threshold, strict=True)]
        return base + combine(trimmed, weight, elect=True, normalise=self.normalise).mul_(self.scale)
