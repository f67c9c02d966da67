"""The sandwich rule: every step trains the largest and the smallest network, and some between."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Offered
from trimtab.core.method import Card, Elastic, Lesson, Pupil


@dataclass(frozen=True)
class Sandwich(Elastic):
    """Each step adds the gradients of the largest network, which learns from labels, of `between` networks drawn
    evenly and of the smallest, which learn from what the largest just put out (in-place distillation).

    Fields:
        between: networks between the two (paper: 2).

    Reference: Yu and Huang 2019, arXiv:1903.05134, sections 3.1 and 3.3.
    Departures: all choices are elastic, and not widths alone.

    >>> from trimtab.core.knob import Knob
    >>> domain = Domain((Knob("width", (8, 16, 24), "width"),))
    >>> lesson = Lesson(domain, Sandwich().offer(domain), 0, 10)
    >>> [(pupil.genome, pupil.teacher) for pupil in Sandwich(between=0).teach(lesson, Random(0))]
    [((2,), None), ((0,), 0)]
    """

    between: int = 2

    card = Card(
        "sandwich",
        paper="arXiv:1903.05134",
        claim="The baseline: one training for all sub-networks, from the first step on.",
        keeps=frozenset({"extract", "deterministic"}),
    )

    def offer(self, domain: Domain) -> Offered:
        """All choices."""
        return {knob.name: range(len(knob.options)) for knob in domain.knobs}

    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        if self.between < 0:
            raise UserError(f"sandwich: between={self.between} was given; 0 or more networks are trained between")
        domain, offered = lesson.domain, lesson.offered
        drawn = [domain.random(rng, offered) for _ in range(self.between)] + [domain.smallest(offered)]
        share = 1 / (1 + len(drawn))
        return Pupil(domain.largest(offered), weight=share), *(Pupil(g, 0, weight=share) for g in drawn)
