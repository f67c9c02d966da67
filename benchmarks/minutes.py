"""What a search finds in so many minutes of one core: ours beside Optuna alone, whittle, and one-shot random search.

The space `mobile-cnn` on CIFAR-10 at 8 x 8 pixels, 10,000 images to train on, drawn by the seed; sought is the best
network within the geometric mean of the smallest and the largest network's flops. Each searcher gets the same processor
seconds for all that it does, trains in the same loop with the same optimiser and scores networks on the same 2,000
images; a network over the limit is priced and never trained or scored, by anyone. What it then holds for the best is
measured once, on the 10,000 test images. Tables of flops are made beforehand, and nobody's time.

- `trimtab`: an elastic network by uniform sampling for three quarters of the time, then evolution over its networks.
- `one-shot random`: the same training, then random networks: NNI's RandomOneShot, whose code needs an older torch.
  Norms gather their statistics anew for each network, which NNI leaves to its user.
- `optuna, N steps`: Optuna's TPE; each trial trains its network alone for N steps. What it has when time is up counts.
- `whittle`: whittle's own sandwich rule and sampler, then its own random search, in a process of the Python that
  `--whittle` names. Its own networks are LitGPT's language models alone, so that it gets ours, over our shared weights.
  Without `--whittle`, `whittle's recipe`: the same two on our engine.

The elastic ones are trained anew for each budget. Rows go to records/benchmarks/minutes.jsonl, one a seed, and one with
the checks over seeds.

    python benchmarks/minutes.py --whittle PYTHON    # twenty minutes of one core
    python benchmarks/minutes.py --page              # docs/minutes.md and docs/minutes.svg from the newest rows
    python benchmarks/minutes.py --small             # one seed and a few seconds each; nothing is recorded
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimtab.catalogue import ROOT, data_folder, keep_benchmark
from trimtab.core.claim import Check, judge, verdict
from trimtab.core.knob import Genome
from trimtab.core.method import Hunt, Searcher, Trial, method
from trimtab.elasticity import Elasticity
from trimtab.engine.elastic import Supernet, called
from trimtab.engine.jury import Jury
from trimtab.engine.train import Recipe, train
from trimtab.peers import installed

RECORD, DOCS = ROOT / "records" / "benchmarks" / "minutes.jsonl", ROOT / "docs"
SPACE, PIXELS, IMAGES, SEARCHED, TESTED = "mobile-cnn", 8, 10_000, 2_000, 10_000
BUDGETS, SMALL = (15, 30, 60), (4, 8)  # processor seconds
SHARE = 0.75  # of the time, for which an elastic network is trained
TRIAL_STEPS = (100, 300)
OURS = "trimtab"
WORST = 1.0  # the error that a network over the limit counts with


class Bench:
    """One seed's data, and the parts that searchers are made of."""

    def __init__(self, data: Path, seed: int) -> None:
        from trimtab.space import open_space
        from trimtab.tasks.classification import Classification

        parts = {"calibration": ("train", IMAGES, seed * IMAGES), "search": ("train", SEARCHED, 48_000)}
        splits = {name: small(data, *where) for name, where in (parts | {"test": ("test", TESTED, 0)}).items()}
        task = Classification({name: ({"images": images}, labels) for name, (images, labels) in splits.items()})
        self.seed = seed
        self.net = Elasticity(open_space(SPACE, channels=3, classes=10), task, seed=seed, tested=TESTED)
        self.domain = self.net.domain
        self.jury = Jury(task, self.net.items.take(0, self.net.gathered), task.batch("search", SEARCHED, seed))
        ends = [self.flops(self.domain.smallest()), self.flops(self.domain.largest())]
        self.limit = math.sqrt(ends[0] * ends[1])  # flops that a network may take
        self.net.trained("sandwich", 2)  # what torch does once, it does now

    def flops(self, genome: Genome) -> float:
        """Of a network."""
        return float(self.net.costs.price([genome])["flops"][0])

    def steps(self, train: Callable[[int], Any], seconds: float) -> int:
        """Steps that so many seconds are enough for, from the pace of a few."""
        few = 20
        start = time.process_time()
        train(few)
        return max(1, int(seconds * few / (time.process_time() - start)))

    def test(self, supernet: Supernet, genome: Genome) -> float:
        """A network's accuracy on the test images."""
        return 1 - self.net.error(supernet, genome)


