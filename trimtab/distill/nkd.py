"""NKD: what a teacher says of the target class and of the others apart, each side of the others summing to 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Objective
from trimtab.parts.soft_targets import others


@dataclass(frozen=True)
class NKD(Objective):
    """L = CE(S, t) - T_t log S_t - g L^2 sum_{i != t} N(T_i) log N(S_i), with N the softmax over the classes but t.

    T and S are the teacher's and the student's probabilities, t is the label, and L the temperature of the N alone.

    Args:
        gamma: g, the weight of the other classes (paper: 1.5).
        temperature: L (paper: 1).

    Reference: Yang et al. 2023, arXiv:2303.13005, section 3.1, equations 6 to 8.
    Departures: none.

    >>> import torch
    >>> student, teacher = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[9.0, 1.0, 0.0]])
    >>> round(float(NKD().loss(student, teacher, torch.tensor([0]))), 3)
    2.142
    """

    gamma: float = 1.5
    temperature: float = 1.0

    card = Card(
        "nkd",
        catalogue=(280,),
        paper="arXiv:2303.13005",
        claim="A small network distilled with the normalised loss is at least as accurate as with KD, and more than "
        "with labels alone.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"head"}),
    )

    def loss(self, student: Tensor, teacher: Tensor | None, batch: Any) -> Tensor:
        """The mean loss of logits `[n, classes]` and labels `[n]`.

        Raises:
            UserError: there is no teacher, or a field makes no sense.
        """
        if teacher is None or self.temperature <= 0:
            raise UserError(
                f"nkd was asked for temperature={self.temperature} and a teacher of type {type(teacher).__name__}; it "
                "takes a temperature above 0, and a teacher's logits"
            )
        teacher, labels = teacher.detach(), batch[:, None]
        log_s = functional.log_softmax(student, 1).gather(1, labels)
        target = -(functional.softmax(teacher, 1).gather(1, labels) * log_s).mean()
        rest, known = (others(logits, batch) / self.temperature for logits in (student, teacher))
        apart = -(functional.softmax(known, 1) * functional.log_softmax(rest, 1)).sum(1).mean()
        return target - log_s.mean() + self.gamma * self.temperature**2 * apart
