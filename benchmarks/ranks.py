"""How well is the order of networks foretold: by what they cost, by what is known of them untrained, by predictors?

Three spaces. NAS-Bench-Macro and NAS-Bench-201 are whole tables of trained networks; of `mobile-cnn` 40 networks are
drawn evenly and trained alone here, on CIFAR-10 at 8 x 8 pixels: 300 steps of 64 of 10,000 images. A predictor is
taught by what a search sees (the first training, or the validation error), of so many networks that are drawn anew
twenty times; judged is its order of all other networks by the error that it never saw (of `mobile-cnn` the same
training's): Kendall's tau-b and Spearman's rho, means over the draws and 95 % intervals of these means. What needs no
teaching is judged on the same networks. `one training` is the order of the error that is seen: nobody who is taught by
it can be expected to do much better; of `mobile-cnn` it is told by the first nine networks, which are trained a second
time on other images. How sure 40 networks are as a sample of their space says `sample`, over redrawn networks.

    python benchmarks/ranks.py --train     # the networks that are not there yet: a quarter of an hour on one core
    python benchmarks/ranks.py             # the orders, some minutes; appends to records/benchmarks/ranks.jsonl
    python benchmarks/ranks.py --page      # docs/ranks.md and docs/ranks.svg anew from the newest records
    python benchmarks/ranks.py --small     # two draws, few cells, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr, t
from torch import nn

from trimtab.catalogue import ROOT, data_folder, keep_benchmark
from trimtab.core.knob import Domain, Genome
from trimtab.parts.breeding import every
from trimtab.parts.neural_predictors import Mixer, Pretrained
from trimtab.parts.predicting import Encoding, Predictor, Ridge
from trimtab.parts.saliency import saliencies
from trimtab.tasks.contest import Contest, operations, photographs
from trimtab.tasks.nas_tables import OPERATIONS, bench201, macro
from trimtab.tasks.untrained_cells import untrained_cell

RECORD, DOCS = ROOT / "records" / "benchmarks" / "ranks.jsonl", ROOT / "docs"
NETWORKS, TWICE, STEPS, IMAGES, PIXELS = 40, 9, 300, 10_000, 8
TAUGHT = {"macro": (20, 80), "nb201": (20, 80), "mobile-cnn": (20,)}
DRAWS = 20
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Field:
    """Networks, what is known of them, and how they came out.

    Fields:
        domain, genomes: the networks.
        seen, unseen: error that teaches, and error that judges.
        free: name -> what costs nothing to know; more of it is taken for better.
        nodes: of the untrained networks, statistics of their layers' outputs and, behind these, of their weights; None
            where the networks cannot be made here.
    """

    domain: Domain
    genomes: list[Genome]
    seen: Array
    unseen: Array
    free: dict[str, Array]
    nodes: Array | None = None

    @cached_property
    def rows(self) -> Array:
        """Genomes as rows of places."""
        return Encoding(self.domain).rows(self.genomes)

    def known(self) -> dict[str, Array]:
        """Scores, small is good, that no training teaches."""
        found = {name: -values for name, values in self.free.items()}
        if self.seen is not self.unseen:
            found["one training"] = self.seen
        if self.nodes is not None:
            half = self.nodes.shape[1] // 2
            found |= {"outputs, summed": -self.nodes[:, :half].sum(1), "weights, summed": -self.nodes[:, half:].sum(1)}
        return found

    def taught(self, few: Array, seed: int) -> dict[str, Array]:
        """Scores of all networks by predictors that are taught by a few."""
        genomes, seen, rows = [self.genomes[i] for i in few], self.seen[few], self.rows[few]
        statistics = np.log(np.stack(list(self.free.values()), 1) + 1e-9)
        drawn = np.random.default_rng(seed).integers(0, len(self.genomes), 400)
        found = {
            "ridge": Ridge(rows, seen).mean(self.rows),
            "gaussian process": Predictor(self.domain, genomes, seen).mean(self.genomes),
            "network, pretrained": Pretrained((self.rows[drawn], statistics[drawn]), rows, seen, seed).mean(self.rows),
            "network": Pretrained(None, rows, seen, seed).mean(self.rows),
        }
        if self.nodes is not None:
            for name, loss in (("mixer", "kendall"), ("mixer, squared errors", "mse")):
                found[name] = Mixer(self.nodes[few], seen, loss, seed).mean(self.nodes)  # type: ignore[arg-type]
        return found


# ---- the spaces


def of_macro(data: Path) -> Field:
    """NAS-Bench-Macro, whole."""
    table = macro(data)
    free = {"flops": table.values["flops"], "parameters": table.values["params"]}
    return Field(table.domain, list(every(table.domain)), table.values["error"], table.values["unseen"], free)


def of_bench201(data: Path, most: int = 1 << 30) -> Field:
    """NAS-Bench-201, whole; multiplications and parameters have one order there."""
    table = bench201(data)
    genomes = list(every(table.domain))[:: max(1, table.domain.count() // most)]
    at = table.index(genomes)
    sizes = {"none": 0, "skip": 0, "pool": 0, "conv1": 1, "conv3": 9}
    weights = np.array([sum(sizes[OPERATIONS[place]] for place in genome) for genome in genomes], dtype=float)
    free = {"flops and parameters": weights, "milliseconds": table.values["ms"][at]}
    nodes = np.array([untrained_cell(genome) for genome in genomes])
    return Field(table.domain, genomes, table.values["error"][at], table.values["unseen"][at], free, nodes)


def trained() -> dict[Genome, dict[str, Any]]:
    """The networks of the record, by genome."""
    if not RECORD.is_file():
        return {}
    rows = [json.loads(line) for line in RECORD.read_text("utf-8").splitlines()]
    return {tuple(row["genome"]): row for row in rows if "genome" in row}


def drawn(domain: Domain) -> list[Genome]:
    """The networks that are trained."""
    rng = Random(0)
    found = dict.fromkeys(domain.random(rng) for _ in range(2 * NETWORKS))
    return list(found)[:NETWORKS]


def space() -> Any:
    """mobile-cnn."""
    from trimtab.space import open_space

    return open_space("mobile-cnn", channels=3, classes=10)


def made(maker: Any, genome: Genome) -> nn.Module:
    """A network that reads photographs at a quarter of their side."""
    return nn.Sequential(nn.AvgPool2d(32 // PIXELS), maker.network(genome).to(memory_format=torch.channels_last))


def train(data: Path) -> None:
    """Train what the record lacks."""
    maker, there = space(), trained()
    for i, genome in enumerate(drawn(maker.domain)):
        if genome in there:
            continue
        start, accuracies = time.process_time(), []
        for seed in range(2 if i < TWICE else 1):
            contest = Contest(data, seed, images=IMAGES, judged=5000, steps=STEPS, rate=5e-3)
            accuracies.append(contest.accuracy(contest.train(partial(made, maker, genome))))
        seconds = (time.process_time() - start) / len(accuracies)
        keep_benchmark({"benchmark": "ranks", "genome": genome, "accuracies": accuracies, "seconds": round(seconds, 2)})


def of_mobile(data: Path) -> Field | None:
    """The networks trained here; None where they are not all there."""
    maker, there = space(), trained()
    genomes = [genome for genome in drawn(maker.domain) if genome in there]
    if len(genomes) < NETWORKS:
        return None
    error = 1 - np.array([there[genome]["accuracies"][0] for genome in genomes])
    images, labels = photographs(data, "train", 64, 49_000)
    found: dict[str, list[float]] = {"flops": [], "parameters": []}
    by_layer: list[dict[str, tuple[float, float]]] = []
    for genome in genomes:
        torch.manual_seed(0)
        net = made(maker, genome)
        found["flops"].append(operations(net, images[:1]))
        found["parameters"].append(sum(p.numel() for p in net.parameters()))
        by_layer.append(saliencies(net, images, labels))
    layers = sorted({layer for known in by_layer for layer in known})
    nodes = np.array([[known.get(layer, (0.0, 0.0))[i] for i in (0, 1) for layer in layers] for known in by_layer])
    free = {name: np.array(values, dtype=float) for name, values in found.items()}
    return Field(maker.domain, genomes, error, error, free, nodes)


# ---- the orders


def concord(one: Array, other: Array) -> tuple[float, float]:
    """Kendall's tau-b and Spearman's rho; 0 where one of them has no order."""
    found = kendalltau(one, other).statistic, spearmanr(one, other).statistic
    return tuple(0.0 if np.isnan(value) else float(value) for value in found)  # type: ignore[return-value]


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of a mean."""
    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)