@cache
def small(data: Path, split: str, count: int, first: int) -> tuple[Tensor, Tensor]:
    """Photographs at a quarter of their side."""
    from trimtab.tasks.contest import photographs

    images, labels = photographs(data, split, count, first)
    return nn.functional.avg_pool2d(images, 32 // PIXELS), labels


# ---- the searchers: each gives {budget: what it found}


class Race:
    """The trials of a search that ends with its time; `course` says when a better network was found.

    Args:
        seconds: that it has.
        used: of them, before it begins.
    """

    def __init__(self, bench: Bench, seconds: float, used: float = 0.0) -> None:
        self.bench, self.seconds, self.start = bench, seconds, time.process_time() - used
        self.trials: list[Trial] = []
        self.course: list[dict[str, Any]] = []
        self.scored = 0

    def over(self) -> bool:
        """Whether time is up; one network at least is scored."""
        return self.scored > 0 and time.process_time() - self.start >= self.seconds

    def trial(self, genome: Genome, score: Callable[[Genome], float]) -> dict[str, float]:
        """A network priced and, within the limit, scored."""
        values = {"error": WORST, "flops": self.bench.flops(genome)}
        if values["flops"] <= self.bench.limit:
            values["error"], self.scored = score(genome), self.scored + 1
            if not self.course or values["error"] < 1 - self.course[-1]["searched"]:
                spent = round(time.process_time() - self.start, 2)
                self.course.append({"seconds": spent, "searched": 1 - values["error"], "genome": genome})
        self.trials.append(Trial(genome, values))
        return values

    def run(self, searcher: str, score: Callable[[Genome], float]) -> None:
        """Trials that a searcher proposes, until time is up."""
        asked, limits, seed = method(searcher), {"flops": self.bench.limit}, self.bench.seed
        assert isinstance(asked, Searcher)
        while not self.over():
            hunt = Hunt(self.bench.domain, tuple(self.trials), ("error",), limits, seed=seed)
            for genome in asked.ask(hunt, 1, rng=Random(f"{seed}/{len(self.trials)}")):
                self.trial(genome, score)

    def found(self, budget: float, accuracy: Callable[[Genome], float]) -> dict[str, Any]:
        """The best network so far when a budget was spent, and its accuracy on the test images; of a search that had
        none yet, the first.
        """
        last = [point for point in self.course if point["seconds"] <= budget] or self.course[:1]
        return last[-1] | {"accuracy": accuracy(last[-1]["genome"]), "scored": self.scored}


def one_shot(
    bench: Bench, budgets: Sequence[float], how: str, searchers: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Elastic networks, each searched by every searcher as though it were the only one."""
    found: dict[str, dict[str, Any]] = {name: {} for name in searchers}
    for budget in budgets:
        steps = bench.steps(partial(bench.net.trained, how), SHARE * budget)
        start = time.process_time()
        supernet = bench.net.trained(how, steps)
        trained = time.process_time() - start
        for name, searcher in searchers.items():
            race = Race(bench, budget, trained)
            race.run(searcher, partial(bench.jury.of, supernet))
            found[name][str(budget)] = race.found(math.inf, partial(bench.test, supernet)) | {"steps": steps}
    return found


def optuna(bench: Bench, budgets: Sequence[float], steps: int) -> dict[str, Any]:
    """Networks trained alone, as Optuna proposes them."""
    kept: dict[Genome, Supernet] = {}

    def score(genome: Genome) -> float:
        kept[genome] = bench.net.alone(genome, steps)
        return bench.jury.of(kept[genome], genome)

    race = Race(bench, max(budgets))
    race.run("optuna-tpe", score)
    return {
        str(budget): race.found(budget, lambda genome: bench.test(kept[genome], genome)) | {"steps": steps}
        for budget in budgets
    }


def whittle(bench: Bench, budgets: Sequence[float]) -> dict[str, Any]:
    """whittle's training strategy, sampler and search on the shared weights."""
    choice = importlib.import_module("syne_tune.config_space").choice
    sampling, searching = (
        importlib.import_module(f"whittle.{n}") for n in ("sampling.random_sampler", "search.search")
    )
    space = {knob.name: choice(list(range(len(knob.options)))) for knob in bench.domain.knobs}
    strategy = importlib.import_module("whittle.training_strategies").SandwichStrategy(
        sampler=sampling.RandomSampler(space, seed=bench.seed),
        loss_function=nn.CrossEntropyLoss(reduction="sum"),
        device="cpu",
    )

    def genome_of(config: Mapping[str, Any]) -> Genome:
        return bench.domain.canonical(int(config[knob.name]) for knob in bench.domain.knobs)

    class Super:
        """The face of whittle's networks."""

        def __init__(self, supernet: Supernet) -> None:
            self.supernet, self.genome = supernet, bench.domain.largest()

        def reset_super_network(self) -> None:
            self.genome = bench.domain.largest()

        def set_sub_network(self, **config: Any) -> None:
            self.genome = genome_of(config)

        def __call__(self, images: Tensor) -> Tensor:
            return called(self.supernet.bound(self.genome)[0].train(), {"images": images}, {})

    def trained(steps: int) -> Supernet:
        supernet, items = Supernet(bench.net.maker, bench.seed), bench.net.items
        optimiser = torch.optim.AdamW(supernet.parameters(), lr=bench.net.rate, weight_decay=bench.net.decay)
        settings = {"batch": bench.net.batch, "rate": bench.net.rate, "decay": bench.net.decay}
        model = Super(supernet)

        def step(places: Tensor, number: int) -> tuple[float, int]:
            return strategy(model, items.inputs["images"][places], items.labels[places]), len(places)

        recipe = Recipe(steps=steps, seed=bench.seed, **settings)
        train(supernet, None, len(items), recipe, optimiser, backward=step)  # type: ignore[arg-type]
        return supernet.requires_grad_(False)

    found = {}
    for budget in budgets:
        steps = bench.steps(trained, SHARE * budget)
        start = time.process_time()
        supernet = trained(steps)
        race = Race(bench, budget, time.process_time() - start)

        def objective(
            config: Mapping[str, Any], race: Race = race, supernet: Supernet = supernet
        ) -> tuple[float, float]:
            if race.over():
                raise StopIteration
            values = race.trial(genome_of(config), partial(bench.jury.of, supernet))
            return values["error"], values["flops"]

        with contextlib.suppress(StopIteration):  # its search knows numbers of samples, and no time
            searching.multi_objective_search(objective, space, num_samples=1_000_000, seed=bench.seed, verbose=False)
        found[str(budget)] = race.found(math.inf, partial(bench.test, supernet)) | {"steps": steps}
    return found


# ---- measuring


def measured(data: Path, seed: int, budgets: Sequence[float], python: str | None) -> dict[str, dict[str, Any]]:
    """What every searcher found, by name and budget."""
    bench = Bench(data, seed)
    found = one_shot(bench, budgets, "uniform-sampling", {OURS: "evolution", "one-shot random": "random-search"})
    if python is None:
        found |= one_shot(bench, budgets, "sandwich", {"whittle's recipe": "random-search"})
    else:
        line = [python, str(Path(__file__).resolve()), "--of-whittle", "--seeds", str(seed), "--budgets"]
        done = subprocess.run([*line, *map(str, budgets)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"whittle was to run in {python}, and it ended with: {done.stderr.strip()[-600:]}")
        found["whittle"] = json.loads(done.stdout.splitlines()[-1])
    for steps in TRIAL_STEPS if installed("optuna") else ():
        found[f"optuna, {steps} steps"] = optuna(bench, budgets, steps)
    return found


def checked(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether ours finds a more accurate network than each other one, at every budget, over seeds."""
    judged = []
    for budget in rows[0]["budgets"]:
        values = [{name: by[str(budget)]["accuracy"] for name, by in row["found"].items()} for row in rows]
        for name in values[0]:
            if name != OURS:
                judged.append(judge(Check(f"{OURS} above {name} at {budget} s", OURS, ">", name), values))
    return {"checks": [asdict(j) for j in judged], "verdict": verdict(judged)}


# ---- the page


def newest(budgets: Sequence[int] = BUDGETS) -> list[dict[str, Any]]:
    """The last row of each seed, at these budgets."""
    rows = [json.loads(line) for line in RECORD.read_text("utf-8").splitlines()] if RECORD.is_file() else []
    return list({row["seed"]: row for row in rows if "found" in row and row["budgets"] == list(budgets)}.values())


def spread(rows: Sequence[Mapping[str, Any]], name: str, budget: int) -> tuple[float, float]:
    """Mean accuracy over seeds, and the half of its 95 % interval."""
    values = [{"accuracy": row["found"][name][str(budget)]["accuracy"]} for row in rows]
    judged = judge(Check("", "accuracy", ">", 0.0), values)
    return judged.left, judged.half_width


def table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Accuracies by searcher and budget, and the networks that were scored."""
    lines = ["| | " + " | ".join(f"{b} s" for b in BUDGETS) + " | networks scored |", "|---" * (len(BUDGETS) + 2) + "|"]
    for name in names:
        figures = ["{:.1f} ± {:.1f}".format(*(100 * x for x in spread(rows, name, budget))) for budget in BUDGETS]
        scored = statistics.mean(row["found"][name][str(BUDGETS[-1])]["scored"] for row in rows)
        lines.append(f"| {name} | {' | '.join(figures)} | {scored:.0f} |")
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Accuracy against processor seconds, with intervals over seeds."""
    points = {name: [spread(rows, name, budget) for budget in BUDGETS] for name in names}
    ends = [mean + sign * half for each in points.values() for mean, half in each for sign in (-1, 1)]
    low, high = math.floor(20 * min(ends)) / 20, math.ceil(20 * max(ends)) / 20
    colours = ("#3949ab", "#9e9e9e", "#00897b", "#fb8c00", "#d81b60")
    parts = []

    def up(value: float) -> float:
        return round(290 - 260 * (value - low) / (high - low), 1)

    for i in range(round(20 * (high - low)) + 1):
        y, value = up(low + i / 20), low + i / 20
        parts.append(f'<line x1="60" x2="480" y1="{y}" y2="{y}" stroke="#bbb"/>')
        parts.append(f'<text x="52" y="{y + 4}" text-anchor="end" fill="#777">{value:.0%}</text>')
    for i, budget in enumerate(BUDGETS):
        parts.append(f'<text x="{100 + 170 * i}" y="312" text-anchor="middle" fill="#777">{budget} s</text>')
    for number, (name, each) in enumerate(points.items()):
        colour, shift = colours[number % len(colours)], 5 * (number - 2)
        places = [(100 + 170 * i + shift, mean, half) for i, (mean, half) in enumerate(each)]
        line = " ".join(f"{x},{up(mean)}" for x, mean, _ in places)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, mean, half in places:
            parts.append(f'<line x1="{x}" x2="{x}" y1="{up(mean - half)}" y2="{up(mean + half)}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{x}" cy="{up(mean)}" r="4" fill="{colour}"><title>{mean:.3f}</title></circle>')
        parts.append(f'<text x="500" y="{60 + 22 * number}" fill="{colour}">{name}</text>')
    style = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    size = 'viewBox="0 0 660 325" width="660" height="325"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def write_page() -> None:
    """docs/minutes.md and docs/minutes.svg from the newest row of each seed."""
    rows = newest()
    text = f"""# Searchers by the minute

What does a search find in so many processor seconds of one core? `benchmarks/minutes.py` says how it is measured, and
writes this page from the newest rows of `records/benchmarks/minutes.jsonl`: `{SPACE}` on CIFAR-10 at {PIXELS} x
{PIXELS} pixels, the best network within a limit of flops, its accuracy in per cent on {TESTED:,} images that no search
saw, and 95 % intervals over seeds.

An elastic network is one training for every limit; here is one limit, for which it has to be paid whole. A network that
is trained alone gets every step of its training to itself.
"""
    text += measured_part(rows) if rows else "\nNo seed has been measured yet.\n"
    (DOCS / "minutes.md").write_text(text, "utf-8")


def measured_part(rows: Sequence[Mapping[str, Any]]) -> str:
    """The plot, the table and the checks."""
    names = [name for name in rows[0]["found"] if all(name in row["found"] for row in rows)]
    found = checked([{**row, "found": {name: row["found"][name] for name in names}} for row in rows])
    said = "\n".join(f"- {check['say']}: {'held' if check['held'] else 'not held'}" for check in found["checks"])
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    (DOCS / "minutes.svg").write_text(plot(rows, names), "utf-8")
    return f"""
![Accuracy by processor seconds](minutes.svg)

{table(rows, names)}

{len(rows)} seeds, {minutes:.0f} minutes of this processor in all. Verdict: {found["verdict"]}.

{said}
"""


def main() -> None:
    """Measure and record, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one seed and a few seconds; nothing is recorded")
    parser.add_argument("--whittle", metavar="PYTHON", help="the Python that whittle is installed for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="processor seconds")
    parser.add_argument("--page", action="store_true", help="write the page, and measure nothing")
    parser.add_argument("--of-whittle", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder()
    if given.page:
        return write_page()
    if data is None:
        return print("CIFAR-10 lies in the shared data, which are not here; name their folder in TRIMTAB_DATA")
    if given.of_whittle:
        return print(json.dumps(whittle(Bench(data, given.seeds[0]), given.budgets)))
    if given.small:
        given.seeds, given.budgets = given.seeds[:1], SMALL
    rows = []
    for seed in given.seeds:
        start = sum(os.times()[:4])  # with those of processes that ended
        found = measured(data, seed, given.budgets, given.whittle)
        facts = {"space": SPACE, "budgets": list(given.budgets)}
        rows.append({"benchmark": "minutes", "seed": seed, **facts, "found": found})
        rows[-1]["cpu_seconds"] = round(sum(os.times()[:4]) - start)
        keep_benchmark(rows[-1], kept=not given.small)
    told = {"benchmark": "minutes", "seeds": given.seeds, "budgets": list(given.budgets)}
    keep_benchmark(told | checked(rows), kept=not given.small)


if __name__ == "__main__":
    main()
