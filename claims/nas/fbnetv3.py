"""FBNetV3: free statistics teach a predictor, and recipes are worth searching."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Hunt, Trial
from trimtab.nas.fbnetv3 import FBNetV3
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.breeding import every
from trimtab.parts.predicting import Concord, Encoding
from trimtab.parts.protocol import beside
from trimtab.tasks.digit_nets import RECIPE, digit_nets
from trimtab.tasks.nas_tables import Table, macro

EVALUATIONS = 36

CLAIM = Claim(
    method="fbnetv3",
    statement="A predictor that first learned multiplications and parameters ranks networks better from few trainings, "
    "and a joint search of architecture and recipe finds less error than one of architecture alone.",
    source="Dai et al. 2020, arXiv:2006.02049, sections 3.2, 3.3 and 4.3",
    figure="accuracy of EfficientNet and ResNeSt with up to 2.0 and 7.1 times fewer multiplications",
    setting="Rank correlations on NAS-Bench-Macro from 20 and 50 evaluations, on 1,000 others. Searches on the digit "
    "networks trained here (36 architectures, 6 recipes), 36 evaluations within the median of multiplications; "
    "architecture alone goes through all 36 of them with the recipe that is best on average.",
    metric="Kendall's tau; error of the search images and of unseen images, in percent; improvement on the mean "
    "network within the limit, in percent of its accuracy",
    checks=(
        Check("20 evaluations: pretrained ranks better", "tau_20", ">", "tau_20_plain"),
        Check("50 evaluations: pretrained ranks better", "tau_50", ">", "tau_50_plain"),
        Check("joint search below architecture alone", "joint", "<", "architecture"),
        Check("joint search below random joint search", "joint", "<", "random"),
        Check("the unseen error too", "joint_unseen", "<", "architecture_unseen"),
        *beside(),
    ),
    seeds=tuple(range(10)),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed."""
    return correlations(macro(lab.data), seed) | searches(digit_nets(), seed)


def correlations(table: Table, seed: int) -> dict[str, float]:
    """Rank correlations of pretrained and plain predictors on the same few."""
    found = {}
    genomes = list(every(table.domain))
    Random(seed).shuffle(genomes)
    rest = genomes[-1000:]
    error = table.values["error"][table.index(rest)]
    rows = Encoding(table.domain).rows(rest)

    def price(some: list[tuple[int, ...]]) -> dict[str, Any]:
        return {name: table.values[name][table.index(some)] for name in ("flops", "params")}

    for count in (20, 50):
        known = genomes[:count]
        values = table.values["error"][table.index(known)]
        for kind, statistics in (("", price), ("_plain", None)):
            predictor = FBNetV3().predictor(Hunt(table.domain, seed=seed), known, values, statistics)
            found[f"tau_{count}{kind}"] = Concord(predictor.mean(rows), error).tau
    return found


def searches(table: Table, seed: int) -> dict[str, float]:
    """Errors that the searches find."""
    limit = float(np.median(table.values["macs"]))
    recipes = 1
    for knob in RECIPE:
        recipes *= len(knob.options)
    by_recipe = table.values["error"].reshape(-1, recipes)
    alone = int(by_recipe.mean(0).argmin())
    fits = (table.values["macs"].reshape(-1, recipes)[:, 0] <= limit).nonzero()[0]
    best = fits[by_recipe[fits, alone].argmin()]
    unseen = table.values["unseen"].reshape(-1, recipes)
    found = {"architecture": float(by_recipe[best, alone]), "architecture_unseen": float(unseen[best, alone])}

    def price(some: list[tuple[int, ...]]) -> dict[str, Any]:
        return {name: table.values[name][table.index(some)] for name in ("macs", "params")}

    for kind, searcher in (("joint", FBNetV3(first=12, sampled=24)), ("random", RandomSearch())):
        trials: tuple[Trial, ...] = ()
        while len(trials) < EVALUATIONS:
            hunt = Hunt(table.domain, trials, ("error",), {"macs": limit}, seed=seed)
            given: dict[str, Any] = {"rng": Random(f"{seed}/{len(trials)}"), "price": price}
            new = searcher.ask(hunt, 4, **{name: given[name] for name in searcher.needs() if name in given})
            trials += tuple(Trial(genome, table.evaluate(genome)) for genome in new)
        met = [trial.values for trial in trials if trial.values["macs"] <= limit]
        least = min(met, key=lambda values: values["error"])
        found |= {kind: least["error"], f"{kind}_unseen": least["unseen"]}
        found["improvement" if kind == "joint" else "random_improvement"] = table.improvement(trials, {"macs": limit})
    return found
