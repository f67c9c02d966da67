"""Evolution that tells candidates apart by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Identity, Known
from trimtab.parts.fronts import excess, ranks, table


@dataclass(frozen=True)
class FunctionalHash(Searcher):
    """Regularised evolution in which a candidate whose function is known takes the known score and is not trained.

    h(g) = hash(round(f_g(x))) on canonical inputs x; score(g) = cache[h(g)] where it is there. The population is the
    last `population` trials; the best of `sample` of them has a mutated child. A child with a known function joins
    the population at no cost (the driver copies the values), so that the walk through equal candidates goes on.

    Fields:
        population: how many of the last trials may breed.
        sample: how many are drawn for a tournament.

    Args of `ask`:
        identity: h; the driver keeps the cache. Without it this is regularised evolution.

    Reference: Gillard et al. 2023, arXiv:2302.05433, section 3 (functional equivalence caching), in the regularised
        evolution of Real et al. 2019, arXiv:1802.01548.
    Departures: a hash is checked against all earlier trials, and none is forgotten.

    >>> from trimtab.core.knob import Domain, Knob
    >>> domain = Domain(tuple(Knob(f"k{i}", (1, 2)) for i in range(5)))
    >>> len(FunctionalHash().ask(Hunt(domain), 3, rng=Random(0), identity=str))
    3
    """

    population: int = 30
    sample: int = 8

    card = Card(
        "functional-hash",
        catalogue=(185,),
        paper="arXiv:2302.05433",
        claim="The same best score with fewer trainings; equivalent candidates share a hash and others do not.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, identity: Identity | None = None) -> list[Genome]:
        """At most `count` new genomes; their functions may be known.

        Raises:
            UserError: a field makes no sense.
        """
        if min(self.population, self.sample) < 1:
            raise UserError(
                f"functional-hash was asked for population={self.population}, sample={self.sample}; both start at 1"
            )
        domain, known = hunt.domain, Known(hunt)
        if len(known.genomes) < self.population or not hunt.trials:
            return known.taken(lambda: domain.random(rng), count)
        last = hunt.trials[-self.population :]
        over = excess({name: table(last, (name,))[:, 0] for name in hunt.limits}, hunt.limits)
        place = ranks(table(last, hunt.objectives), over)
        breed: Callable[[], Genome] = lambda: domain.mutated(  # noqa: E731
            last[min(rng.sample(range(len(last)), min(self.sample, len(last))), key=lambda i: place[i])].genome,
            rng,
            0.0,
        )
        return known.taken(breed, count)
