"""One network of a space by itself: the yardstick of sub-networks."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.knob import Domain, Genome, Offered
from trimtab.core.method import Card, Elastic, Lesson, Pupil


@dataclass(frozen=True)
class Alone(Elastic):
    """Each step trains one network on labels, as if there were no other.

    Fields:
        genome: places of the network's options; empty: the largest.

    Reference: the usual training.
    Departures: none.

    >>> from trimtab.core.knob import Knob
    >>> Alone(genome=(1,)).offer(Domain((Knob("width", (8, 16, 24), "width"),)))
    {'width': (1,)}
    """

    genome: Genome = ()

    card = Card(
        "alone",
        claim="The yardstick: a network that shares its weights with no other.",
        keeps=frozenset({"extract", "deterministic"}),
    )

    def offer(self, domain: Domain) -> Offered:
        """The one network's options."""
        genome = domain.canonical(self.genome) if self.genome else domain.largest()
        return {knob.name: (place,) for knob, place in zip(domain.knobs, genome, strict=True)}

    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        return (Pupil(lesson.domain.largest(lesson.offered)),)
