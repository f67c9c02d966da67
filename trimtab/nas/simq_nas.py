"""SimQ-NAS: the shape of a network and the bits of its layers are searched for at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher, Trial
from trimtab.parts.breeding import Known, bred
from trimtab.parts.foreseeing import Foresight
from trimtab.parts.fronts import front, table

Price = Callable[[list[Genome]], Mapping[str, NDArray[np.float64]]]


@dataclass(frozen=True)
class SimQNAS(Searcher):
    """Knobs of shape and knobs of levels in one genome, evolved on predictors that few evaluations teach.

    With `joint=False`, for comparison, one after the other: for the first `shapes` evaluations every level stays at its
    last option; then levels alone are searched for, on the shapes of the front that was found.

    Fields:
        first: random genomes before the predictors are first fitted.
        joint: both at once.
        shapes: evaluations of shapes alone where it is not joint.
        size, rounds: of the evolution on the predictors.

    Args of `ask`:
        price: exact costs, which are then not predicted.

    Reference: Nandakumar et al. 2023, arXiv:2312.13301, sections 3.1 (joint space) and 3.2 (predictors and LINAS).
    Departures: a Gaussian process in place of their regressions, proposals by expected gain; levels are of this
        project's methods.

    >>> from trimtab.core.knob import Domain, Knob
    >>> domain = Domain((Knob("width", (8, 16), "width"), Knob("bits", ("2b/g64", "8b/g64"), "level")))
    >>> sorted(SimQNAS(joint=False).ask(Hunt(domain), 4, rng=Random(0)))
    [(0, 1), (1, 1)]
    """

    first: int = 12
    joint: bool = True
    shapes: int = 30
    size: int = 60
    rounds: int = 6

    card = Card(
        "simq-nas",
        catalogue=(137,),
        paper="arXiv:2312.13301",
        claim="Shape and bits at once cover more of the front than one after the other, or than shapes at 8 bits.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, price: Price | None = None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: a field makes no sense.
        """
        if min(self.first, self.size) < 2 or min(self.shapes, self.rounds) < 1:
            raise UserError(
                f"simq-nas was asked for first={self.first}, shapes={self.shapes}, size={self.size}, "
                f"rounds={self.rounds}; first and size start at 2, shapes and rounds at 1"
            )
        known = Known(hunt)
        whole = [trial for trial in hunt.trials if trial.effort >= 1]
        held = (lambda genome: genome) if self.joint else self._holding(hunt, whole)

        def draw() -> Genome:
            return held(hunt.domain.random(rng))

        chosen: list[Genome] = []
        if len(whole) >= self.first:
            seen = Foresight.of(hunt, whole, price)
            pool = bred(hunt.domain, [trial.genome for trial in seen.trials], seen.costs, rng, self.size, self.rounds)
            fresh = [genome for genome in dict.fromkeys(map(held, pool)) if genome not in known]
            chosen = seen.best(fresh, count, known)
        chosen += (
            known.taken(draw, count - len(chosen)) if self.joint else self._drawn(draw, count - len(chosen), known)
        )
        return chosen or known.taken(lambda: hunt.domain.random(rng), count)

    @staticmethod
    def _drawn(draw: Callable[[], Genome], count: int, known: Known) -> list[Genome]:
        found: list[Genome] = []
        for _ in range(60 * count):
            genome = draw()
            if len(found) < count and genome not in known:
                known.add(genome)
                found.append(genome)
        return found

    def _holding(self, hunt: Hunt, whole: list[Trial]) -> Callable[[Genome], Genome]:
        """What the present phase lets a genome be: the levels at their last option, or the shape one of the front's."""
        domain = hunt.domain
        levels = {i for i, knob in enumerate(domain.knobs) if knob.kind == "level"}
        full = {i: len(domain.knobs[i].options) - 1 for i in levels}
        plain = [t for t in whole if domain.canonical(_put(t.genome, full)) == t.genome]
        if len(plain) < self.shapes and len(hunt.trials) <= self.shapes:
            return lambda genome: domain.canonical(_put(genome, full))
        found = [plain[i].genome for i in front(table(plain, hunt.objectives))]

        def nearest(genome: Genome) -> Genome:
            shapes = [
                sum(a != b for i, (a, b) in enumerate(zip(genome, g, strict=True)) if i not in levels) for g in found
            ]
            return domain.canonical(_put(found[shapes.index(min(shapes))], {i: genome[i] for i in levels}))

        return nearest


def _put(genome: Genome, places: Mapping[int, int]) -> Genome:
    return tuple(places.get(i, place) for i, place in enumerate(genome))
