"""Evolution: breeding from the front beats drawing at random."""

from __future__ import annotations

from random import Random
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Hunt, Trial
from trimtab.nas.evolution import Evolution
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.protocol import beside
from trimtab.tasks.nas_tables import bench201, macro

DEVICES = ("gold_6226", "titan_rtx_1", "pixel2")
TABLES = ("macro", *DEVICES)

CLAIM = Claim(
    method="evolution",
    statement="At equal evaluations, evolution with ranks, crowding and constraint domination covers more of a front's "
    "volume than random search.",
    source="Deb et al. 2002, IEEE TEVC 6(2), section VI",
    setting="Tables of trained networks: NAS-Bench-Macro (error, multiplications) and NAS-Bench-201 (validation error, "
    "measured milliseconds on three devices); steps of one evaluation. Limited: the least error within the first tenth "
    "of costs.",
    metric="share of the volume of the whole table's front after 100 and 300 evaluations; error in percent; "
    "improvement on the mean network of the cheaper half, in percent of its accuracy, after 300 evaluations",
    checks=(
        *(Check(f"{t}: more at {n}", f"{t}_{n}", ">", f"{t}_random_{n}") for t in TABLES for n in (100, 300)),
        *(Check(f"{t}: less error within a limit", f"{t}_limited", "<", f"{t}_random_limited") for t in TABLES),
        *(check for t in TABLES for check in beside(f"{t}_", f"{t}_random_", f"{t}: ")),
    ),
    seeds=tuple(range(20)),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed of both searchers on all tables."""
    found: dict[str, float] = {}
    for name in TABLES:
        table = macro(lab.data) if name == "macro" else bench201(lab.data, name)
        cost = table.objectives[1]
        limit = float(sorted(table.values[cost])[len(table.values[cost]) // 10])
        for kind, searcher in (("", Evolution()), ("random_", RandomSearch())):
            for limits in ({}, {cost: limit}):
                trials: tuple[Trial, ...] = ()
                objectives = table.objectives[:1] if limits else table.objectives
                while len(trials) < (100 if limits else 300):
                    hunt = Hunt(table.domain, trials, objectives, limits, seed=seed)
                    (new,) = searcher.ask(hunt, 1, rng=Random(f"{seed}/{len(trials)}"))
                    trials += (Trial(new, table.evaluate(new)),)
                if limits:
                    met = [t.values["error"] for t in trials if t.values[cost] <= limit]
                    found[f"{name}_{kind}limited"] = min(met, default=100.0)
                else:
                    shares = table.shares(trials)
                    found |= {f"{name}_{kind}{n}": shares[n - 1] for n in (100, 300)}
                    found[f"{name}_{kind}improvement"] = table.improvement(trials, table.cheap())
    return found
