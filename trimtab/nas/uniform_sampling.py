"""One sub-network a step, drawn evenly: weight sharing at its plainest."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.knob import Domain, Offered
from trimtab.core.method import Card, Elastic, Lesson, Pupil


@dataclass(frozen=True)
class UniformSampling(Elastic):
    """Each step trains one network, every choice drawn evenly, on labels.

    Reference: Guo et al. 2020, arXiv:1904.00420, section 3.2, uniform sampling.
    Departures: none.

    >>> from trimtab.core.knob import Knob
    >>> domain = Domain((Knob("width", (8, 16), "width"),))
    >>> len(UniformSampling().teach(Lesson(domain, UniformSampling().offer(domain), 0, 10), Random(0)))
    1
    """

    card = Card(
        "uniform-sampling",
        paper="arXiv:1904.00420",
        claim="The baseline: sub-networks share weights, and learn from labels alone.",
        keeps=frozenset({"extract", "deterministic"}),
    )

    def offer(self, domain: Domain) -> Offered:
        """All choices."""
        return {knob.name: range(len(knob.options)) for knob in domain.knobs}

    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        return (Pupil(lesson.domain.random(rng, lesson.offered)),)
