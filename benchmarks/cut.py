"""Does a search over the cuts of a trained model dominate cutting it evenly?

A trained model is made elastic by InstaTune, its sub-networks are searched for error and flops, and what lies on the
front of the search items is measured on test items. It is held against two others:

- the uniform networks (all widths alike, all heads, all depths) over the same weights. `volume` is the share of the
  corner of loss and flops, from the worst to the best of both, that a front dominates;
- uniform width scaling: the model with all widths and heads at one share, each such network tuned by itself on labels,
  all with equal steps, and together as many flops of training as the elastic one took. Each is compared with the best
  network of the front, on the search items, that takes no more flops than it.

Losses are of the test items. The verdict comes from the intervals over the seeds. A JSON line a model is printed and
appended to records/benchmarks/cut.jsonl.

    python benchmarks/cut.py [MODEL ...]   # by default all whose data are here, four minutes a seed on one core
    python benchmarks/cut.py --small       # a minute; nothing is recorded
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimtab.catalogue import data_folder, keep_benchmark
from trimtab.core.claim import Check, judge, verdict

EVALUATIONS = 60
SHARES = (0.0, 0.5, 1.0)  # places of all knobs of a kind among their options, from the least to the whole
CHECKS = (
    Check("dominates more than the uniform networks over the same weights", "volume_found", ">", "volume_uniform"),
    Check("lower loss than uniform width scaling, at its flops and training", "loss_found", "<", "loss_scaled"),
)


@dataclass(frozen=True)
class Setting:
    """How a model is tuned, see `trimtab.elasticity.cut_model`, and on how many items (times `task.multiple`) its
    networks are searched.
    """

    steps: int
    options: dict[str, Any]
    searched: int = 20


MODELS = {
    "pocket-vit": Setting(150, {"batch": 64, "rate": 1e-3, "decay": 0.0, "gathered": 256}),
    "pocket-lm": Setting(60, {"length": 128, "batch": 4, "rate": 3e-4, "decay": 0.0, "tested": 48}),
    "benchmarks.resnet:resnet20": Setting(
        60, {"data": "benchmarks.resnet:cifar10", "batch": 64, "rate": 1e-3, "decay": 0.0, "tested": 500}, searched=5
    ),
}


def measured(model: str, seed: int, evaluations: int, small: bool) -> dict[str, Any]:
    """Volumes of two fronts, and losses beside those of uniform width scaling, for one seed."""
    from trimtab.core.method import Elastic, Lesson, Searcher, method
    from trimtab.elasticity import cut_model
    from trimtab.engine.costing import Costs
    from trimtab.engine.hunting import Chase, hunt
    from trimtab.engine.jury import Jury
    from trimtab.parts.fronts import hypervolume

    setting = MODELS[model]
    steps = 4 if small else setting.steps
    bench = cut_model(model, seed, **setting.options)
    tuning, searcher = method("instatune"), method("linas")
    assert isinstance(tuning, Elastic) and isinstance(searcher, Searcher)
    domain = bench.domain
    offered = domain.within(tuning.offer(domain))
    costs = Costs(bench.maker, dict(bench.items.take(0, 1).inputs), bench.task.options, within=offered)
    net = bench.trained(tuning, steps, sort=True)
    searched = bench.task.batch("search", 40 if small else setting.searched * bench.task.multiple, seed)
    jury = Jury(bench.task, bench.items.take(0, bench.gathered), searched)

    def whole(genome: Any) -> Any:
        return domain.genome(offered.setting(genome))

    def price(genomes: Any) -> dict[str, Any]:
        return {"flops": costs.price(genomes)["flops"]}

    def loss(judge: Jury, genome: Any, supernet: Any = net) -> float:
        module, _ = supernet.bound(whole(genome), statistics=False)
        judge.gather(module)
        scores = judge.scores(module)
        return float(scores.nll.sum() / scores.count.sum())

    def evaluate(genome: Any) -> dict[str, float]:
        return {"error": loss(jury, genome), "flops": float(price([genome])["flops"][0])}

    def alike(shares: dict[str, float]) -> Any:
        places = (round(shares.get(k.kind, 1) * (len(k.options) - 1)) for k in offered.knobs)
        return offered.canonical(places)

    kinds = sorted({k.kind for k in offered.knobs if len(k.options) > 1})
    first = tuple(sorted({alike(dict(zip(kinds, s, strict=True))) for s in product(SHARES, repeat=len(kinds))}))
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

    scaled = [alike({"width": share, "heads": share}) for share in SHARES]
    flops = price(scaled)["flops"]
    lesson, rng = Lesson(domain, tuning.offer(domain), 0, steps), Random(seed)
    taught = [pupil.genome for _ in range(steps) for pupil in tuning.teach(lesson, rng)]
    spent = price([offered.genome(domain.setting(g)) for g in taught])["flops"].sum()
    each = max(1, round(float(spent / flops.sum())))
    rows = []
    for genome, cost in zip(scaled, flops, strict=True):
        alone = loss(bench.jury, genome, bench.alone(whole(genome), each, sort=True))
        within = [i for i, (_, f) in enumerate(points["found"]) if f <= cost]  # the dearest is the best of the search
        rows.append({"flops": float(cost), "scaled": alone, "found": float(points["found"][within[-1], 0])})
    means = {f"loss_{n}": sum(row[n] for row in rows) / len(rows) for n in ("found", "scaled")}
    return {**volumes, **means, "networks": len(fronts["found"]), "steps_scaled": each, "beside": rows}


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
        evaluations = 40 if args.small else EVALUATIONS
        rows = [measured(model, seed, evaluations, args.small) for seed in range(1 if args.small else args.seeds)]
        judged = [judge(check, rows) for check in CHECKS]
        row = {"model": model, "steps": MODELS[model].steps, "evaluations": evaluations, "seeds": rows}
        checks = {"checks": [asdict(j) for j in judged], "verdict": verdict(judged)}
        keep_benchmark({"benchmark": "cut", **row, **checks}, kept=not args.small)


if __name__ == "__main__":
    main()
