"""pymoo's NSGA-II, as a searcher to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher, Trial
from trimtab.parts.breeding import Identity, Known
from trimtab.parts.fronts import table
from trimtab.parts.studies import broken, library


@dataclass(frozen=True)
class PymooNSGA2(Searcher):
    """Generations: of parents and children the best by rank and crowding become parents, whose children are crossed
    and mutated.

        P_{t+1} = first `size` of P_t and Q_t by (rank, -crowding),   Q_{t+1} = children of P_{t+1}

    Fields:
        size: of a generation.

    Args of `ask`:
        identity: candidates that compute the same function count as evaluated.

    Reference: Deb et al. 2002, IEEE TEVC 6(2), sections III and VI; Blank and Deb 2020, IEEE Access 8, for pymoo.
    Departures: pymoo's own genetic algorithm for mixed variables with the survival of NSGA-II, from the extra `search`;
        at each ask its survival goes through the generations of the journal again, and it breeds from what is left.

    >>> PymooNSGA2(size=40).config()
    {'size': 40}
    """

    size: int = 20

    card = Card(
        "pymoo-nsga2",
        paper="10.1109/ACCESS.2020.2990567",
        claim="The peer with generations, from pymoo.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, identity: Identity | None = None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: pymoo is not installed, or a field makes no sense.
        """
        if self.size < 2:
            raise UserError(f"pymoo-nsga2 was asked for size={self.size}; it starts at 2")
        mixed = library("pymoo", "core.mixed")
        domain, known = hunt.domain, Known(hunt, identity)
        whole = [trial for trial in hunt.trials if trial.effort >= 1]
        seed = rng.randrange(2**31)
        if len(whole) < self.size:
            return known.taken(lambda: domain.random(rng), count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            survival = library("pymoo", "algorithms.moo.nsga2").RankAndCrowdingSurvival()
            algorithm = mixed.MixedVariableGA(pop_size=self.size, survival=survival)
            algorithm.setup(problem(hunt), termination=("n_gen", len(whole) + count + 1000), seed=seed)
            algorithm.ask()  # a first generation of its own, which those of the journal replace
            for i in range(0, len(whole) - self.size + 1, self.size):
                algorithm.tell(infills=population(hunt, whole[i : i + self.size]))
            born = children(hunt, algorithm)
            return known.taken(lambda: next(born, None) or domain.random(rng), count)


def problem(hunt: Hunt) -> Any:
    """What pymoo is to solve: knobs as choices, or as whole numbers where they are ordered."""
    variables = library("pymoo", "core.variable")
    knobs = {
        knob.name: variables.Integer(bounds=(0, len(knob.options) - 1))
        if knob.ordered
        else variables.Choice(options=list(range(len(knob.options))))
        for knob in hunt.domain.knobs
    }
    kind = library("pymoo", "core.problem").Problem
    return kind(vars=knobs, n_obj=len(hunt.objectives), n_ieq_constr=len(hunt.limits))


def population(hunt: Hunt, trials: list[Trial]) -> Any:
    """Trials as pymoo has them."""
    names = [knob.name for knob in hunt.domain.knobs]
    rows = [dict(zip(names, trial.genome, strict=True)) for trial in trials]
    over = np.array([list(broken(hunt, trial).values()) for trial in trials]).reshape(len(trials), -1)
    new = library("pymoo", "core.population").Population.new
    return new(X=rows, F=table(trials, hunt.objectives), G=over)


def children(hunt: Hunt, algorithm: Any) -> Iterator[Genome]:
    """Genomes that pymoo breeds, generation by generation of the same parents."""
    while (born := algorithm.ask()) is not None:
        for one in born:
            yield hunt.domain.canonical(int(one.X[knob.name]) for knob in hunt.domain.knobs)
