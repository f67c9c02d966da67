"""What the places of one adaptation have in common: a method that shares tensors among them finds these here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.core.level import Shape


@dataclass(frozen=True)
class Shared:
    """One place among all those that a method is put on.

    Fields:
        shapes: of all places in forward order, `(out, in)` of a linear.
        place: which of them this is.
        held: what the wrapper of an earlier place left for later ones, by a name of its own.
    """

    shapes: tuple[Shape, ...]
    place: int = 0
    held: dict[Any, Any] = field(default_factory=dict)

    @property
    def shape(self) -> Shape:
        """Of this place."""
        return self.shapes[self.place]

    @property
    def alike(self) -> int:
        """How many places have this one's shape."""
        return self.shapes.count(self.shape)

    def at(self, place: int) -> Shared:
        """Another place of the same company."""
        return Shared(self.shapes, place, self.held)


def drawn(count: int, among: int, rng: torch.Generator) -> torch.Tensor:
    """`count` of `among` numbers, int32: each once before any comes twice.

    >>> drawn(5, 3, torch.Generator().manual_seed(0)).unique().tolist()
    [0, 1, 2]
    """
    rounds = -(-count // among)
    return torch.cat([torch.randperm(among, generator=rng) for _ in range(rounds)])[:count].to(torch.int32)
