"""GPTQ: below rounding to nearest at equal bits and groups, the more so the fewer the bits."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Int
from trimtab.quant.gptq import GPTQ
from trimtab.quant.rtn import RTN

BITS = (4, 3, 2)
GROUP = 64

CLAIM = Claim(
    method="gptq",
    statement="Compensated rounding has a lower perplexity than rounding to nearest at equal bits and groups; the gap "
    "widens at fewer bits, and the output error of every layer falls.",
    source="Frantar et al. 2022, arXiv:2210.17323, abstract and tables 2 to 4",
    figure="OPT-175B, perplexity on WikiText-2: 8.34 (fp16), 10.54 (RTN, 4 bits), 8.37 (GPTQ, 4 bits), 8.68 (GPTQ, 3 "
    "bits)",
    setting="The shipped language model, linears of all blocks, groups of 64; 24 calibration and 64 test windows of "
    "256 tokens.",
    metric="perplexity a token; gap: difference of perplexities; worst_layer: largest ratio over all linears of the "
    "output error tr(dW G dW^T) to that of rounding to nearest, at 3 bits",
    checks=(
        *(
            Check(f"{b} bits: perplexity below RTN's", f"perplexity_gptq_{b}b", "<", f"perplexity_rtn_{b}b")
            for b in BITS
        ),
        Check("the gap at 3 bits is wider than at 4", "gap_3b", ">", "gap_4b"),
        Check("the gap at 2 bits is wider than at 3", "gap_2b", ">", "gap_3b"),
        Check("the output error falls in every linear", "worst_layer", "<", 1.0),
        Check("2 bits do better than a uniform guess among all tokens", "perplexity_gptq_2b", "<", "tokens"),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    found = {"perplexity": bench.measure().value, "tokens": float(bench.source.config["vocab_size"])}
    for bits in BITS:
        for method in ("rtn", "gptq"):
            found[f"perplexity_{method}_{bits}b"] = bench.measure(f"{method} @ model.layers.*={bits}b/g{GROUP}").value
        found[f"gap_{bits}b"] = found[f"perplexity_rtn_{bits}b"] - found[f"perplexity_gptq_{bits}b"]
    ratios = []
    stream = bench.stream()
    for path, stats in bench.statistics(("gram",)).items():
        site, gram, level = stream.sites[path], stats["gram"], Int(3, GROUP)
        if site.kind != "linear" or site.block is None:
            continue
        weight = stream.weight(site)
        missed = (RTN().solve(weight, level).dense() - weight, GPTQ().solve(weight, level, gram=gram).dense() - weight)
        plain, swept = (float((m @ gram * m).sum()) for m in missed)
        ratios.append(swept / plain)
    return {**found, "worst_layer": max(ratios)}
