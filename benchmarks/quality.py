"""What each adapter method learns at equal trained numbers and equal steps, on text and on images.

Text: the shipped language model of Python code, on its way to the prose of Python's reference in 24 steps of 4 windows
of 64 tokens; nats a token on windows that nothing else saw. Images: the shipped transformer for digits, with a fresh
head, on its way to the ten classes of CIFAR-10 in grey at 8 x 8 pixels, in 120 steps of 32 images; accuracy on 1,500
test images. AdamW, the better of two rates by items that are neither trained on nor judged by; three seeds, which draw
the order of the items and what a method draws; 95 % intervals of the difference from LoRA, seed by seed.

A method's rank is the largest at which it trains no more numbers than LoRA of rank 8, or of rank 4 on images; a fresh
head comes on top, the same for all. Behind these stand what trains other numbers: all linears (full), the head alone,
and those that also round the weights to 4 bits. A JSON line a method is printed and appended to
records/benchmarks/quality.jsonl; the page takes the newest of each.

    python benchmarks/quality.py                  # some twenty minutes on one core; images need the shared data
    python benchmarks/quality.py --only text --methods lora paca
    python benchmarks/quality.py --page           # docs/quality.md and docs/quality.svg anew from the newest records
    python benchmarks/quality.py --small          # one seed, few steps, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

METHODS = (
    *("lora", "lora(scaling='root')", "dora", "paca", "s2ft", "lora-ga", "corda", "hydra", "smora", "mos", "bi-lora"),
    *("loram", "lst"),
)
GRIDS = {"peqa": "4b/row/sym", "l4q": "4b/row/sym", "aqt(inputs=8)": "4b/row/sym"}
OTHER = ("full", "head alone", *GRIDS)
RANKS = {"text": 8, "images": 4}
T95 = (12.706, 4.303, 3.182, 2.776)
Found = tuple[float, int, str, float]
"""What a run gave: the measured value, how many numbers were trained, at which level, the chosen rate."""


def level_of(base: Any, method: str, numbers: int) -> str:
    """The level at which a method trains at most so many numbers."""
    from trimtab.lab import matched

    return "w25%" if method == "lst" else matched(base, method, numbers)


class Text:
    """The language model and its new domain, see `trimtab.lab.Shift`."""

    metric, higher, steps = "nats a token", False, 24

    def __init__(self, small: bool) -> None:
        self.steps = 3 if small else self.steps

    def numbers(self) -> int:
        """That LoRA trains."""
        from trimtab.adapting import open_base

        sites = [s for s in open_base("pocket-lm").sites if s.kind == "linear" and s.block is not None]
        return sum(RANKS["text"] * sum(s.shape) for s in sites)

    def before(self) -> float:
        """The model as it came."""
        from trimtab.lab import Shift

        return Shift(steps=self.steps).before()[0]

    def run(self, method: str, seed: int, numbers: int) -> Found | None:
        """One method at the better of two rates."""
        from trimtab.lab import Shift

        shift = Shift(seed, self.steps)
        if method == "head alone":
            return None
        if method == "full":
            made = shift.full()
            return made.loss, made.trained, "", 0.0
        level = GRIDS.get(method) or level_of(shift.open(), method, numbers)
        rates = (4e-3, 1.6e-2) if method == "peqa" else (4e-4, 1.6e-3) if method.startswith("aqt") else Shift.RATES
        made = shift.run(method, level, rates=rates)
        return made.loss, made.trained, level, 0.0


class Images:
    """The image transformer and its new classes."""

    metric, higher, steps = "accuracy", True, 120
    BATCH = 32

    def __init__(self, small: bool) -> None:
        from benchmarks.resnet import images_of

        self.steps = 5 if small else self.steps
        cuts = {"train": ("train", 3000, 0), "choose": ("train", 500, 3000), "judge": ("test", 1500, 0)}
        self.data = {}
        for name, (split, count, start) in cuts.items():
            images, labels = images_of(split, count, start=start)
            grey = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4)
            self.data[name] = (grey / 2).clamp(-1, 1), labels.long()

    def opened(self, seed: int) -> Any:
        """The model with a fresh head."""
        from trimtab.adapting import open_base
        from trimtab.models.head import give_head

        base = open_base("pocket-vit")
        base.classes = tuple(map(str, range(10)))
        base.head = give_head(base.model, base.sites, base.classes, seed)
        return base

    def numbers(self) -> int:
        """That LoRA trains."""
        sites = [s for s in self.opened(0).sites if s.kind == "linear" and s.block is not None]
        return sum(RANKS["images"] * sum(s.shape) for s in sites)

    def before(self) -> float:
        """Chance: the head is fresh."""
        return 0.1

    def run(self, method: str, seed: int, numbers: int) -> Found:
        """One method at the better of two rates."""
        low = 2e-4 if method == "full" or method.startswith("aqt") else 2e-3
        tried = [self._once(method, seed, numbers, rate) for rate in (low, 4 * low)]
        return max(tried, key=lambda pair: pair[0])[1]

    def _once(self, method: str, seed: int, numbers: int, rate: float) -> tuple[float, Found]:
        from trimtab.adapting import Material, chosen_sites, wrap_all
        from trimtab.core.level import parse_level
        from trimtab.core.plan import parse_method
        from trimtab.engine.train import Recipe, train
        from trimtab.tasks.base import Batch
        from trimtab.tasks.classification import Classification
        from trimtab.tasks.training import Prediction

        base = self.opened(seed)
        images, labels = self.data["train"]
        prediction = Prediction({"pixel_values": images}, labels)
        level = "" if method in ("full", "head alone") else GRIDS.get(method) or level_of(base, method, numbers)
        if level:
            chosen: Any = parse_method(method)
            data = Material(prediction, Batch({}, labels, labels), Classification({}), "")
            wrap_all(base, data, chosen_sites(base, (), chosen), chosen, parse_level(level), seed)
        else:
            base.model.requires_grad_(False)
            for site in base.sites:
                if site.path == base.head or (method == "full" and site.kind == "linear"):
                    base.model.get_submodule(site.path).requires_grad_(True)
        trained = [p for p in base.model.parameters() if p.requires_grad]
        recipe = Recipe(self.steps, self.BATCH, rate=rate, recompute=0.0, seed=seed)
        train(base.model, prediction, len(labels), recipe, torch.optim.AdamW(trained, rate, weight_decay=0.0))
        base.model.eval()
        right = {}
        with torch.no_grad():
            for part in ("choose", "judge"):
                said = torch.cat([base.model(pixel_values=x).logits for x in self.data[part][0].split(250)])
                right[part] = float((said.argmax(1) == self.data[part][1]).float().mean())
        return right["choose"], (right["judge"], sum(p.numel() for p in trained), level, rate)


SETTINGS: dict[str, Callable[[bool], Any]] = {"text": Text, "images": Images}


def half_width(values: list[float]) -> float:
    """Of the 95 % interval of a mean."""
    if len(values) < 2:
        return float("nan")
    return T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def measure(name: str, methods: list[str], seeds: int, small: bool) -> Iterator[dict[str, Any]]:
    """A row for each method in a setting."""
    setting = SETTINGS[name](small)
    about = {"benchmark": "quality", "setting": name, "metric": setting.metric, "higher": setting.higher}
    about |= {"steps": setting.steps, "numbers": setting.numbers(), "before": setting.before()}
    for method in methods:
        began = time.process_time()
        made = [setting.run(method, seed, about["numbers"]) for seed in range(seeds)]
        if made[0] is None:
            continue
        values = [m[0] for m in made]
        row = {"method": method, "values": values, "trained": made[0][1], "level": made[0][2]}
        yield about | row | {"rates": [m[3] for m in made], "seconds": round(time.process_time() - began, 1)}


# ---- the page

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECORD = DOCS.parent / "records" / "benchmarks" / "quality.jsonl"
TITLES = {"text": "From code to prose", "images": "From digits to pictures of ten other classes"}


def newest() -> dict[str, dict[str, Any]]:
    """Each setting with the last row of each method, and its difference from LoRA, seed by seed."""
    found: dict[str, dict[str, Any]] = {name: {} for name in SETTINGS}
    for row in map(json.loads, RECORD.read_text("utf-8").splitlines()):
        found[row["setting"]].setdefault("methods", {})[row["method"]] = row
        found[row["setting"]] |= {k: row[k] for k in ("metric", "higher", "steps", "before", "date")}
    found = {name: setting for name, setting in found.items() if "lora" in setting.get("methods", {})}
    for setting in found.values():
        for row in setting["methods"].values():
            pairs = zip(row["values"], setting["methods"]["lora"]["values"], strict=True)
            apart = [a - b for a, b in pairs]
            row |= {"mean": statistics.mean(row["values"])}
            row |= {"to_lora": statistics.mean(apart), "half_width": half_width(apart)}
    return found


def ordered(row: dict[str, Any], names: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Methods among these, the best first."""
    found = [(name, row["methods"][name]) for name in names if name in row["methods"]]
    return sorted(found, key=lambda pair: pair[1]["mean"], reverse=row["higher"])


