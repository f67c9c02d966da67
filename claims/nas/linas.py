"""LINAS: predictors that are fitted again and again need few evaluations for most of a front."""

from __future__ import annotations

import time
from random import Random
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Hunt, Searcher, Trial
from trimtab.nas.evolution import Evolution
from trimtab.nas.linas import LINAS
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.predicting import Predictor
from trimtab.parts.protocol import beside
from trimtab.tasks.nas_tables import Table, bench201, macro, needed

DEVICES = ("gold_6226", "titan_rtx_1", "pixel2")
TABLES = ("macro", *DEVICES)
BATCH, ENOUGH = 5, 100

CLAIM = Claim(
    method="linas",
    statement="Search on predictors that are fitted again after every few evaluations reaches a set share of a front's "
    "volume with several times fewer evaluations than random search and evolution without predictors.",
    source="Cummings et al. 2022, arXiv:2202.12954, section 5",
    figure="8 times faster than WeakNAS's Bayesian optimisation",
    setting="Tables of trained networks, searched in steps of five evaluations: NAS-Bench-Macro (error of one seed, "
    "multiplications) and NAS-Bench-201 (validation error, milliseconds on a Xeon, a Titan RTX and a Pixel 2). "
    "Volumes are shares of the whole table's front, every objective scaled by its range. The searcher sees no costs "
    "ahead. Judged: the front that was found, by the error that the search did not see.",
    metric="evaluations until 95 and 99 % of the volume (one more than were made where it was not reached: 600 of "
    "random search, 400 of evolution, 200 of LINAS); share of the volume; improvement on the mean network of the "
    "cheaper half, in percent of its accuracy, after 100 evaluations; candidates a second of a processor",
    checks=(
        *(Check(f"{t}: 95 % of the volume in at most 70 evaluations", f"{t}_95", "<=", 70.0) for t in TABLES),
        *(Check(f"{t}: 99 % in at most half of random search", f"{t}_99", "<", f"{t}_random_99_half") for t in TABLES),
        *(Check(f"{t}: 99 % before evolution", f"{t}_99", "<", f"{t}_evolution_99") for t in TABLES),
        *(
            Check(f"{t}: judged by the unseen error, more volume at 100", f"{t}_judged", ">", f"{t}_evolution_judged")
            for t in TABLES
        ),
        *(check for t in TABLES for check in beside(f"{t}_", f"{t}_random_", f"{t}: ")),
        Check("at least 10,000 candidates a second go through the predictor", "per_second", ">=", 10_000.0),
    ),
    seeds=tuple(range(20)),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed of all searchers on all tables."""
    found: dict[str, float] = {}
    for name in TABLES:
        table = macro(lab.data) if name == "macro" else bench201(lab.data, name)
        searchers = {"": (LINAS(), 200), "evolution_": (Evolution(), 400), "random_": (RandomSearch(), 600)}
        for kind, (searcher, most) in searchers.items():
            trials = searched(table, searcher, most, seed)
            shares = table.shares(trials)
            for share in (95, 99):
                found[f"{name}_{kind}{share}"] = (
                    needed(shares, share / 100) if shares[-1] >= share / 100 else most + 1.0
                )
            found[f"{name}_{kind}judged"] = table.judge(trials[:ENOUGH])
            found[f"{name}_{kind}improvement"] = table.improvement(trials[:ENOUGH], table.cheap())
        found[f"{name}_random_99_half"] = found[f"{name}_random_99"] / 2
    return found | {"per_second": speed(macro(lab.data), seed)}


def searched(table: Table, searcher: Searcher, most: int, seed: int) -> list[Trial]:
    """A search that ends when 99 % are reached, but not before `ENOUGH` evaluations."""
    trials: list[Trial] = []
    while len(trials) < most and (len(trials) < ENOUGH or table.share(trials) < 0.99):
        hunt = Hunt(table.domain, tuple(trials), table.objectives, seed=seed)
        new = searcher.ask(hunt, BATCH, rng=Random(f"{seed}/{len(trials)}"))
        trials += [Trial(genome, table.evaluate(genome)) for genome in new]
    return trials


def speed(table: Table, seed: int) -> float:
    """Candidates a second through a predictor that was fitted to 100 trials, mean and spread, in processor time."""
    rng = Random(seed)
    known = [table.domain.random(rng) for _ in range(100)]
    predictor = Predictor(table.domain, known, [table.evaluate(genome)["error"] for genome in known])
    candidates = [table.domain.random(rng) for _ in range(5000)]
    start = time.process_time()
    predictor.samples(candidates)
    return len(candidates) / (time.process_time() - start)
