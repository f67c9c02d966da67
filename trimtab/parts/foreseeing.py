"""What predictors say of genomes that were not evaluated: their values, their chances, and which are worth it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.core.knob import Genome
from trimtab.core.method import Hunt, Trial
from trimtab.parts.breeding import Known, survivors
from trimtab.parts.fronts import Free, excess, table
from trimtab.parts.predicting import NODES, Predictor

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Foresight:
    """Predictors of a hunt's values, fitted to its trials.

    Fields:
        hunt: the search.
        trials: that they were fitted to, the best first.
        models: name of a value -> its predictor; it has `mean(genomes)` and `samples(genomes)`.
        price: exact costs of genomes, or None.
        corner: of the volume that is to be filled.
    """

    hunt: Hunt
    trials: tuple[Trial, ...]
    models: Mapping[str, Any]
    price: Callable[[list[Genome]], Mapping[str, Array]] | None
    corner: Array

    @staticmethod
    def of(
        hunt: Hunt,
        trials: Sequence[Trial],
        price: Callable[[list[Genome]], Mapping[str, Array]] | None = None,
        most: int = 300,
        beyond: float = 0.5,
        fit: Callable[[Hunt, list[Genome], Array], Any] | None = None,
    ) -> Foresight:
        """Fit a predictor to each value of the hunt that has no price.

        Args:
            most: trials to fit to, the best ones.
            beyond: how far the corner lies behind the worst values, in shares of their range.
            fit: makes a predictor of a hunt, genomes and values; by default a `Predictor`.
        """
        names = tuple(dict.fromkeys((*hunt.objectives, *hunt.limits)))
        points = table(trials, hunt.objectives)
        over = excess({name: table(trials, (name,))[:, 0] for name in hunt.limits}, hunt.limits)
        kept = tuple(trials[i] for i in survivors(points, over, most))
        genomes = [trial.genome for trial in kept]
        priced = set(price([genomes[0]])) if price else set()
        make = fit or (lambda hunt, genomes, values: Predictor(hunt.domain, genomes, values))
        models = {name: make(hunt, genomes, table(kept, (name,))[:, 0]) for name in names if name not in priced}
        spread = points.max(0) - points.min(0)
        corner = points.max(0) + beyond * np.where(spread > 0, spread, np.abs(points.max(0)) + 1.0)
        return Foresight(hunt, kept, models, price, corner)

    def costs(self, genomes: list[Genome]) -> tuple[Array, Array]:
        """Expected objectives `[genomes, objectives]`, and by how much limits are expected to be broken `[genomes]`."""
        exact = self.price(genomes) if self.price else {}
        found = {name: model.mean(genomes) for name, model in self.models.items()} | dict(exact)
        over = excess(found, self.hunt.limits) if self.hunt.limits else np.zeros(len(genomes))
        return np.stack([found[name] for name in self.hunt.objectives], 1), over

    def best(self, genomes: list[Genome], count: int, known: Known) -> list[Genome]:
        """At most `count` of the genomes that are worth most together, each then known; those without any hope of a
        gain are left out.
        """
        if not genomes:
            return []
        exact = self.price(genomes) if self.price else {}
        drawn = {name: model.samples(genomes) for name, model in self.models.items()}
        drawn |= {name: np.repeat(np.asarray(v, float)[:, None], len(NODES), 1) for name, v in exact.items()}
        chance = np.ones(len(genomes))
        for name, limit in self.hunt.limits.items():
            chance *= (drawn[name] <= limit).mean(1) + 1e-3 / (1 + np.maximum(drawn[name].mean(1) - limit, 0))
        samples = [drawn[name] for name in self.hunt.objectives]
        met = [t for t in self.trials if all(t.values[name] <= limit for name, limit in self.hunt.limits.items())]
        free = Free(table(met, self.hunt.objectives), self.corner)
        chosen: list[Genome] = []
        for _ in range(len(genomes)):
            worth = chance * free.gain(samples)
            at = int(worth.argmax())
            if len(chosen) == count or worth[at] <= 0:
                break
            chance[at] = 0.0
            if genomes[at] in known:  # computes the same as one that was chosen before
                continue
            known.add(genomes[at])
            chosen.append(genomes[at])
            free = free.with_point(np.array([np.median(column[at]) for column in samples]))
        return chosen
