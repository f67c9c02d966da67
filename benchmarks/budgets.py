"""Fitted plans against the best uniform plan of the same or larger size, on held-out data, at three budgets and three
seeds.

    python benchmarks/budgets.py [pocket-lm] [resnet20] [books-lm]

The budgets are the exact sizes of uniform plans between 2.5 and 5 bits a weight, so that the baseline loses nothing to
rounding. Each row of `records/benchmarks/budgets.jsonl` gives both points and the 95 % intervals of their paired
differences, in the task's metric and in damage (mean KL to the original, on the same held-out items), which tells plans
apart whose accuracies agree to within a few images. Both verdicts are computed.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.resnet import SIZES
from trimtab.catalogue import ROOT, data_folder
from trimtab.core.budget import Budget
from trimtab.evidence import Evidence, machine, versions
from trimtab.fitting import Request
from trimtab.job import Candidate, Job

SEEDS = (0, 1, 2)
ROOM = 1.02  # uniform plans up to this share above the budget may compete as well
ANCHORS = ("2b/g32", "3b/g32", "4b/g32")


class Damage:
    """Mean KL divergence to the original, nats a prediction, as a metric."""

    @staticmethod
    def value(sums: Any, amounts: Any) -> Any:
        """The metric from sums, as `Task.value`."""
        return sums.kl / sums.count


def rows_of(model: str, seed: int) -> list[dict[str, Any]]:
    """One row for each budget of a model and a seed: fitted and best uniform plan, measured on the test data."""
    from trimtab.engine.measure import measure, references, through
    from trimtab.tasks.base import bootstrap

    names = {"resnet20": ("benchmarks.resnet:tuned20", "benchmarks.resnet:cifar10")}
    name, data = names.get(model, (model, None))
    if model == "books-lm":
        folder = data_folder()
        assert folder is not None
        name, data = str(folder / "models/books-lm"), str(folder / "text/books-valid.txt")
    with tempfile.TemporaryDirectory() as folder:
        request = Request(name, Budget.of(size="1GB"), data=data, effort="quick", seed=seed)
        job = Job(request, Path(folder) / "run", False, lambda what, done, total: None)
        if model == "resnet20":
            job.menu |= {"calibration": 2, "search": SIZES["search"] // 100, "test": SIZES["test"] // 100}
        evidence = Evidence(job)
        rows, drops = job.table()
        fixed = job.fixed_bytes(job.units)
        weights = sum(u.weights for u in job.units)
        test, task = job.batch("test"), job.task
        reference = references(job._probe_stream, through(job._probe_stream, test, task.chunk), test, task)

        def tested(stream: Any) -> Any:
            return measure(stream, test, task, task.chunk, reference)

        original = tested(job._probe_stream)
        found = []
        for turn, anchor in enumerate(ANCHORS):
            every = job.uniform(rows, float("inf"))
            alike = [c for c in every if f"@{anchor}" in c.name.partition(",")[0]]
            same = [c for c in alike if f"@{anchor}" in c.name.partition(",")[2]] or alike
            limit = sum(r.bytes for r in same[0].rows.values())
            near = [c for c in every if limit / ROOM**4 <= sum(r.bytes for r in c.rows.values()) <= ROOM * limit]
            fitted = job.best_for(rows, drops, limit)

            def damage(c: Candidate, label: str) -> float:
                return evidence.scores(label, "search", lambda: job.apply(c, label).stream).damage()

            tried = sorted(near, key=Candidate.predicted)[:3]
            best = min(tried, key=lambda c: damage(c, f"{turn}-{tried.index(c)}"))
            points = {}
            for label, candidate in (("fitted", fitted), ("uniform", best)):
                scores = tested(job.apply(candidate, f"{turn}-{label}-test").stream)
                size = sum(r.bytes for r in candidate.rows.values())
                point = evidence.point(candidate.name, fixed + size, scores, original, "test")
                points[label] = {**point, "bits": 8 * size / weights, "damage": scores.damage()}, scores
            ours, theirs = points["fitted"], points["uniform"]
            _, _, metric = bootstrap(task, ours[1], theirs[1], test.amounts)
            _, _, damaged = bootstrap(Damage(), ours[1], theirs[1], test.amounts)  # type: ignore[arg-type]
            found.append(
                {
                    **{"benchmark": "budgets", "model": model, "seed": seed, "budget_bytes": fixed + limit},
                    **{"fitted": ours[0], "uniform": theirs[0]},
                    **{"difference": metric, "verdict": verdict(metric, task.higher)},
                    **{"damage_difference": damaged, "damage_verdict": verdict(damaged, False)},
                }
            )
        facts = {
            "machine": machine(),
            "versions": versions(),
            "model_hash": job.source.hash,
            "data_hash": job.task.data_hash(),
        }
    return [{**row, **facts} for row in found]


def verdict(interval: tuple[float, float], higher: bool) -> str:
    """Who wins, from the interval of fitted - uniform."""
    low, high = interval if higher else (-interval[1], -interval[0])
    return "fitted wins" if low > 0 else "uniform wins" if high < 0 else "undecided"


def main() -> None:
    """Run the models named, or those whose data are here, and append their rows."""
    folder = data_folder()
    here = ["pocket-lm", *(["resnet20"] if folder else [])]
    here += ["books-lm"] if folder and (folder / "models/books-lm").is_dir() else []
    for absent in {"resnet20", "books-lm"} - set(here):
        print(f"{absent}: not run here, its data are absent")
    target = ROOT / "records/benchmarks/budgets.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    for model in sys.argv[1:] or here:
        for seed in SEEDS:
            for row in rows_of(model, seed):
                row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                with open(target, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                ours, theirs, (low, high) = row["fitted"], row["uniform"], row["difference"]
                print(
                    f"{model} seed {seed} at {ours['bits']:.2f} bits: {ours['metric']} {ours['value']:.4f} against "
                    f"{theirs['value']:.4f} ({theirs['name']}, {theirs['bits']:.2f} bits), "
                    f"difference {low:+.4f} to {high:+.4f}: {row['verdict']}; in damage {row['damage_verdict']}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
