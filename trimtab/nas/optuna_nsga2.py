"""Optuna's NSGA-II, as a searcher to compare with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Identity, Known
from trimtab.parts.studies import Study, library


@dataclass(frozen=True)
class OptunaNSGA2(Searcher):
    """Generations: of parents and children the best by rank and crowding become parents, whose children are crossed
    and mutated.

        P_{t+1} = first `size` of P_t and Q_t by (rank, -crowding),   Q_{t+1} = children of P_{t+1}

    Fields:
        size: of a generation.
        cross: share of children with two parents.

    Args of `ask`:
        identity: candidates that compute the same function count as evaluated.

    Reference: Deb et al. 2002, IEEE TEVC 6(2), sections III and VI.
    Departures: Optuna's own, version 5 or newer, from the extra `search`, in which all whole trials are gone through
        again at each ask, in the order of the journal, so that generations are the same. What it repeats is asked for
        again.

    >>> OptunaNSGA2(size=20).config()
    {'size': 20}
    """

    size: int = 50
    cross: float = 0.9

    card = Card(
        "optuna-nsga2",
        paper="10.1109/4235.996017",
        claim="The peer with generations, from Optuna.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, identity: Identity | None = None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: Optuna is not installed, or a field makes no sense.
        """
        if self.size < 2 or not 0 <= self.cross <= 1:
            raise UserError(
                f"optuna-nsga2 was asked for size={self.size}, cross={self.cross}; size starts at 2, cross is in 0..1"
            )
        optuna, seed = library("optuna"), rng.randrange(2**31)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, of what is experimental there
            sampler = optuna.samplers.NSGAIISampler(population_size=self.size, crossover_prob=self.cross, seed=seed)
            return Study(hunt, sampler).ask(Known(hunt, identity), count, lambda: hunt.domain.random(rng))
