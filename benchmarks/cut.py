"""Does a search over the cuts of a trained model dominate cutting it evenly?

A trained model is made elastic by InstaTune, its sub-networks are searched for error and flops, and what lies on the
front of the search items is measured on test items, beside the front of the uniform networks (all widths alike, all
heads, all depths) over the same weights. `volume` is the share of the corner of loss and flops, from the worst to the
best of both, that a front dominates; `won` counts the seeds in which the search's is larger. A JSON line a model is
printed and appended to records/benchmarks/cut.jsonl.

    python benchmarks/cut.py [MODEL ...]   # by default all whose data are here, half an hour on one core
    python benchmarks/cut.py --small       # a minute; nothing is recorded
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimtab.catalogue import data_folder, keep_benchmark


@dataclass(frozen=True)
class Setting:
    """How a model is tuned: see `trimtab.elasticity.cut_model`."""

    steps: int
    options: dict[str, Any]


MODELS = {
    "pocket-vit": Setting(150, {"batch": 64, "rate": 1e-3, "decay": 0.0, "gathered": 256}),
    "pocket-lm": Setting(60, {"length": 128, "batch": 4, "rate": 3e-4, "decay": 0.0, "tested": 48}),
    "benchmarks.resnet:resnet32": Setting(
        120, {"data": "benchmarks.resnet:cifar10", "batch": 64, "rate": 1e-3, "decay": 0.0, "tested": 2000}
    ),
}


def measured(model: str, seed: int, evaluations: int, small: bool) -> dict[str, float]:
    """Volumes of both fronts, for one seed."""
    from trimtab.core.method import Elastic, Searcher, method
    from trimtab.elasticity import cut_model
    from trimtab.engine.hunting import Chase, hunt
    from trimtab.engine.jury import Jury
    from trimtab.parts.fronts import hypervolume

    setting = MODELS[model]
    bench = cut_model(model, seed, **setting.options)
    tuning, searcher = method("instatune"), method("linas")
    assert isinstance(tuning, Elastic) and isinstance(searcher, Searcher)
    domain = bench.domain
    offered = domain.within(tuning.offer(domain))
    net = bench.trained(tuning, 4 if small else setting.steps, sort=True)
    searched = bench.task.batch("search", 40 if small else 20 * bench.task.multiple, seed)
    jury = Jury(bench.task, bench.items.take(0, bench.gathered), searched)

    def whole(genome: Any) -> Any:
        return domain.genome(offered.setting(genome))

    def price(genomes: Any) -> dict[str, Any]:
        return {"flops": bench.costs.price([whole(g) for g in genomes])["flops"]}

    def loss(judge: Jury, genome: Any) -> float:
        module, _ = net.bound(whole(genome), statistics=False)
        judge.gather(module)
        scores = judge.scores(module)
        return float(scores.nll.sum() / scores.count.sum())

    def evaluate(genome: Any) -> dict[str, float]:
        return {"error": loss(jury, genome), "flops": float(price([genome])["flops"][0])}

    kinds = sorted({k.kind for k in offered.knobs if len(k.options) > 1})
    uniform = set()
    for shares in product((0.0, 0.5, 1.0), repeat=len(kinds)):
        at = dict(zip(kinds, shares, strict=True))
        uniform.add(offered.canonical(round(at.get(k.kind, 0) * (len(k.options) - 1)) for k in offered.knobs))
    first = tuple(sorted(uniform))
    chase = Chase(offered, searcher, ("error", "flops"), {}, evaluations, batch=8, seed=seed, price=price, first=first)
    with tempfile.TemporaryDirectory() as folder:
        trials = hunt(chase, evaluate, Path(folder))
    best = float("inf")
    fronts: dict[str, list[Any]] = {"uniform": list(first), "found": []}
    for trial in sorted(trials, key=lambda t: (t.values["flops"], t.values["error"])):
        if trial.values["error"] < best:
            fronts["found"].append(trial.genome)
            best = trial.values["error"]
    points = {
        name: np.array([(loss(bench.jury, g), float(price([g])["flops"][0])) for g in genomes])
        for name, genomes in fronts.items()
    }
    ends = np.vstack(list(points.values()))
    low, high = ends.min(0), ends.max(0)
    volumes = {f"volume_{n}": hypervolume((p - low) / (high - low), [1.001, 1.001]) for n, p in points.items()}
    return {**volumes, "networks": float(len(fronts["found"])), "loss_whole": loss(bench.jury, offered.largest())}


def main() -> None:
    """Print the records, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = [model for model in MODELS if "resnet" not in model or data_folder() is not None]
    for model in args.models or here[: 1 if args.small else None]:
        rows = [
            measured(model, seed, 40 if args.small else 100, args.small)
            for seed in range(1 if args.small else args.seeds)
        ]
        won = sum(row["volume_found"] > row["volume_uniform"] for row in rows)
        setting = MODELS[model]
        row = {"model": model, "steps": setting.steps, "evaluations": 100, "seeds": rows, "won": won}
        keep_benchmark({"benchmark": "cut", **row}, kept=not args.small)


if __name__ == "__main__":
    main()
