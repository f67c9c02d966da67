"""Passthrough: blocks of one model as they are, for results that are stacked from slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.method import Card, Merger


@dataclass(frozen=True)
class Passthrough(Merger):
    """One parent's tensor as it is, or times a number: W = s W_1.

    Args:
        scale: s (1).

    Reference: none; a way to stack blocks of several models, or of one model several times.
    Departures: none.

    >>> import torch
    >>> Passthrough().merge([torch.tensor([1.0, 2.0])], None)
    tensor([1., 2.])
    """

    scale: float = 1.0

    most: ClassVar[int | None] = 1

    card = Card(
        "passthrough",
        claim="The baseline of stacking: every block is one parent's own.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor | None) -> Tensor:
        """The tensor, scaled."""
        return tensors[0] * self.scale
