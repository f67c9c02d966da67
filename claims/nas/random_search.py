"""The protocol of comparison: what searchers add to the mean random network of their own space."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Hunt, Searcher, Trial
from trimtab.nas.deeparchitect import DeepArchitect
from trimtab.nas.evolution import Evolution
from trimtab.nas.linas import LINAS
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.protocol import relative_improvement
from trimtab.tasks.digit_nets import RECIPE, digit_nets

EVALUATIONS, SEARCHES = 24, 5

CLAIM = Claim(
    method="random-search",
    statement="Measured by the improvement on the mean random network of the same space and training, much of what a "
    "search gains is gained by random search too; and recipes move the accuracy more than architectures do.",
    source="Yang et al. 2020, arXiv:1912.12522, sections 3 and 4",
    figure="8 methods on 5 datasets: many do not beat the mean random network by much",
    setting="The digit networks trained here: 36 architectures, 6 recipes; searches of 24 evaluations of both, chosen "
    "by the search images, accuracies of unseen images; 5 searches and 20 random networks a seed.",
    metric="improvement on the mean random network, in percent; deviation of the error over recipes, of architectures' "
    "means, and the other way, in percent",
    checks=(
        Check("random search alone has at least half of the best searcher's", "random", ">=", "half_of_best"),
        Check("search on predictors adds to random search", "linas", ">", "random"),
        Check("evolution adds to random search", "evolution", ">", "random"),
        Check("recipes move the error more than architectures", "recipes", ">", "architectures"),
    ),
    seeds=tuple(range(8)),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed: the searchers' improvements, and what moves the error."""
    table = digit_nets()
    rng = Random(seed)
    random = [100 - table.evaluate(table.domain.random(rng))["unseen"] for _ in range(20)]
    searchers: dict[str, Searcher] = {
        "random": RandomSearch(),
        "evolution": Evolution(first=8, parents=8),
        "linas": LINAS(first=8),
        "mcts": DeepArchitect(),
    }
    found = {}
    for name, searcher in searchers.items():
        accuracies = []
        for search in range(SEARCHES):
            trials: tuple[Trial, ...] = ()
            while len(trials) < EVALUATIONS:
                hunt = Hunt(table.domain, trials, ("error",), seed=seed * SEARCHES + search)
                new = searcher.ask(hunt, 4, rng=Random(f"{hunt.seed}/{len(trials)}"))
                trials += tuple(Trial(genome, table.evaluate(genome)) for genome in new)
            accuracies.append(100 - min(trials, key=lambda trial: trial.values["error"]).values["unseen"])
        found[name] = relative_improvement(accuracies, random)[0]
    by_recipe = table.values["error"].reshape(-1, int(np.prod([len(knob.options) for knob in RECIPE])))
    moved = {"recipes": float(by_recipe.std(1).mean()), "architectures": float(by_recipe.std(0).mean())}
    return found | {"half_of_best": max(found.values()) / 2} | moved
