"""FBNetV3's search: architecture and recipe in one genome, and a predictor that learned free statistics first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Known, bred, design
from trimtab.parts.fronts import excess, table
from trimtab.parts.neural_predictors import Pretrained
from trimtab.parts.predicting import Encoding

Price = Callable[[list[Genome]], Mapping[str, NDArray[np.float64]]]


@dataclass(frozen=True)
class FBNetV3(Searcher):
    """NARS: a predictor of the error over architecture and recipe, whose encoder first learns the costs of random
    genomes; what is evaluated next is the best it predicts within the limits.

        f <- argmin |V f(g) - costs(g)|,   then  error(g) ~ w f(g) + b
        next = argmin predicted error, costs within limits

    Until `sampled` trials are there, the best come from random genomes (constrained iterative sampling); from then on
    from an evolution on the predictor.

    Fields:
        first: genomes of the first design.
        sampled: trials from which on the predictor is evolved on.
        pretrain: random genomes whose costs the encoder learns; 0: none.
        draws: random genomes that the best come from. size: of a generation.

    Args of `ask`:
        price: gives the free statistics, and whatever of them the hunt limits; the first objective is the error.

    Reference: Dai et al. 2020, arXiv:2006.02049, sections 3.2 (predictor, pretraining) and 3.3 (constrained iterative
        optimisation, evolution).
    Departures: the recipe's knobs are of the domain, as kind "recipe"; all trials are whole, where the paper stops
        trainings early.

    >>> from trimtab.core.knob import Domain, Knob
    >>> domain = Domain((Knob("width", (8, 16, 32), "width"), Knob("rate", (0.1, 0.2), "recipe")))
    >>> price = lambda genomes: {"macs": np.array([float(g[0]) for g in genomes])}
    >>> len(FBNetV3().ask(Hunt(domain), 2, rng=Random(0), price=price))
    2
    """

    first: int = 16
    sampled: int = 60
    pretrain: int = 400
    draws: int = 400
    size: int = 60

    card = Card(
        "fbnetv3",
        catalogue=(94,),
        paper="arXiv:2006.02049",
        claim="Pretraining on free statistics ranks better from few trainings; recipes are worth searching too.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, price: Price | None = None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: a field makes no sense.
        """
        if min(self.first, self.draws, self.size) < 2 or min(self.sampled, self.pretrain) < 0:
            raise UserError(
                f"fbnetv3 was asked for first={self.first}, sampled={self.sampled}, pretrain={self.pretrain}, "
                f"draws={self.draws}, size={self.size}; first, draws and size start at 2, the others at 0"
            )
        domain, known = hunt.domain, Known(hunt)
        whole = [trial for trial in hunt.trials if trial.effort >= 1]
        begun = iter(design(domain, self.first, Random(hunt.seed)))
        if len(known.genomes) < self.first or len(whole) < 2:
            return known.taken(lambda: next(begun, None) or domain.random(rng), count)
        encoding = Encoding(domain)
        genomes = [trial.genome for trial in whole]
        predicted = {
            name: self.predictor(hunt, genomes, table(whole, (name,))[:, 0], price).mean
            for name in dict.fromkeys((*hunt.objectives, *hunt.limits))
            if price is None or name not in price(genomes[:1])
        }

        def costs(some: list[Genome]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            found = dict(price(some)) if price else {}
            found |= {name: mean(encoding.rows(some)) for name, mean in predicted.items()}
            over = excess(found, hunt.limits) if hunt.limits else np.zeros(len(some))
            return np.stack([found[name] for name in hunt.objectives], 1), over

        if len(whole) < self.sampled:
            pool = list(dict.fromkeys(domain.random(rng) for _ in range(self.draws)))
        else:
            pool = bred(domain, genomes, costs, rng, self.size)
        pool = [genome for genome in pool if genome not in known]
        if not pool:
            return known.taken(lambda: domain.random(rng), count)
        points, over = costs(pool)
        best = iter(np.lexsort((points.mean(1) if points.shape[1] == 1 else _spread(points, rng), over)))

        def make() -> Genome:
            at = next(best, None)
            return domain.random(rng) if at is None else pool[at]

        return known.taken(make, count)

    def predictor(
        self, hunt: Hunt, genomes: list[Genome], values: NDArray[np.float64], price: Price | None = None
    ) -> Pretrained:
        """A predictor that was fitted to genomes and their values, pretrained where there are statistics to learn."""
        encoding, rng = Encoding(hunt.domain), Random(hunt.seed)
        free = None
        if price and self.pretrain:
            some = [hunt.domain.random(rng) for _ in range(self.pretrain)]
            free = encoding.rows(some), np.log(np.stack(list(price(some).values()), 1) + 1e-9)
        return Pretrained(free, encoding.rows(genomes), values, hunt.seed)


def _spread(points: NDArray[np.float64], rng: Random) -> NDArray[np.float64]:
    """One number of several objectives, by weights that are drawn."""
    weights = np.array([rng.random() for _ in range(points.shape[1])])
    low, high = points.min(0), points.max(0)
    return np.asarray(((points - low) / np.where(high > low, high - low, 1.0) * weights).max(1))
