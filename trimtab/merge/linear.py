"""Linear: the weighted mean of the parents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.method import Card, Merger
from trimtab.parts.merging import average


@dataclass(frozen=True)
class Linear(Merger):
    """The weighted mean of the parents: W = sum_i w_i W_i / sum_i w_i.

    Args:
        weight: w_i, one a parent (1).
        normalise: divide by the sum of the weights.

    Raises:
        UserError: the weights cancel out and are to be normalised.

    Reference: the baseline of Wortsman et al. 2022, arXiv:2203.05482, section 2.
    Departures: none.

    >>> import torch
    >>> Linear().merge([torch.tensor([1.0]), torch.tensor([3.0])], None, weight=(1.0, 3.0))
    tensor([2.5000])
    """

    weight: float = 1.0
    normalise: bool = True

    card = Card(
        "linear",
        claim="The baseline: averaging needs nothing, and fine-tunes of one base stay in one basin.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor | None, *, weight: tuple[float, ...]) -> Tensor:
        """The mean, or the sum, of the tensors."""
        if self.normalise:
            return average(tensors, weight)
        result = tensors[0] * weight[0]
        for tensor, w in zip(tensors[1:], weight[1:], strict=True):
            result.add_(tensor, alpha=w)
        return result
