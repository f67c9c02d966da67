"""TinyViT's fast distillation: a teacher runs once, and its largest outputs are kept for every later pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Objective
from trimtab.parts.soft_targets import largest, spread_out


@dataclass(frozen=True)
class TinyViT(Objective):
    """L = - sum_i p_i log q_i, p being the teacher's k largest probabilities and equal shares of what they leave of 1.

    The targets are the same whether the teacher runs beside the student or `parts.soft_targets.Kept` holds what it
    said: k probabilities and classes of 16 bits an item, and the seed of the item's augmentation. Labels are not looked
    at.

    Args:
        k: how many are kept (paper: 10 of 1,000 classes, 100 of 21,841).

    Reference: Wu et al. 2022, arXiv:2207.10666, section 3.1, equations 1 to 3.
    Departures: the loss alone, and the store; the paper's family of networks is not here.

    >>> import torch
    >>> student, teacher = torch.zeros(1, 4), torch.tensor([[9.0, 1.0, 0.0, 0.0]])
    >>> round(float(TinyViT(k=1).loss(student, teacher, torch.tensor([0]))), 3)
    1.386
    """

    k: int = 10

    card = Card(
        "tinyvit",
        catalogue=(269,),
        paper="arXiv:2207.10666",
        claim="A student of stored sparse outputs matches one whose teacher runs beside it.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"head"}),
    )

    def loss(self, student: Tensor, teacher: Tensor | None, batch: Any) -> Tensor:
        """The mean loss of logits `[n, classes]`.

        Raises:
            UserError: there is no teacher, or there are fewer than k classes.
        """
        if teacher is None:
            raise UserError("tinyvit was asked for without a teacher; give it what one said, kept or fresh")
        values, places = largest(teacher.detach().softmax(1), self.k)
        soft = spread_out(values, places, teacher.shape[1])
        return -(soft * functional.log_softmax(student, 1)).sum(1).mean()
