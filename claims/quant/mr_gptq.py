"""MR-GPTQ: at MXFP4 below rounding and plain GPTQ, and near NVFP4."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

PLAIN = "mr-gptq(rule='minmax', reorder=False)"
PLANS = {
    "rtn_mxfp4": "rtn @ model.layers.*=mxfp4",
    "rtn_mxfp4_h": "rtn @ model.layers.*=mxfp4/h",
    "rtn_nvfp4": "rtn @ model.layers.*=nvfp4",
    "rtn_nvfp4_h": "rtn @ model.layers.*=nvfp4/h",
    "gptq_mxfp4": f"{PLAIN} @ model.layers.*=mxfp4",
    "gptq_nvfp4": f"{PLAIN} @ model.layers.*=nvfp4",
    "mr_mxfp4": "mr-gptq @ model.layers.*=mxfp4/h",
    "mr_nvfp4": "mr-gptq @ model.layers.*=nvfp4/h",
}

CLAIM = Claim(
    method="mr-gptq",
    statement="Rotated blocks, fitted scales and compensated rounding bring MXFP4 below rounding to nearest and plain "
    "GPTQ and closer to NVFP4; rotation alone helps MXFP4, and NVFP4 little or not at all.",
    source="Egiazarian et al. 2025, arXiv:2509.23202, abstract and section 3",
    figure="Llama-3.1-8B, recovery: MXFP4 88.1 % (RTN), 89.7 % (GPTQ), 93.3 % (MR-GPTQ); NVFP4 94.8, 95.7, 95.8 %",
    setting="The shipped language model, weights of all blocks' linears, activations in full precision; 24 calibration "
    "and 64 test windows of 256 tokens. Plain GPTQ: no rotation, scales from the largest weight, columns in order.",
    metric="perplexity a token; kl: mean KL divergence to the original, nats a token",
    checks=(
        Check("MXFP4: perplexity below round-to-nearest", "perplexity_mr_mxfp4", "<", "perplexity_rtn_mxfp4"),
        Check("MXFP4: perplexity below plain GPTQ", "perplexity_mr_mxfp4", "<", "perplexity_gptq_mxfp4"),
        Check("MXFP4: KL below plain GPTQ", "kl_mr_mxfp4", "<", "kl_gptq_mxfp4"),
        Check("MXFP4's distance to NVFP4 shrinks", "gap_mr", "<", "gap_rtn"),
        Check("rotation helps rounding to MXFP4", "kl_rtn_mxfp4_h", "<", "kl_rtn_mxfp4"),
        Check("and helps rounding to NVFP4 less", "rotated_nvfp4", ">", "rotated_mxfp4"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    found = {name: bench.measure(plan) for name, plan in PLANS.items()}
    kl = {f"kl_{name}": m.damage for name, m in found.items()}
    return {
        "perplexity": bench.measure().value,
        **{f"perplexity_{name}": m.value for name, m in found.items()},
        **kl,
        "gap_rtn": kl["kl_rtn_mxfp4"] - kl["kl_rtn_nvfp4"],
        "gap_mr": kl["kl_mr_mxfp4"] - kl["kl_mr_nvfp4"],
        "rotated_mxfp4": kl["kl_rtn_mxfp4_h"] / kl["kl_rtn_mxfp4"],
        "rotated_nvfp4": kl["kl_rtn_nvfp4_h"] / kl["kl_rtn_nvfp4"],
        "bits_mxfp4": found["mr_mxfp4"].bits,
        "bits_nvfp4": found["mr_nvfp4"].bits,
    }
