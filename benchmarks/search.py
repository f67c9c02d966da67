"""How much of a front searchers find: ours beside Optuna and pymoo, on tables of trained networks.

Every searcher gets the same tables, evaluations and seeds, and sees values of what it evaluated alone. Optuna and pymoo
run as their own documentation says, where they are installed; they may propose a network twice, which costs them an
evaluation as it would anybody. Figures are shares of the volume of the whole table's front, every objective scaled by
its range.

    python benchmarks/search.py             # some minutes; appends to records/benchmarks/search.jsonl
    python benchmarks/search.py --small     # two seeds of one table, to see that it runs; nothing is recorded
    python benchmarks/search.py --only linas,evolution --seeds 5
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable
from random import Random
from typing import Any

from trimtab.catalogue import data_folder, keep_benchmark
from trimtab.core.method import Hunt, Searcher, Trial, method
from trimtab.tasks.nas_tables import Table, bench201, macro, needed

AT, SHARES = (50, 100, 300), (0.95, 0.99)
DEVICES = ("gold_6226", "titan_rtx_1", "pixel2")
OURS = {"linas": 150, "evolution": 300, "random-search": 300}  # evaluations; a search on predictors needs fewer
BATCH = 5

Run = Callable[[Table, int, int], list[Trial]]


def ours(name: str) -> Run:
    """A searcher of ours."""

    def run(table: Table, evaluations: int, seed: int) -> list[Trial]:
        searcher: Any = method(name)
        assert isinstance(searcher, Searcher)
        trials: list[Trial] = []
        while len(trials) < evaluations:
            hunt = Hunt(table.domain, tuple(trials), table.objectives, seed=seed)
            new = searcher.ask(hunt, BATCH, rng=Random(f"{seed}/{len(trials)}"))
            trials += [Trial(genome, table.evaluate(genome)) for genome in new]
        return trials

    return run


def optuna(kind: str) -> Run:
    """Optuna's TPE (multivariate) or NSGA-II, otherwise with its own settings."""

    def run(table: Table, evaluations: int, seed: int) -> list[Trial]:
        import optuna as library

        library.logging.set_verbosity(library.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samplers: dict[str, Any] = {
                "tpe": lambda: library.samplers.TPESampler(seed=seed, multivariate=True),
                "nsga2": lambda: library.samplers.NSGAIISampler(seed=seed),
            }
            study = library.create_study(directions=["minimize"] * 2, sampler=samplers[kind]())
            trials: list[Trial] = []
            for _ in range(evaluations):
                trial = study.ask()
                choices = (trial.suggest_categorical(k.name, range(len(k.options))) for k in table.domain.knobs)
                genome = tuple(int(place) for place in choices)
                values = table.evaluate(genome)
                study.tell(trial, [values[name] for name in table.objectives])
                trials.append(Trial(genome, values))
        return trials

    return run


def pymoo(table: Table, evaluations: int, seed: int) -> list[Trial]:
    """pymoo's genetic algorithm for mixed variables with the survival of NSGA-II, which removes duplicates."""
    from pymoo.algorithms.moo.nsga2 import RankAndCrowdingSurvival
    from pymoo.core.mixed import MixedVariableGA
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.core.variable import Choice
    from pymoo.optimize import minimize

    trials: list[Trial] = []

    class Problem(ElementwiseProblem):
        def __init__(self) -> None:
            variables = {k.name: Choice(options=list(range(len(k.options)))) for k in table.domain.knobs}
            super().__init__(vars=variables, n_obj=len(table.objectives))

        def _evaluate(self, x: dict[str, int], out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            genome = tuple(int(x[knob.name]) for knob in table.domain.knobs)
            trials.append(Trial(genome, table.evaluate(genome)))
            out["F"] = [trials[-1].values[name] for name in table.objectives]

    algorithm = MixedVariableGA(pop_size=20, survival=RankAndCrowdingSurvival())
    minimize(Problem(), algorithm, ("n_evals", evaluations), seed=seed, verbose=False)
    return trials[:evaluations]


def peers() -> dict[str, tuple[Run, int]]:
    """The peers that are installed, with their evaluations."""
    found: dict[str, tuple[Run, int]] = {}
    if importlib.util.find_spec("optuna"):
        found |= {"optuna tpe": (optuna("tpe"), 300), "optuna nsga2": (optuna("nsga2"), 300)}
    if importlib.util.find_spec("pymoo"):
        found["pymoo nsga2"] = (pymoo, 300)
    return found


def measured(table: Table, run: Run, evaluations: int, seeds: int) -> dict[str, Any]:
    """Means over seeds of the shares, medians of the evaluations that a share took, and processor seconds a search."""
    start = time.process_time()
    courses = [table.shares(run(table, evaluations, seed)) for seed in range(seeds)]
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
    runs: dict[str, tuple[Run, int]] = {name: (ours(name), count) for name, count in OURS.items()} | peers()
    for table in tables[: 1 if given.small else None]:
        for name, (run, evaluations) in runs.items():
            if not given.only or name in given.only.split(","):
                row = {"benchmark": "search", "table": table.name, "searcher": name, "seeds": seeds}
                keep_benchmark(row | measured(table, run, evaluations, seeds), kept=not given.small)


if __name__ == "__main__":
    main()