def table(row: dict[str, Any]) -> str:
    """A setting's table."""
    lines = [f"| method | level | numbers trained | {row['metric']} | less LoRA's, 95 % |", "|---|---|---|---|---|"]
    for names in (METHODS, OTHER):
        for name, found in ordered(row, names):
            apart = "" if name == "lora" else f"{found['to_lora']:+.3f} ± {found['half_width']:.3f}"
            lines.append(f"| `{name}` | {found['level']} | {found['trained']:,} | {found['mean']:.3f} | {apart} |")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]]) -> str:
    """Both settings as points with intervals of the difference from LoRA, better to the right."""
    parts, top = [], 30
    for name, row in rows.items():
        pairs = [(n, f) for names in (METHODS, OTHER) for n, f in ordered(row, names) if n != "lora"]
        sign = 1 if row["higher"] else -1
        ends = [sign * f["to_lora"] + s * f["half_width"] for _, f in pairs for s in (-1, 1)]
        low, high = min(*ends, 0.0), max(*ends, 0.0)

        def across(value: float, low: float = low, high: float = high) -> float:
            return round(230 + 440 * (value - low) / (high - low), 1)

        parts.append(f'<text x="10" y="{top}" font-weight="bold">{TITLES[name]}</text>')
        bottom = top + 24 + 22 * len(pairs)
        parts.append(f'<line x1="{across(0)}" x2="{across(0)}" y1="{top + 8}" y2="{bottom}" stroke="#888"/>')
        for i, (method, found) in enumerate(pairs):
            y, at, half = top + 24 + 22 * i, sign * found["to_lora"], found["half_width"]
            colour = "#3949ab" if method in METHODS else "#9e9e9e"
            parts += [
                f'<text x="220" y="{y + 4}" text-anchor="end">{method}</text>',
                f'<line x1="{across(at - half)}" x2="{across(at + half)}" y1="{y}" y2="{y}" stroke="{colour}"/>',
                f'<circle cx="{across(at)}" cy="{y}" r="4" fill="{colour}"/>',
            ]
        labels = {low: "middle", 0.0: "middle", high: "middle"}
        parts += [
            f'<text x="{across(v)}" y="{bottom + 14}" text-anchor="{a}" fill="#777">{v:+.3f}</text>'
            for v, a in labels.items()
        ]
        parts.append(f'<text x="10" y="{bottom + 14}" fill="#777">{row["metric"]}, better than LoRA by</text>')
        top = bottom + 50
    style = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    size = f'viewBox="0 0 700 {top - 20}" width="700" height="{top - 20}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def write_page() -> None:
    """docs/quality.md and docs/quality.svg from the newest records."""
    rows = newest()
    text = """# Quality of adapters

What each method of [adapt](adapt.md) learns at equal trained numbers and equal steps: `benchmarks/quality.py`, three
seeds, AdamW, the better of two rates by items that are neither trained on nor judged by. A method's rank is the largest
at which it trains no more than LoRA. This page and the plot are written from the newest rows of
`records/benchmarks/quality.jsonl`; models and steps are small, so that orders here are those of short trainings.

![Differences from LoRA](quality.svg)
"""
    for name, row in rows.items():
        about = f"Before: {row['before']:.3f} {row['metric']}; {row['steps']} steps, {row['date'][:10]}."
        text += f"\n## {TITLES[name]}\n\n{about}\n\n{table(row)}\n"
    text += """
Below those of equal numbers stand others: `full` trains every matrix of the blocks, `head alone` the fresh head, and
`peqa`, `l4q` and `aqt` leave matrices of 4 bits, one scale a row.
"""
    (DOCS / "quality.md").write_text(text, "utf-8")
    (DOCS / "quality.svg").write_text(plot(rows), "utf-8")


def main() -> None:
    """Run and record, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), default=tuple(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *OTHER])
    parser.add_argument("--page", action="store_true", help="write the page, and measure nothing")
    parser.add_argument("--small", action="store_true", help="one seed and few steps; nothing is recorded")
    asked = parser.parse_args()
    if asked.page:
        write_page()
        return
    from trimtab.catalogue import keep_benchmark

    torch.set_num_threads(1)
    for name in asked.only:
        for row in measure(name, asked.methods, 1 if asked.small else 3, asked.small):
            keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
