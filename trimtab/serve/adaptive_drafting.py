"""Drafting that follows the acceptance rate: as many tokens are proposed as promise the most text for the time."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Drafter
from trimtab.core.view import Drafting


@dataclass(frozen=True)
class AdaptiveDrafting(Drafter):
    """The gamma with the largest (1 - alpha^(gamma + 1)) / ((1 - alpha) (gamma c + 1)), alpha as it was lately.

    alpha is estimated from the text's last steps, as the accepted tokens over those that the target looked at (in a
    step that corrects one, the accepted ones and that one), beside `weight` tokens of which the share `prior` is
    accepted.

    Args:
        most: largest gamma.
        cost: c, of one more proposed token as a share of a step of the target; None: the draft's step alone, as the
            view has it.
        prior, weight: what alpha is before anything is known, and how many tokens that counts for.
        last: steps that are looked at.

    Reference: Leviathan et al. 2023, arXiv:2211.17192, section 3.5, with the improvement of theorem 3.8.
    Departures: the paper finds alpha once, on texts measured before. Where nothing is worth proposing, old steps leave
        those that are looked at, and it is tried again.

    >>> AdaptiveDrafting().decide(Drafting(10)), AdaptiveDrafting().decide(Drafting(10, ((4, 0),) * 32))
    (4, 0)
    """

    most: int = 8
    cost: float | None = None
    prior: float = 0.7
    weight: float = 4.0
    last: int = 32

    card = Card(
        "adaptive-drafting",
        paper="arXiv:2211.17192",
        claim="Fewer tokens are thrown away than with a fixed number, for as many tokens a step.",
        keeps=frozenset({"exact", "deterministic"}),
    )

    def decide(self, view: Drafting) -> int:
        """How many tokens to propose."""
        cost = view.cost if self.cost is None else self.cost
        if self.most < 0 or self.last < 1 or not 0 < self.prior < 1 or self.weight <= 0 or cost < 0:
            raise UserError(
                f"adaptive-drafting was asked for most={self.most}, last={self.last}, prior={self.prior}, "
                f"weight={self.weight} and a cost of {cost}; it takes most and cost from 0, last from 1, a prior "
                "between 0 and 1, and a weight above 0"
            )
        past = view.past[-self.last :]
        accepted = sum(a for _, a in past)
        seen = sum(a + (a < d) for d, a in past)
        alpha = (accepted + self.prior * self.weight) / (seen + self.weight)
        return max(range(min(self.most, view.room) + 1), key=lambda n: (_gain(alpha, n, cost), -n))


def _gain(alpha: float, gamma: int, cost: float) -> float:
    """Tokens a step, over its time in steps without a draft."""
    return sum(alpha**i for i in range(gamma + 1)) / (gamma * cost + 1)