def measured(name: str, networks: Field, count: int, draws: int) -> Iterator[dict[str, Any]]:
    """A row for each way to tell the order."""
    start, size = time.process_time(), len(networks.genomes)
    scores: dict[str, list[tuple[float, float]]] = {}
    known = networks.known()
    for seed in range(draws):
        few = np.random.default_rng(seed).permutation(size)[:count]
        rest = np.setdiff1d(np.arange(size), few)
        for way, score in (known | networks.taught(few, seed)).items():
            scores.setdefault(way, []).append(concord(score[rest], networks.unseen[rest]))
    seconds = round(time.process_time() - start, 1)
    for way, pairs in scores.items():
        row: dict[str, Any] = {"benchmark": "ranks", "space": name, "networks": size, "taught": count, "way": way}
        for i, kind in enumerate(("tau", "rho")):
            values = [pair[i] for pair in pairs]
            row |= {kind: float(np.mean(values)), f"{kind}_half": half_width(values)}
        if way in known and size < networks.domain.count():
            row["sample"] = sample(known[way], networks.unseen)
        yield row | {"needs": 0 if way in known else count, "draws": draws, "seconds": seconds}


def sample(score: Array, error: Array, redrawn: int = 400) -> list[float]:
    """The middle 95 % of tau over redrawn networks."""
    rng, size = np.random.default_rng(0), len(error)
    some = [rng.integers(0, size, size) for _ in range(redrawn)]
    return [float(x) for x in np.quantile([concord(score[i], error[i])[0] for i in some], (0.025, 0.975))]


