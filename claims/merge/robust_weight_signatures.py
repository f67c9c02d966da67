"""Robust Weight Signatures: a shallow, quantised signature patches robustness at little cost on clean data."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.merge.robust_weight_signatures import RobustWeightSignatures
from trimtab.tasks import domains as d

CORRUPTIONS = ("striped", "faded")

CLAIM = Claim(
    method="robust-weight-signatures",
    statement="Adding the signature of a corruption raises the accuracy under it at a small loss on clean data; the "
    "strength follows the coefficient; storing it takes a tenth of a copy of the weights and less.",
    source="Cai et al. 2023, arXiv:2302.12480, abstract and section 4",
    figure="up to 13 times more compact than a full copy of the weights",
    setting="The shipped image transformer tuned to plain digits, and to digits that are striped or faded; signatures "
    "of the first half of the blocks in 4 bits, with coefficients 0.5 and 1; 300 test images, mean over the two.",
    metric="accuracy; clean_cost: loss on plain digits; compact: weights' bytes in 32 bits over the signature's",
    checks=(
        Check("above the clean model under the corruption", "patched", ">", "clean"),
        Check("stronger with coefficient 1 than with 0.5", "patched", ">", "half"),
        Check("five points or less are lost on clean data", "clean_cost", "<", 0.05),
        Check("ten times more compact than a copy", "compact", ">=", 10.0),
        Check("taken off again, the clean model is back", "left", "<=", 1e-5),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one tuning of the models."""
    base, clean = d.base_state(), d.tuned(("plain",), seed)
    lab.hashes |= {"pocket-vit": d.base_hash()}
    method = RobustWeightSignatures()
    found = dict.fromkeys(("clean", "half", "patched", "full", "tuned", "clean_cost", "left"), 0.0)
    share = 1 / len(CORRUPTIONS)
    for name in CORRUPTIONS:
        corrupted = d.tuned((name,), seed)
        patched, half = (d.merged_state(method, [clean, corrupted], base, (1.0, w)) for w in (1.0, 0.5))
        whole = d.merged_state(RobustWeightSignatures(shallow=1.0, bits=0), [clean, corrupted], base, (1.0, 1.0))
        states = {"clean": clean, "half": half, "patched": patched, "full": whole, "tuned": corrupted}
        for key, state in states.items():
            found[key] += share * d.accuracy(state, name, "test")
        found["clean_cost"] += share * (d.accuracy(clean, "plain", "test") - d.accuracy(patched, "plain", "test"))
        signature = {n: patched[n] - clean[n] for n in clean}
        back = max(float((patched[n] - signature[n] - clean[n]).abs().max()) for n in clean)
        found["left"] = max(found["left"], back)
    touched = sum(t.numel() for n, t in clean.items() if not bool((patched[n] == t).all()))
    total = sum(t.numel() for t in clean.values())
    return {**found, "compact": 32 * total / (method.bits * touched)}
