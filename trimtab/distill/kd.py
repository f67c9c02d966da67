"""KD: a student learns the labels and a teacher's softened outputs; the baseline of distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Objective


@dataclass(frozen=True)
class KD(Objective):
    """L = (1 - a) CE(q, label) + a T^2 KL(p_T || q_T), with p_T and q_T the softmax of the logits over T.

    Args:
        weight: a, from 0 to 1; at 1 labels are not looked at.
        temperature: T.

    Reference: Hinton et al. 2015, arXiv:1503.02531, section 2.
    Departures: none.

    >>> import torch
    >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> float(KD(weight=1.0).loss(logits, logits, labels))
    0.0
    """

    weight: float = 0.9
    temperature: float = 4.0

    card = Card(
        "kd",
        paper="arXiv:1503.02531",
        claim="The baseline: a student that learns a teacher's outputs beats one that learns labels alone.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"head"}),
    )

    def loss(self, student: Tensor, teacher: Tensor | None, batch: Any) -> Tensor:
        """The mean loss of logits `[n, classes]` and labels `[n]`.

        Raises:
            UserError: there is no teacher, or a field makes no sense.
        """
        if teacher is None or not 0 <= self.weight <= 1 or self.temperature <= 0:
            raise UserError(
                f"kd was asked for weight={self.weight}, temperature={self.temperature} and a teacher of type "
                f"{type(teacher).__name__}; it takes a weight in 0..1, a temperature above 0, and a teacher's logits"
            )
        p, q = (functional.log_softmax(logits / self.temperature, 1) for logits in (teacher.detach(), student))
        soft = self.temperature**2 * functional.kl_div(q, p, reduction="batchmean", log_target=True)
        if self.weight == 1:
            return soft
        return (1 - self.weight) * functional.cross_entropy(student, batch) + self.weight * soft
