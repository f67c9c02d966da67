"""DeepArchitect: MCTS and SMBO against random search."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Hunt, Searcher, Trial
from trimtab.nas.deeparchitect import DeepArchitect
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.protocol import beside
from trimtab.tasks.digit_nets import digit_nets
from trimtab.tasks.nas_tables import Table, macro

SEARCHERS = {"mcts": DeepArchitect(), "smbo": DeepArchitect(by="smbo"), "random": RandomSearch()}

CLAIM = Claim(
    method="deeparchitect",
    statement="Monte Carlo tree search and search on a surrogate find better networks than random search at equal "
    "evaluations.",
    source="Negrinho and Gordon 2017, arXiv:1704.08792, section 7",
    figure="no figure: MCTS and SMBO above random search on CIFAR-10",
    setting="The digit networks, all 216 trained here, and NAS-Bench-Macro, 64 evaluations of each, one error "
    "to make small; judged by the mean over evaluations of the best error so far.",
    metric="mean of the best error so far, in percent; improvement on the mean network of the table, in percent of its "
    "accuracy, by the error that is not searched by",
    checks=(
        *(
            Check(f"{t}: {s} below random search", f"{t}_{s}", "<", f"{t}_random")
            for t in ("digits", "macro")
            for s in ("mcts", "smbo")
        ),
        *(
            check
            for t in ("digits", "macro")
            for s in ("mcts", "smbo")
            for check in beside(f"{t}_{s}_", f"{t}_random_", f"{t}, {s}: ")
        ),
    ),
    seeds=tuple(range(20)),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed of the three searchers on both tables."""
    found = {}
    for t, table in {"digits": digit_nets(), "macro": macro(lab.data)}.items():
        for s, searcher in SEARCHERS.items():
            trials = searched(table, searcher, seed)
            best = np.minimum.accumulate([trial.values["error"] for trial in trials])
            found |= {f"{t}_{s}": float(best.mean()), f"{t}_{s}_improvement": table.improvement(trials)}
    return found


def searched(table: Table, searcher: Searcher, seed: int) -> tuple[Trial, ...]:
    """A search of 64 evaluations."""
    trials: tuple[Trial, ...] = ()
    while len(trials) < 64:
        hunt = Hunt(table.domain, trials, ("error",), seed=seed)
        (new,) = searcher.ask(hunt, 1, rng=Random(f"{seed}/{len(trials)}"))
        trials += (Trial(new, table.evaluate(new)),)
    return trials