# ---- the page

TITLES = {"macro": "NAS-Bench-Macro", "nb201": "NAS-Bench-201", "mobile-cnn": "mobile-cnn, trained here"}
OF = {
    "ridge": "`deeparchitect(by='smbo')`",
    "gaussian process": "`linas`, `simq-nas`",
    "network, pretrained": "`fbnetv3`",
    "network": "`fbnetv3(pretrain=0)`",
    "mixer": "`parzc`",
    "mixer, squared errors": "`parzc(fit='mse')`",
}


def newest() -> dict[str, dict[str, dict[int, dict[str, Any]]]]:
    """The last row of each space, way, and number of networks that teach."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in map(json.loads, RECORD.read_text("utf-8").splitlines()):
        if "way" in row:
            found.setdefault(row["space"], {}).setdefault(row["way"], {})[row["taught"]] = row
    return found


def ordered(ways: dict[str, dict[int, dict[str, Any]]]) -> list[tuple[str, dict[int, dict[str, Any]]]]:
    """What needs no teaching, then what does; each the best first."""
    most = max(max(rows) for rows in ways.values())
    return sorted(ways.items(), key=lambda pair: (pair[1][most]["needs"] > 0, -pair[1][most]["tau"]))


def table(ways: dict[str, dict[int, dict[str, Any]]]) -> str:
    """A space's table."""
    counts = sorted({count for rows in ways.values() for count in rows})
    columns = [f"{kind}, {count} teach" for count in counts for kind in ("tau", "rho")]
    lines = [f"| order by | of | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for way, rows in ordered(ways):
        figures = [f"{rows[c][k]:.3f} ± {rows[c][f'{k}_half']:.3f}" for c in counts for k in ("tau", "rho")]
        lines.append(f"| {way} | {OF.get(way, '')} | {' | '.join(figures)} |")
    return "\n".join(lines)


def plot(spaces: dict[str, dict[str, dict[int, dict[str, Any]]]]) -> str:
    """Tau with its interval, space by space: filled where most networks teach, hollow where few do."""
    parts, top = [], 26
    for name, ways in spaces.items():
        pairs = ordered(ways)
        low = min(0.0, *(row["tau"] - row["tau_half"] for _, rows in pairs for row in rows.values()))

        def across(value: float, low: float = low) -> float:
            return round(200 + 460 * (value - low) / (1 - low), 1)

        bottom = top + 16 + 20 * len(pairs)
        parts.append(f'<text x="10" y="{top}" font-weight="bold">{TITLES[name]}</text>')
        for mark in (0.0, 0.5, 1.0):
            x = across(mark)
            parts.append(f'<line x1="{x}" x2="{x}" y1="{top + 8}" y2="{bottom}" stroke="#bbb"/>')
            parts.append(f'<text x="{x}" y="{bottom + 14}" text-anchor="middle" fill="#777">{mark}</text>')
        for i, (way, rows) in enumerate(pairs):
            y, most = top + 24 + 20 * i, max(rows)
            parts.append(f'<text x="190" y="{y + 4}" text-anchor="end">{way}</text>')
            for count, row in sorted(rows.items()):
                if row["needs"] == 0 and count != most:
                    continue
                colour = "#9e9e9e" if row["needs"] == 0 else "#3949ab"
                ends = [across(row["tau"] + sign * row["tau_half"]) for sign in (-1, 1)]
                parts.append(f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}" stroke="{colour}"/>')
                fill = colour if count == most else "none"
                parts.append(
                    f'<circle cx="{across(row["tau"])}" cy="{y}" r="4" fill="{fill}" stroke="{colour}">'
                    f"<title>{row['tau']:.3f}, {count} teach</title></circle>"
                )
        top = bottom + 44
    style = 'font-family="sans-serif" font-size="12" fill="currentColor"'
    size = f'viewBox="0 0 700 {top - 20}" width="700" height="{top - 20}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"


def write_page() -> None:
    """docs/ranks.md and docs/ranks.svg from the newest records."""
    spaces, networks = newest(), trained()
    spent = sum(len(row["accuracies"]) * row["seconds"] for row in networks.values()) / 60
    twice = np.array([row["accuracies"] for row in networks.values() if len(row["accuracies"]) == 2])
    longest = max((row["seconds"] for row in networks.values()), default=0.0)
    rows = [row for ways in spaces.values() for counts in ways.values() for row in counts.values()]
    minutes = sum({(row["space"], row["taught"]): row["seconds"] for row in rows}.values()) / 60
    text = f"""# Rank correlations

How well is the order of networks foretold by what they cost, by what is known of them untrained, and by the predictors
of the [searchers](search-methods.md)? `benchmarks/ranks.py` says how it is measured, and writes this page from the
newest rows of `records/benchmarks/ranks.jsonl`. {DRAWS} draws of the networks that teach; Kendall's tau-b and
Spearman's rho with the error that nobody saw, on all other networks; 95 % intervals of the means over draws.

![Kendall's tau by space](ranks.svg)

Grey needs no training; blue is taught, by fewer networks where the circle is hollow. `one training` is the order of the
error that teaches.

Compute: {len(networks)} networks trained here, {spent:.0f} minutes of one core in all, the slowest {longest:.0f}
seconds; the orders {minutes:.0f} minutes.
"""
    if "mobile-cnn" not in spaces:
        there = f"{len(networks)} of {NETWORKS}"
        text += f"Of `mobile-cnn`, {there} networks are trained so far, and its orders are not there.\n"
    for name, ways in spaces.items():
        size = next(iter(next(iter(ways.values())).values()))["networks"]
        text += f"\n## {TITLES[name]}\n\n{size:,} networks.\n\n{table(ways)}\n"
        redrawn = [(way, rows[max(rows)]) for way, rows in ordered(ways) if "sample" in rows[max(rows)]]
        if redrawn:
            said = ", ".join(f"{way} {r['sample'][0]:.2f} to {r['sample'][1]:.2f}" for way, r in redrawn)
            text += f"\nTau over redrawn networks, 95 %: {said}."
            text += f" Of {len(twice)} that were trained twice, tau of both trainings is {concord(*twice.T)[0]:.2f}.\n"
    (DOCS / "ranks.md").write_text(text, "utf-8")
    (DOCS / "ranks.svg").write_text(plot(spaces), "utf-8")


def main() -> None:
    """Train, measure and record, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the networks that the record lacks")
    parser.add_argument("--page", action="store_true", help="write the page, and measure nothing")
    parser.add_argument("--small", action="store_true", help="two draws and few cells; nothing is recorded")
    parser.add_argument("--only", nargs="+", choices=tuple(TITLES), default=tuple(TITLES))
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = data_folder()
    if given.page:
        return write_page()
    if data is None:
        return print("the tables and CIFAR-10 lie in the shared data, which are not here: nothing to measure")
    if given.train:
        return train(data)
    spaces = {
        "macro": lambda: of_macro(data),
        "nb201": lambda: of_bench201(data, 500 if given.small else 1 << 30),
        "mobile-cnn": lambda: of_mobile(data),
    }
    for name in given.only:
        if (networks := spaces[name]()) is None:
            print(f"{name}: the record lacks networks; train them with --train")
            continue
        for count in TAUGHT[name]:
            for row in measured(name, networks, count, 2 if given.small else DRAWS):
                keep_benchmark(row, kept=not given.small)


if __name__ == "__main__":
    main()
