"""TLEG: blocks of a transformer of any depth, as points on a line between two learnt ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Merger


@dataclass(frozen=True)
class TLEG(Merger):
    """Expand a learngene, two tensors, into the tensor of block l of L: W_l = A + (l / L) B, l from 0 to L - 1.

    The first parent holds A and the second B, each in a single block. What lies outside of blocks is the first
    parent's. A and B are learnt together, as the blocks of an auxiliary model that is expanded in every step.

    Reference: Xia et al. 2023, arXiv:2312.05614, section 3.1, equation 1.
    Departures: training the learngene is outside of this verb; all tensors of a block are expanded, where the paper
        also tries some of them alone.

    >>> import torch
    >>> TLEG().merge([torch.tensor([1.0]), torch.tensor([4.0])], None, block=(3, 4))
    tensor([4.])
    """

    most: ClassVar[int | None] = 2

    card = Card(
        "tleg",
        catalogue=(50,),
        paper="arXiv:2312.05614",
        claim="From two stored blocks, models of several depths start better than from blocks of a trained model.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "deterministic"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor | None, *, block: tuple[int, int]) -> Tensor:
        """The tensor of a block, given its place and how many there are.

        Raises:
            UserError: there are not two parents.
        """
        if len(tensors) != 2:
            raise UserError(f"tleg was given {len(tensors)} models; it takes two, which hold A and B")
        place, count = block
        return tensors[0].add(tensors[1], alpha=place / count)
