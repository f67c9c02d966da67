"""Soft targets: distributions over classes, apart from the target class, and kept on disk by their largest entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError


def others(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits `[n, classes - 1]` without each row's own class: their softmax sums to 1 over the rest.

    >>> others(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1])).tolist()
    [[1.0, 3.0]]
    """
    mask = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    return logits[mask].view(len(logits), -1)


def largest(probabilities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their places; what they leave of 1 belongs to the other classes in equal parts.

    Raises:
        UserError: there are not so many classes.
    """
    if not 1 <= k <= probabilities.shape[1]:
        raise UserError(
            f"the {k} largest of {probabilities.shape[1]} classes were asked for; 1 to that many can be had"
        )
    found = probabilities.topk(k, dim=1)
    return found.values, found.indices


def spread_out(values: Tensor, places: Tensor, classes: int) -> Tensor:
    """Distributions `[n, classes]` from their k largest entries, the rest shared evenly.

    >>> [round(p, 3) for p in spread_out(torch.tensor([[0.5, 0.3]]), torch.tensor([[2, 0]]), 4).tolist()[0]]
    [0.3, 0.1, 0.5, 0.1]
    """
    k = values.shape[1]
    rest = (1 - values.sum(1, keepdim=True)).clamp_min(0) / max(1, classes - k)
    return rest.expand(-1, classes).scatter(1, places.long(), values)


@dataclass(frozen=True)
class Kept:
    """What a teacher said of items once, to be read in every pass over them.

    Fields:
        values: the k largest probabilities `[items, k]`, 16 bits.
        places: their classes `[items, k]`, 16 bits.
        seeds: of each item's augmentation `[items]`: the student must see what the teacher saw.
        classes: how many there are.
    """

    values: Tensor
    places: Tensor
    seeds: Tensor
    classes: int

    @staticmethod
    def of(logits: Tensor, k: int, seeds: Tensor) -> Kept:
        """Keep the k largest of a teacher's logits `[items, classes]`."""
        values, places = largest(logits.float().softmax(1), k)
        return Kept(values.half(), places.to(torch.int16), seeds.to(torch.int32), logits.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> Mapping[str, Tensor]:
        """By name, for a file."""
        return {"values": self.values, "places": self.places, "seeds": self.seeds}

    def logits(self, items: Tensor) -> Tensor:
        """Logits `[n, classes]` whose softmax is what is kept of these items."""
        rows = spread_out(self.values[items].float(), self.places[items], self.classes)
        return rows.clamp_min(torch.finfo(torch.float32).tiny).log()
