"""NetAdapt as MobileNetV3 uses it: a network is shrunk one knob at a time until it meets its limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher, Trial

Price = Callable[[list[Genome]], Mapping[str, NDArray[np.float64]]]


@dataclass(frozen=True)
class NetAdapt(Searcher):
    """From the largest network on: every knob is shrunk just so far that the cost falls by at least a step; all of
    these are evaluated, and the one that loses least for what it saves is the next to be shrunk.

        next = argmin over proposals of (error' - error) / (cost - cost'),   cost - cost' >= step * cost of the largest

    It ends once the limit is met or nothing can be shrunk further.

    Fields:
        saving: least share of the largest network's cost that a proposal saves (paper: 0.01).

    Args of `ask`:
        price: gives the cost, whose name is the hunt's one limit; the first objective is the error.

    Raises:
        UserError: no price, or not exactly one limit.

    Reference: Howard et al. 2019, arXiv:1905.02244, section 5.2; Yang et al. 2018, arXiv:1804.03230.
    Departures: none in the step; how an evaluation trains a proposal is the evaluation's.

    >>> from trimtab.core.knob import Domain, Knob
    >>> domain = Domain((Knob("a", (1, 2), "width"), Knob("b", (1, 2), "width")))
    >>> price = lambda genomes: {"ms": np.array([2.0 + sum(genome) for genome in genomes])}
    >>> hunt = Hunt(domain, (Trial((1, 1), {"error": 1.0, "ms": 4.0}),), limits={"ms": 3.0})
    >>> NetAdapt().ask(hunt, 9, rng=Random(0), price=price)
    [(0, 1), (1, 0)]
    """

    saving: float = 0.01

    card = Card(
        "netadapt",
        paper="arXiv:1905.02244",
        claim="Meets a latency with less error than narrowing all layers alike.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, price: Price | None) -> list[Genome]:
        """At most `count` proposals of the present round; none once the limit is met."""
        if price is None or len(hunt.limits) != 1 or not 0 < self.saving < 1:
            raise UserError(
                f"netadapt was asked for with saving={self.saving}, the limits {', '.join(hunt.limits) or 'none'} and "
                f"{'a' if price else 'no'} price; it takes a step in 0..1, one limit, and a price of that name"
            )
        done = {trial.genome: trial for trial in hunt.trials}
        at = hunt.domain.largest()
        while True:
            wanted = [at] if at not in done else self.proposals(hunt, at, price)
            new = [genome for genome in wanted if genome not in done]
            if new or not wanted:
                return [genome for genome in new if genome not in hunt.pending][:count]
            at = min(wanted, key=lambda genome: self._loss(hunt, done, at, genome, price))

    def proposals(self, hunt: Hunt, at: Genome, price: Price) -> list[Genome]:
        """The network with one knob smaller, for each knob that can save a step; none where the limit is met."""
        ((name, limit),) = hunt.limits.items()
        start, now = (float(price([genome])[name][0]) for genome in (hunt.domain.largest(), at))
        found: dict[Genome, None] = {}
        for i, place in enumerate(at):
            for smaller in reversed(range(place)) if now > limit else ():
                genome = hunt.domain.canonical((*at[:i], smaller, *at[i + 1 :]))
                if now - float(price([genome])[name][0]) >= self.saving * start:
                    found[genome] = None
                    break
        return list(found)

    @staticmethod
    def _loss(hunt: Hunt, done: Mapping[Genome, Trial], at: Genome, genome: Genome, price: Price) -> float:
        error, (name,) = hunt.objectives[0], hunt.limits
        costs = price([at, genome])[name]
        return (done[genome].values[error] - done[at].values[error]) / float(costs[0] - costs[1])
