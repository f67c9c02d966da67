"""Online speculative decoding: the draft learns from the target's corrections while it serves."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Objective


@dataclass(frozen=True)
class OSD(Objective):
    """The mean over corrected positions of KL(p || q), KL(q || p) or JSD(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with
    m = (p + q) / 2; p is the target's distribution there, q the draft's.

    Positions at which the target refused what the draft proposed are kept with the target's logits, and thrown away
    once they are learned from; after every `interval` texts the draft that runs takes over what was learned.
    `engine.learning.Learner` does that.

    Args:
        divergence: `forward`, `reverse` or `jsd`; the paper compares them.
        interval: texts from one update to the next (the authors' scripts: 1).
        rate: of AdamW (the authors' scripts: 1e-5, for all weights of a draft of 160 million parameters; factors take
            more).

    Reference: Liu et al. 2023, arXiv:2310.07177, section 4, algorithm 1.
    Departures: low-rank factors beside the draft's linears are trained, the paper trains all weights; a step for each
        text, where the paper takes one for the texts of an interval together; the buffer is bounded in bytes; one draft
        for all prompts, where the paper also routes to one of several by topic.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    >>> float(OSD().loss(logits, logits, None))
    0.0
    """

    divergence: str = "forward"
    interval: int = 1
    rate: float = 1e-5

    card = Card(
        "osd",
        catalogue=(348,),
        paper="arXiv:2310.07177",
        claim="A draft that learns from its corrections is accepted more often than a frozen one, and again so some "
        "prompts after their topic changes; what is written stays the same.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"head"}),
    )

    def loss(self, student: Tensor, teacher: Tensor | None, batch: Any) -> Tensor:
        """The mean of logits `[positions, vocabulary]`; the batch is not looked at.

        Raises:
            UserError: there is no teacher, or no divergence of that name.
        """
        if teacher is None or self.divergence not in ("forward", "reverse", "jsd"):
            raise UserError(
                f"osd was asked for the divergence {self.divergence!r} and a teacher of type {type(teacher).__name__}; "
                "it takes forward, reverse or jsd, and a teacher's logits"
            )
        p, q = functional.log_softmax(teacher.detach(), 1), functional.log_softmax(student, 1)
        if self.divergence == "forward":
            return _kl(p, q)
        if self.divergence == "reverse":
            return _kl(q, p)
        m = torch.logaddexp(p, q) - log(2)
        return (_kl(p, m) + _kl(q, m)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)
