"""Are sub-networks of one elastic network as good as networks trained alone?

CIFAR-10, the space `mobile-cnn`, networks at five budgets of flops. Elastic trainings get the same number of passes
forward and backward through networks as progressive shrinking takes; each network alone gets as many epochs as it.
`behind` is the accuracy of the network alone less that of the sub-network, with the 95 % interval of the paired
difference over the test images. A JSON line is printed and appended to records/benchmarks/elastic.jsonl.

With `--speed`, what a step of a super-network costs: gradients of four sampled networks, gathered in the shared
weights, to the same four networks' own forward and backward passes as plain modules, and what it takes to switch; in
processor seconds of one thread, by turns.

    python benchmarks/elastic.py          # an hour and a half on one core; the shared data are needed
    python benchmarks/elastic.py --images 1000 --epochs 20 --budgets 3 --tested 2000 --methods ofa uniform-sampling
    python benchmarks/elastic.py --speed  # a minute
    python benchmarks/elastic.py --small  # two minutes; nothing is recorded
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import cache
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimtab.catalogue import data_folder, keep_benchmark

SIZES = {"calibration": 10_000, "search": 2_000, "test": 10_000}
METHODS = ("ofa", "sandwich(between=1)", "uniform-sampling")


@cache
def cifar10() -> dict[str, tuple[Tensor, Tensor]]:
    """More of the shared images than `benchmarks.resnet` takes."""
    from benchmarks.resnet import images_of

    return {
        "calibration": images_of("train", SIZES["calibration"]),
        "search": images_of("train", SIZES["search"], start=40_000),
        "test": images_of("test", SIZES["test"]),
    }


def measured(epochs: int, budgets: int, seed: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """The record's figures."""
    from trimtab.core.method import method as named
    from trimtab.elasticity import Elasticity
    from trimtab.space import open_space
    from trimtab.tasks.base import bootstrap
    from trimtab.tasks.classification import Classification

    task = Classification({s: ({"images": x}, y) for s, (x, y) in cifar10().items()})
    bench = Elasticity(open_space("mobile-cnn", channels=3, classes=10), task, seed=seed, tested=SIZES["test"])
    steps = epochs * SIZES["calibration"] // bench.batch
    genomes = bench.spread(budgets)
    test, scores = bench.jury.items, {}
    seconds, passes = {}, {}

    def run(name: str, method: Any, steps: int, wanted: list[Any]) -> None:
        start = time.thread_time()
        supernet = bench.trained(method, steps)
        seconds[name], passes[name] = time.thread_time() - start, bench.passes[str(method)]
        for genome in wanted:
            module = supernet.extract(genome)
            bench.jury.gather(module)
            scores[name, genome] = bench.jury.scores(module, test)
        print(name, seconds[name], [round(task.overall(scores[name, g], test.amounts), 4) for g in wanted], flush=True)

    run(methods[0], methods[0], steps, genomes)
    for method in methods[1:]:
        each = 3 if method.startswith("sandwich") else 1
        run(method, method, passes[methods[0]] // each, genomes)
    for i, genome in enumerate(genomes):
        run(f"alone {i}", named("alone", genome=genome), steps, [genome])
    rows = []
    for i, genome in enumerate(genomes):
        alone = scores[f"alone {i}", genome]
        row: dict[str, Any] = {k: float(v[0]) for k, v in bench.costs.price([genome]).items()}
        row["alone"] = task.overall(alone, test.amounts)
        for method in methods:
            behind = bootstrap(task, alone, scores[method, genome], test.amounts)[2]
            value = task.overall(scores[method, genome], test.amounts)
            row[method] = {"accuracy": value, "behind": row["alone"] - value, "interval": list(behind)}
        rows.append(row)
    means = {m: sum(row[m]["behind"] for row in rows) / len(rows) for m in methods}
    data = {"images": SIZES["calibration"], "tested": SIZES["test"], "behind": means}
    return {
        **data,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
        "passes": passes,
        "cpu_seconds": seconds,
        "networks": rows,
    }


def speed(rounds: int = 7) -> dict[str, Any]:
    """Ratios of a super-network's step to its networks' own."""
    from trimtab.core.method import Elastic, Lesson
    from trimtab.core.method import method as named
    from trimtab.engine.elastic import Supernet, called
    from trimtab.engine.teaching import Teaching
    from trimtab.space import open_space

    draws, found = 4, {}
    images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    for name, transforms in (("mobile-cnn", False), ("mobile-cnn", True), ("vit", False)):
        supernet = Supernet(open_space(name), transforms=transforms)
        method = named("sandwich", between=draws - 2)
        assert isinstance(method, Elastic)
        teaching = Teaching(supernet, method, {"images": images}, labels, 100)
        places = torch.arange(64)
        pupils = method.teach(Lesson(supernet.domain, teaching.offered, 0, 100), Random(0))
        plain = [supernet.extract(pupil.genome).train() for pupil in pupils]
        spent: dict[str, list[float]] = {"super": [], "own": []}
        for _ in range(rounds):
            start = time.thread_time()
            teaching(places, 0)
            spent["super"].append(time.thread_time() - start)
            start = time.thread_time()
            for network in plain:
                loss = torch.nn.functional.cross_entropy(called(network, {"images": images[places]}, {}), labels)
                loss.backward()
            spent["own"].append(time.thread_time() - start)
        start = time.thread_time()
        for i in range(200):
            supernet.bound(pupils[i % draws].genome, leaves=True)
        switch = (time.thread_time() - start) / 200
        ratios = [a / b for a, b in zip(spent["super"], spent["own"], strict=True)]
        found[f"{name}, transformed kernels" if transforms else name] = {
            "step_to_own": median(ratios),
            "switch_to_step": switch / median(spent["super"]),
        }
    return {"speed": found}


def main() -> None:
    """Print the record, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=SIZES["calibration"], help="that are trained on")
    parser.add_argument("--tested", type=int, default=SIZES["test"], help="images that networks are measured on")
    parser.add_argument("--budgets", type=int, default=5, help="networks that are compared")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the first one's passes are what all get")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    SIZES.update({"calibration": args.images, "test": args.tested})
    if args.small:
        SIZES.update({"calibration": 640, "search": 200, "test": 500})
    if args.speed:
        keep_benchmark({"benchmark": "elastic", **speed()}, kept=True)
        return
    if data_folder() is None:
        print("CIFAR-10 lies in the shared data; name its folder in TRIMTAB_DATA")
        return
    epochs, budgets = (1, 2) if args.small else (args.epochs, args.budgets)
    row = measured(epochs, budgets, args.seed, tuple(args.methods))
    keep_benchmark({"benchmark": "elastic", **row}, kept=not args.small)


if __name__ == "__main__":
    main()
