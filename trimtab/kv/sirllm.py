"""SirLLM: a cache of constant size that keeps the tokens that surprised the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Policy, Remembered


@dataclass(frozen=True)
class SirLLM(Policy):
    """Keep the first tokens, and of the others those of the largest decayed entropy e_i = -eta^age_i log p(x_i | x_<i).

    When a window of tokens has been read, the cache goes back to `start` + `memory` + `recent` tokens, the same ones in
    all layers: the first `start`, the newest `recent`, and the `memory` others of the largest e_i. So it never holds
    more than that and a window. A token takes the position of its place in the cache, and a text can go on for ever.

    Args:
        start: first tokens that always stay, the sinks of attention (paper: 4).
        memory: tokens that stay by their entropy (paper: 1,020, and 508 for dialogues).
        recent: newest tokens that stay (paper: 0, for what is newest is not forgotten within its round).
        decay: eta, by which entropies shrink with every round, here a window (paper: 1, 0.9 and 0.7 by the task).
        residual: tokens of a window, which are read before any is forgotten.

    Raises:
        UserError: a number below 0, or nothing that stays.

    Reference: Yao et al. 2024, arXiv:2405.12528, sections 3.2 and 3.3; defaults of the authors' code.
    Departures: a round is a window of so many tokens, where the paper's is a turn of a dialogue.

    >>> view = Remembered(torch.tensor([[1.0, 0.1, 5.0, 0.2, 2.0, 0.3]]), torch.tensor([[1, 1, 1, 0, 0, 0]]))
    >>> SirLLM(start=1, memory=2, recent=1).decide(view), SirLLM(start=1, memory=2, recent=1, decay=0.01).decide(view)
    (tensor([[0, 2, 4, 5]]), tensor([[0, 3, 4, 5]]))
    """

    start: int = 4
    memory: int = 1020
    recent: int = 0
    decay: float = 1.0
    residual: int = 128

    card = Card(
        "sirllm",
        catalogue=(293,),
        paper="arXiv:2405.12528",
        claim="In a stream far longer than the cache, facts are recalled better from a cache that keeps the tokens of "
        "highest entropy than from one of equal bytes that keeps the newest.",
        requires=frozenset({"float"}),
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"kv"}),
    )

    def decide(self, view: Remembered) -> Tensor:
        """Places of the tokens that stay, ascending, `[texts, tokens]`."""
        parts = {"start": self.start, "memory": self.memory, "recent": self.recent}
        if min(parts.values()) < 0 or not sum(parts.values()) or not 0 <= self.decay <= 1:
            said = ", ".join(f"{name}={value}" for name, value in parts.items())
            raise UserError(
                f"sirllm was given {said} and decay={self.decay}; numbers of tokens are at least 0 and one of them "
                "more, and the decay is from 0 to 1"
            )
        count = view.surprise.shape[-1]
        score = view.surprise.double() * self.decay ** view.age.double()
        score[:, : self.start] = torch.inf
        score[:, count - min(self.recent, count) :] = torch.inf
        stay = min(count, sum(parts.values()))
        return score.argsort(dim=-1, descending=True, stable=True)[:, :stay].sort(dim=-1).values
