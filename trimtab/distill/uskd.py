"""USKD: soft labels without a teacher, from the student's own target and from the rank of what an inner layer says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from trimtab.core.method import Card, Objective
from trimtab.parts.soft_targets import others


@dataclass(frozen=True)
class USKD(Objective):
    """L = CE(S, t) - a P_t log S_t - b sum_{i != t} Z_i log N(S_i) + mu CE(W, smoothed t).

    P_t = S_t^2 + 1 - mean(S_t^2), over the batch, is the soft target; Z is Zipf's law, 1 / rank, normalised, over the
    other classes in the order of N(W_i) + N(S_i); W are the probabilities of a weak head on an inner layer's features,
    and N is the share among the classes but t. Soft labels are constants to the gradient.

    Args:
        alpha: a, the weight of the target (paper: 1).
        beta: b, of the other classes (paper: 0.1).
        mu: of the weak head's own loss (paper: 0.005).
        smoothing: share of the weak head's label that is spread over all classes (paper: 0.1).

    Reference: Yang et al. 2023, arXiv:2303.13005, section 3.2, equations 9 to 14.
    Departures: none.

    >>> import torch
    >>> student, weak, label = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([0])
    >>> bool(USKD().loss(student, None, label, weak=weak) > functional.cross_entropy(student, label))
    True
    """

    alpha: float = 1.0
    beta: float = 0.1
    mu: float = 0.005
    smoothing: float = 0.1

    card = Card(
        "uskd",
        paper="arXiv:2303.13005",
        claim="Without a teacher, a network with soft labels of its own is more accurate than with labels alone.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"head"}),
    )

    def loss(self, student: Tensor, teacher: Tensor | None, batch: Any, *, weak: Tensor) -> Tensor:
        """The mean loss of logits `[n, classes]`, those of the weak head and labels `[n]`; no teacher is looked at."""
        labels = batch[:, None]
        log_s = functional.log_softmax(student, 1).gather(1, labels)
        squares = log_s.detach().exp().square()
        target = -((squares + 1 - squares.mean()) * log_s).mean()
        rest = others(student, batch)
        order = others(weak.detach(), batch).softmax(1) + rest.detach().softmax(1)
        rank = order.argsort(1, descending=True).argsort(1) + 1
        zipf = 1 / rank.to(student.dtype)
        zipf = zipf / zipf.sum(1, keepdim=True)
        apart = -(zipf * functional.log_softmax(rest, 1)).sum(1).mean()
        own = functional.cross_entropy(weak, batch, label_smoothing=self.smoothing)
        return self.alpha * target - log_s.mean() + self.beta * apart + self.mu * own
