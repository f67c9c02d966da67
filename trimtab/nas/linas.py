"""Hardware-aware search with predictors that are fitted again after every few evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Identity, Known, bred, design
from trimtab.parts.foreseeing import Foresight

Price = Callable[[list[Genome]], Mapping[str, NDArray[np.float64]]]


@dataclass(frozen=True)
class LINAS(Searcher):
    """Fit a predictor of each value to what was evaluated, evolve genomes on the predictors, evaluate the best; repeat.

    The best are taken one by one by their expected gain of dominated volume,

        g* = argmax over the pool of  P(g meets the limits) E[volume(front + y(g)) - volume(front)]

    with y(g) as the predictors are unsure of it; the next is taken as though g* had come out at its middle. With one
    objective this is expected improvement.

    Fields:
        first: genomes of the first design, in which each knob takes its options equally often.
        most: trials that the predictors are fitted to, the best ones.
        size: of a generation on the predictors. rounds: of them.
        beyond: how far the corner of the volume lies behind the worst values, in shares of their range.

    Args of `ask`:
        price: what it gives is taken as exact and not predicted; a hunt whose costs have a price predicts the error
            alone. identity: candidates that compute the same function count as evaluated.

    Reference: Cummings et al. 2022, arXiv:2202.12954, section 3 (LINAS); their code fits predictors to all that was
        measured, evolves a population on them with NSGA-II, measures that population, and repeats.
    Departures: a Gaussian process over knobs in place of ridge or support-vector regression; proposals are few, by
        expected gain of volume, in place of a whole final population.

    >>> from trimtab.core.knob import Domain, Knob
    >>> from trimtab.core.method import Trial
    >>> domain = Domain(tuple(Knob(f"k{i}", (0, 1, 2)) for i in range(3)))
    >>> tried = [genome for genome in (domain.random(Random(i)) for i in range(20)) if sum(genome) > 1]
    >>> hunt = Hunt(domain, tuple(Trial(g, {"error": float(sum(g))}) for g in tried))
    >>> (0, 0, 0) in LINAS().ask(hunt, 3, rng=Random(0))
    True
    """

    first: int = 12
    most: int = 300
    size: int = 100
    rounds: int = 8
    beyond: float = 0.5

    card = Card(
        "linas",
        catalogue=(91,),
        paper="arXiv:2202.12954",
        claim="A set share of the front's volume with far fewer evaluations than random search and evolution.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(
        self, hunt: Hunt, count: int, *, rng: Random, price: Price | None = None, identity: Identity | None = None
    ) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: a field makes no sense.
        """
        if min(self.first, self.most) < 2 or min(self.size, self.rounds) < 1 or self.beyond < 0:
            raise UserError(
                f"linas was asked for first={self.first}, most={self.most}, size={self.size}, rounds={self.rounds}, "
                f"beyond={self.beyond}; first and most start at 2, size and rounds at 1, beyond is not negative"
            )
        domain, known = hunt.domain, Known(hunt, identity)
        whole = [trial for trial in hunt.trials if trial.effort >= 1]
        begun = iter(design(domain, self.first, Random(hunt.seed)))
        if len(known.genomes) < self.first or len(whole) < 2:
            return known.taken(lambda: next(begun, None) or domain.random(rng), count)
        seen = Foresight.of(hunt, whole, price, self.most, self.beyond)
        pool = bred(domain, [t.genome for t in seen.trials], seen.costs, rng, self.size, self.rounds)
        chosen = seen.best([genome for genome in pool if genome not in known], count, known)
        return chosen + known.taken(lambda: domain.random(rng), count - len(chosen))
