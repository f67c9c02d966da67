"""FineQuant: groups as fine as each matrix needs: near the finest in quality, with fewer scales."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

OUTLIERS = 0.05  # a norm's channel times 0.05, the columns that read it times 20
PLANS = {
    "row": "rtn @ model.layers.*=4b/row",
    "fine": "rtn @ model.layers.*=4b/g16",
    "adaptive": "finequant @ model.layers.*=4b/g16",
}

CLAIM = Claim(
    method="finequant",
    statement="Choosing each matrix's granularity from its weights alone keeps 4-bit rounding from the collapse of "
    "whole rows, and comes near the finest groups with fewer bytes of scales.",
    source="Kim et al. 2023, arXiv:2308.09723, abstract",
    setting="The shipped language model, linears of all blocks, 4 bits, no groups finer than 16; 64 test windows of "
    "256 tokens. Outlier columns were planted in the linears behind norms (4 input columns each times 20, the norm's "
    "channels divided, the function the same); the checks that say plain are on the model without them.",
    metric="perplexity a token; kl: mean KL divergence to the original, nats a token; bits: stored a weight",
    checks=(
        Check("perplexity below that of whole rows", "perplexity_adaptive", "<", "perplexity_row"),
        Check("KL within a quarter of that of the finest groups", "kl_adaptive", "<=", "kl_fine_and_a_quarter"),
        Check("at fewer bits", "bits_adaptive", "<", "bits_fine"),
        Check("plain: KL below that of whole rows", "kl_adaptive_plain", "<", "kl_row_plain"),
        Check("plain: at fewer bits than the finest groups", "bits_adaptive_plain", "<", "bits_fine_plain"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of test windows; with another seed other columns are outliers."""
    found = {}
    for name, outliers in (("", OUTLIERS), ("_plain", 0.0)):
        bench = lab.bench("pocket-lm", seed, outliers)
        found[f"perplexity{name}"] = bench.measure().value
        for plan, text in PLANS.items():
            result = bench.measure(text)
            found[f"perplexity_{plan}{name}"] = result.value
            found[f"kl_{plan}{name}"] = result.damage
            found[f"bits_{plan}{name}"] = result.bits
    return {**found, "kl_fine_and_a_quarter": 1.25 * found["kl_fine"]}
