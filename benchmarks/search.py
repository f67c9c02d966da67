"""How much of a front searchers find: ours beside Optuna and pymoo, on tables of trained networks.

Every searcher gets the same tables, evaluations and seeds, is asked for five networks at a time, and sees values of
what it evaluated alone. Optuna and pymoo, where they are installed, are the searchers `optuna-tpe`, `optuna-nsga2` and
`pymoo-nsga2` of `trimtab search`; no network is evaluated twice. Figures are shares of the volume of the whole table's
front, every objective scaled by its range.

    python benchmarks/search.py             # some minutes; appends to records/benchmarks/search.jsonl
    python benchmarks/search.py --small     # two seeds of one table, to see that it runs; nothing is recorded
    python benchmarks/search.py --only linas,evolution --seeds 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from random import Random
from typing import Any

from trimtab.catalogue import data_folder, keep_benchmark
from trimtab.core.method import Hunt, Trial, method
from trimtab.peers import installed
from trimtab.tasks.nas_tables import Table, bench201, macro, needed

AT, SHARES = (50, 100, 300), (0.95, 0.99)
DEVICES = ("gold_6226", "titan_rtx_1", "pixel2")
OURS = {"linas": 150, "evolution": 300, "random-search": 300}  # evaluations; a search on predictors needs fewer
PEERS = {"optuna-tpe": 300, "optuna-nsga2": 300, "pymoo-nsga2": 300}
BATCH = 5


def searched(table: Table, name: str, evaluations: int, seed: int) -> list[Trial]:
    """A search, in steps of a few evaluations."""
    searcher: Any = method(name)
    trials: list[Trial] = []
    while len(trials) < evaluations:
        hunt = Hunt(table.domain, tuple(trials), table.objectives, seed=seed)
        new = searcher.ask(hunt, BATCH, rng=Random(f"{seed}/{len(trials)}"))
        trials += [Trial(genome, table.evaluate(genome)) for genome in new]
    return trials


def measured(table: Table, name: str, evaluations: int, seeds: int) -> dict[str, Any]:
    """Means over seeds of the shares, medians of the evaluations that a share took, and processor seconds a search."""
    start = time.process_time()
    courses = [table.shares(searched(table, name, evaluations, seed)) for seed in range(seeds)]
    seconds = (time.process_time() - start) / seeds
    found: dict[str, Any] = {"evaluations": evaluations, "seconds": round(seconds, 2)}
    for n in AT:
        if n <= evaluations:
            found[f"share_{n}"] = round(statistics.mean(course[n - 1] for course in courses), 4)
    for share in SHARES:
        found[f"evaluations_{share:.0%}"] = statistics.median(needed(course, share) for course in courses)
    return found


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    data, seeds = data_folder(), 2 if given.small else given.seeds
    if data is None:
        print("the tables lie in the shared data, which are not here: nothing to measure")
        return
    tables = [macro(data), *(bench201(data, device) for device in DEVICES)]
    runs = OURS | {name: count for name, count in PEERS.items() if installed(name.partition("-")[0])}
    for table in tables[: 1 if given.small else None]:
        for name, evaluations in runs.items():
            if not given.only or name in given.only.split(","):
                row = {"benchmark": "search", "table": table.name, "searcher": name, "seeds": seeds}
                keep_benchmark(row | measured(table, name, evaluations, seeds), kept=not given.small)


if __name__ == "__main__":
    main()
