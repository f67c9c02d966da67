"""ZeroQuant-V2: a low-rank matrix of rank 8 makes good part of what rounding loses, for few bytes."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

LAYERS = "model.layers.*"
BITS = (4, 3)
PLANS = {
    f"{name}_{bits}b": f"{plan}={bits}b/row{rank}"
    for bits in BITS
    for name, plan, rank in (
        ("rtn", f"rtn @ {LAYERS}", ""),
        ("rtn_lorc", f"zeroquant-v2(inner='rtn') @ {LAYERS}", "+r8"),
        ("gptq", f"gptq @ {LAYERS}", ""),
        ("gptq_lorc", f"zeroquant-v2 @ {LAYERS}", "+r8"),
    )
}

CLAIM = Claim(
    method="zeroquant-v2",
    statement="Adding the rank-8 part of the rounding error lowers perplexity over rounding to nearest and over GPTQ "
    "alone, for a small increase in size.",
    source="Yao et al. 2023, arXiv:2303.08302, section 5",
    setting="The shipped language model, linears of all blocks, whole rows as groups, weights only; 24 calibration and "
    "64 test windows of 256 tokens. The model is 256 wide, so that rank 8 is a larger share of a matrix than in the "
    "paper.",
    metric="perplexity a token; kl: mean KL divergence to the original, nats a token; bits: stored a weight",
    checks=(
        *(
            Check(
                f"{bits} bits: {metric} below {inner.upper()} alone",
                f"{metric}_{inner}_lorc_{bits}b",
                "<",
                f"{metric}_{inner}_{bits}b",
            )
            for bits in BITS
            for inner in ("rtn", "gptq")
            for metric in ("perplexity", "kl")
        ),
        Check("3 bits with rank 8 take fewer bits than 4 bits without", "bits_rtn_lorc_3b", "<", "bits_rtn_4b"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    results = {name: bench.measure(plan) for name, plan in PLANS.items()}
    return {
        "perplexity": bench.measure().value,
        **{f"perplexity_{name}": r.value for name, r in results.items()},
        **{f"kl_{name}": r.damage for name, r in results.items()},
        **{f"bits_{name}": r.bits for name, r in results.items()},
    }
