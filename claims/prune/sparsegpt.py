"""SparseGPT: below magnitude pruning in one shot, and below Wanda where much goes."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.core.level import parse_level
from trimtab.prune.magnitude import Magnitude
from trimtab.prune.sparsegpt import SparseGPT

LEVELS = {"50": "50%", "70": "70%", "2_4": "2:4"}
METHODS = ("magnitude", "wanda", "sparsegpt")

CLAIM = Claim(
    method="sparsegpt",
    statement="One sweep that lets the weights that stay make good those that go has a lower perplexity than magnitude "
    "pruning, unstructured and 2:4, and than pruning without an update where much goes.",
    source="Frantar and Alistarh 2023, arXiv:2301.00774, tables 1 and 2; Wanda: arXiv:2306.11695, section 5",
    figure="OPT-175B at 50 %, perplexity on WikiText-2: 8.35 (dense), 1.7e4 (magnitude), 8.21 (SparseGPT)",
    setting="The shipped language model, linears of all blocks; 24 calibration and 64 test windows of 256 tokens.",
    metric="perplexity a token; worst_layer: largest ratio over all linears of the output error tr(dW G dW^T) to that "
    "of magnitude pruning, at 50 %",
    checks=(
        *(
            Check(f"{t}: perplexity below magnitude's", f"sparsegpt_{n}", "<", f"magnitude_{n}")
            for n, t in LEVELS.items()
        ),
        Check("70%: perplexity below Wanda's", "sparsegpt_70", "<", "wanda_70"),
        Check("the output error falls in every linear", "worst_layer", "<", 1.0),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Perplexities of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    found = {"dense": bench.measure().value}
    for name, level in LEVELS.items():
        for method in METHODS:
            found[f"{method}_{name}"] = bench.measure(f"{method} @ model.layers.*={level}").value
    ratios, half = [], parse_level("50%")
    stream = bench.stream()
    for path, stats in bench.statistics(("gram",)).items():
        site, gram = stream.sites[path], stats["gram"]
        if site.kind != "linear" or site.block is None:
            continue
        weight = stream.weight(site)
        solved = Magnitude().solve(weight, half), SparseGPT().solve(weight, half, gram=gram)  # type: ignore[arg-type]
        plain, swept = (float(((missed := p.dense() - weight) @ gram * missed).sum()) for p in solved)
        ratios.append(swept / plain)
    return {**found, "worst_layer": max(ratios)}
