"""Evolution over whole fronts, without predictors: what a searcher with predictors is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Identity, Known, child, design, survivors, tournament
from trimtab.parts.fronts import excess, table


@dataclass(frozen=True)
class Evolution(Searcher):
    """Parents by constraint domination and crowding among all that was evaluated; children by crossing and mutation;
    nothing is evaluated twice.

    rank(g) = place of its front; g wins a tournament by (rank, -crowding); a child takes each knob from one of two
    parents with probability `cross`, and then each knob anew with probability `rate` / knobs, at least one of them.

    Fields:
        first: genomes of the first design, in which each knob takes its options equally often.
        parents: how many of the best breed.
        size: of a tournament.
        cross: share of children with two parents.
        rate: expected number of knobs that are drawn anew.

    Args of `ask`:
        identity: candidates that compute the same function count as evaluated.

    Reference: Deb et al. 2002, IEEE TEVC 6(2), sections III and VI: ranks, crowding, constraint domination.
    Departures: no generations: each child is bred from all trials so far, so that a journal is the whole state and
        many processes may breed at once; duplicates are rejected; the first genomes are spread evenly.

    >>> from trimtab.core.knob import Domain, Knob
    >>> len(Evolution().ask(Hunt(Domain(tuple(Knob(f"k{i}", (1, 2, 3)) for i in range(4)))), 10, rng=Random(0)))
    10
    """

    first: int = 20
    parents: int = 24
    size: int = 2
    cross: float = 0.5
    rate: float = 1.0

    card = Card(
        "evolution",
        paper="10.1109/4235.996017",
        claim="The baseline without predictors: more of the front than random search at equal evaluations.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, identity: Identity | None = None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: a field makes no sense.
        """
        if min(self.first, self.parents, self.size) < 1 or not 0 <= self.cross <= 1 or self.rate < 0:
            raise UserError(
                f"evolution was asked for first={self.first}, parents={self.parents}, size={self.size}, "
                f"cross={self.cross}, rate={self.rate}; whole numbers start at 1, cross is in 0..1, rate is at least 0"
            )
        domain, known = hunt.domain, Known(hunt, identity)
        begun = iter(design(domain, self.first, Random(hunt.seed)))
        if len(known.genomes) < self.first or not hunt.trials:
            return known.taken(lambda: next(begun, None) or domain.random(rng), count)
        trials = hunt.trials
        points = table(trials, hunt.objectives)
        over = excess({name: table(trials, (name,))[:, 0] for name in hunt.limits}, hunt.limits)
        kept = survivors(points, over, self.parents)
        places = range(len(kept))  # they are in order

        def breed() -> Genome:
            one, other = (kept[tournament(places, places, rng, self.size)] for _ in range(2))
            rate = self.rate / len(domain.knobs)
            return child(domain, trials[one].genome, trials[other].genome, rng, rate, self.cross)

        return known.taken(breed, count)
