"""ParZC: what is known of each node of an untrained network is mixed into an order, which a few trainings teach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Known
from trimtab.parts.fronts import excess, table
from trimtab.parts.neural_predictors import Mixer

Nodes = Callable[[list[Genome]], NDArray[np.float64]]


@dataclass(frozen=True)
class ParZC(Searcher):
    """Statistics of the nodes of untrained networks through a mixer with uncertain weights, trained by a smooth tau.

        score(g) = mixer(log s_1(g), ..., log s_n(g)),   loss = 1 - mean over pairs tanh(alpha (p_i - p_j)(t_i - t_j))

    Random genomes are scored, and those with the best predicted order are evaluated.

    Fields:
        first: random genomes before the mixer is first fitted.
        draws: random genomes that are scored.
        fit: `kendall` or, for comparison, `mse`.

    Args of `ask`:
        nodes: statistics `[genomes, nodes]`; the first objective is what is ordered.

    Reference: Dong et al. 2024, arXiv:2402.02105, sections 3.2 (mixer with Bayesian network) and 3.3 (DiffKendall).
    Departures: one mixing layer with Gaussian weights beside a linear one; networks of a cell's edges as nodes.

    >>> from trimtab.core.knob import Domain, Knob
    >>> domain = Domain(tuple(Knob(f"k{i}", (1, 2, 3)) for i in range(4)))
    >>> len(ParZC().ask(Hunt(domain), 4, rng=Random(0), nodes=lambda genomes: np.array(genomes, float)))
    4
    """

    first: int = 20
    draws: int = 100
    fit: Literal["kendall", "mse"] = "kendall"

    card = Card(
        "parzc",
        catalogue=(123,),
        paper="arXiv:2402.02105",
        claim="A parametric proxy orders networks it has not seen better than the summed proxy.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, nodes: Nodes | None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: there are no statistics of nodes, or a field makes no sense.
        """
        if nodes is None or min(self.first, self.draws) < 2 or self.fit not in ("kendall", "mse"):
            raise UserError(
                f"parzc was asked for with first={self.first}, draws={self.draws}, fit={self.fit!r} and "
                f"{'' if nodes else 'no '}statistics of nodes; it needs these, at least 2 draws, and kendall or mse"
            )
        domain, known = hunt.domain, Known(hunt)
        whole = [trial for trial in hunt.trials if trial.effort >= 1]
        if len(whole) < self.first:
            return known.taken(lambda: domain.random(rng), count)
        over = excess({name: table(whole, (name,))[:, 0] for name in hunt.limits}, hunt.limits)
        values = table(whole, hunt.objectives[:1])[:, 0]
        place = np.lexsort((values, over if len(over) else np.zeros(len(values))))
        order = np.empty(len(place))
        order[place] = np.arange(len(place))
        mixer = Mixer(nodes([trial.genome for trial in whole]), order, self.fit, hunt.seed)
        pool = [g for g in dict.fromkeys(domain.random(rng) for _ in range(self.draws)) if g not in known]
        best = iter([pool[i] for i in np.argsort(mixer.mean(nodes(pool)))] if pool else [])
        return known.taken(lambda: next(best, None) or domain.random(rng), count)
