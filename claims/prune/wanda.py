"""Wanda: weight times activation picks better than the weight alone."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

LEVELS = {"50": "50%", "60": "60%", "2_4": "2:4"}

OUTLIERS = 20.0

CLAIM = Claim(
    method="wanda",
    statement="Ranking the weights of a row by |w| times the norm of their input has a lower perplexity than magnitude "
    "pruning, without changing a weight that stays; outlier channels of the inputs are why.",
    source="Sun et al. 2023, arXiv:2306.11695, sections 2 and 3, tables 3 and 4",
    figure="LLaMA-7B at 50 %, perplexity on WikiText-2: 5.68 (dense), 17.29 (magnitude), 7.26 (Wanda)",
    setting="The shipped language model, linears of all blocks; 24 calibration and 64 test windows of 256 tokens. "
    "Outlier channels, which a model as small as this has not grown, were planted (4 channels of each norm's output "
    "times 20, the function the same) for the checks that say so.",
    metric="perplexity a token",
    checks=tuple(
        Check(
            f"{level}{words}: perplexity below magnitude's", f"wanda_{name}{planted}", "<", f"magnitude_{name}{planted}"
        )
        for planted, words in (("", ""), ("_planted", " with planted outliers"))
        for name, level in LEVELS.items()
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Perplexities of one draw of calibration and test windows."""
    found = {}
    for planted, outliers in (("", 0.0), ("_planted", OUTLIERS)):
        bench = lab.bench("pocket-lm", seed, outliers)
        found[f"dense{planted}"] = bench.measure().value
        for name, level in LEVELS.items():
            for method in ("magnitude", "wanda"):
                found[f"{method}_{name}{planted}"] = bench.measure(f"{method} @ model.layers.*={level}").value
    return found
