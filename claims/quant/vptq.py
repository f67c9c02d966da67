"""VPTQ: at about two bits a weight below GPTQ and below plain k-means codebooks."""

from __future__ import annotations

from math import exp
from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.core.level import parse_level
from trimtab.engine.apply import seed_for
from trimtab.engine.measure import measure as score
from trimtab.quant.vptq import VPTQ

BOOK = "vq/d4/k256"
PLANS = {
    "vptq": f"vptq @ model.layers.*={BOOK}",
    "vptq_residual": f"vptq @ model.layers.*={BOOK}/r16",
    "gptq": "gptq @ model.layers.*=2b/g128",
    "gptq_3b": "gptq @ model.layers.*=3b/g128",
}

CLAIM = Claim(
    method="vptq",
    statement="Codebooks chosen with second-order compensation lose less at about two bits a weight than GPTQ and than "
    "plain k-means codebooks, and a residual codebook loses less again.",
    source="Liu et al. 2024, arXiv:2409.17066, abstract, section 3.2.2 and table 2",
    figure="2-bit perplexity 0.01-0.34 (LLaMA-2), 0.38-0.68 (Mistral-7B), 4.41-7.34 (LLaMA-3) below the best before",
    setting="The shipped language model, linears of all blocks; codebooks of 256 vectors of 4 weights, a residual one "
    "of 16; GPTQ at 2 bits in groups of 128; bytes counted with codebooks, scales and zero points. 24 calibration "
    "and 64 test windows of 256 tokens. Plain k-means: an identity for the Hessian. No outlier codebook.",
    metric="perplexity a token; bits: stored a weight",
    checks=(
        Check("perplexity below GPTQ's", "perplexity_vptq", "<", "perplexity_gptq"),
        Check("at no more bits than GPTQ", "bits_vptq", "<=", "bits_gptq"),
        Check("perplexity below plain k-means'", "perplexity_vptq", "<", "perplexity_kmeans"),
        Check("a residual codebook lowers it", "perplexity_vptq_residual", "<", "perplexity_vptq"),
        Check("with it below 3-bit GPTQ", "perplexity_vptq_residual", "<", "perplexity_gptq_3b"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    found = {name: bench.measure(plan) for name, plan in PLANS.items()}
    stream = bench.stream()
    for path, site in stream.sites.items():
        if site.kind == "linear" and site.block is not None:
            weight = stream.weight(site)
            identity, rng = torch.eye(weight.shape[1]), seed_for(path, seed)
            stream.put(site, VPTQ().solve(weight, parse_level(BOOK), gram=identity, rng=rng))
    plain = score(stream, bench.test, bench.task, bench.chunk)
    return {
        "perplexity": bench.measure().value,
        **{f"perplexity_{name}": m.value for name, m in found.items()},
        "perplexity_kmeans": exp(float(plain.nll.sum() / plain.count.sum())),
        **{f"bits_{name}": m.bits for name, m in found.items()},
    }
