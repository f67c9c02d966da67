"""Making genomes that are not there yet: even first designs, tournaments, children, and a search on predictors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from trimtab.core.knob import Domain, Genome
from trimtab.core.method import Hunt
from trimtab.parts.fronts import crowding, ranks

Array = NDArray[np.float64]
Identity = Callable[[Genome], str]
TRIES = 60


class Known:
    """What was evaluated or is being evaluated, told apart by genome or by what a genome computes."""

    def __init__(self, hunt: Hunt, identity: Identity | None = None) -> None:
        self._domain, self._identity = hunt.domain, identity
        self.genomes = {trial.genome for trial in hunt.trials} | set(hunt.pending)
        self._texts = {identity(genome) for genome in self.genomes} if identity else set()
        self._total: int | None = None

    def __contains__(self, genome: Genome) -> bool:
        return genome in self.genomes or (self._identity is not None and self._identity(genome) in self._texts)

    def add(self, genome: Genome) -> None:
        self.genomes.add(genome)
        if self._identity:
            self._texts.add(self._identity(genome))

    @property
    def exhausted(self) -> bool:
        """Whether the domain holds no other genome."""
        if self._total is None:
            self._total = self._domain.count()
        return len(self.genomes) >= self._total

    def taken(self, make: Callable[[], Genome], count: int) -> list[Genome]:
        """At most `count` genomes that are new, each then known; from a domain nearly used up the rest are looked for
        one by one.
        """
        found: list[Genome] = []
        failed = 0
        while len(found) < count and failed < TRIES and not self.exhausted:
            genome = make()
            if genome in self:
                failed += 1
                continue
            failed = 0
            self.add(genome)
            found.append(genome)
        if len(found) < count and not self.exhausted and self._domain.count() <= 100 * (len(self.genomes) + TRIES):
            for genome in every(self._domain):
                if len(found) == count:
                    break
                if genome not in self:
                    self.add(genome)
                    found.append(genome)
        return found


def every(domain: Domain) -> Iterable[Genome]:
    """Each network of a domain once, in order.

    >>> from trimtab.core.knob import Knob
    >>> list(every(Domain((Knob("a", (1, 2)), Knob("b", (1, 2), when=(("a", frozenset({1})),))))))
    [(0, 0), (1, 0), (1, 1)]
    """

    def grown(start: Genome) -> Iterable[Genome]:
        i = len(start)
        if i == len(domain.knobs):
            yield start
            return
        idle = not domain.active((*start, *(0,) * (len(domain.knobs) - i)))[i]
        for place in range(1 if idle else len(domain.knobs[i].options)):
            yield from grown((*start, place))

    return grown(())


def design(domain: Domain, count: int, rng: Random) -> list[Genome]:
    """First genomes in which each knob takes its options about equally often, in an order of its own."""
    columns = []
    for knob in domain.knobs:
        n = len(knob.options)
        column = [i % n for i in range(count - count % n)] + rng.sample(range(n), count % n)
        rng.shuffle(column)
        columns.append(column)
    return [domain.canonical(places) for places in zip(*columns, strict=True)]


def tournament(place: Sequence[int], room: Sequence[float], rng: Random, size: int = 2) -> int:
    """The best of a few drawn at random: of the lower front, then where it is less crowded."""
    drawn = [rng.randrange(len(place)) for _ in range(size)]
    return min(drawn, key=lambda i: (place[i], -room[i]))


def child(domain: Domain, one: Genome, other: Genome, rng: Random, rate: float, cross: float) -> Genome:
    """A child of two parents: crossed with probability `cross`, then mutated."""
    mixed = domain.crossed(one, other, rng) if rng.random() < cross else one
    return domain.mutated(mixed, rng, rate)


def survivors(points: Array, over: Array, keep: int) -> NDArray[np.intp]:
    """Indices of the best by front, and of the last front those where it is less crowded."""
    place = ranks(points, over)
    room = np.zeros(len(points))
    for front in range(int(place.max()) + 1):
        room[place == front] = crowding(points[place == front])
    return np.lexsort((-room, place))[:keep]


def bred(
    domain: Domain,
    start: Sequence[Genome],
    costs: Callable[[list[Genome]], tuple[Array, Array]],
    rng: Random,
    size: int = 100,
    rounds: int = 8,
) -> list[Genome]:
    """Every genome that an evolution on predictors came by, the start among them.

    Args:
        costs: of genomes what is to be small `[genomes, objectives]`, and by how much they break limits `[genomes]`.
    """
    pool = dict.fromkeys(start)
    pool |= dict.fromkeys(domain.random(rng) for _ in range(max(0, size - len(pool))))
    genomes = list(pool)
    points, over = costs(genomes)
    for _ in range(rounds):
        kept = survivors(points, over, size)
        genomes, points, over = [genomes[i] for i in kept], points[kept], over[kept]
        place = list(range(len(genomes)))  # they are in order
        fresh: dict[Genome, None] = {}
        for _ in range(2 * size):
            one, other = (tournament(place, place, rng) for _ in range(2))
            made = child(domain, genomes[one], genomes[other], rng, 1 / len(domain.knobs), 0.5)
            if made not in pool:
                fresh[made] = None
            if len(fresh) == size:
                break
        if not fresh:
            break
        pool |= fresh
        more = costs(list(fresh))
        genomes += list(fresh)
        points, over = np.vstack([points, more[0]]), np.concatenate([over, more[1]])
    return list(pool)
