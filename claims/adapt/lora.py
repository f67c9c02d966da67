"""LoRA: most of what full fine-tuning gains, at a share of the trained numbers."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; all linears of the blocks, AdamW, the better of two rates by windows that the training leaves out"
)
METRIC = "nats a token on held-out windows of the new domain (loss) and of the old one (known)"

CLAIM = Claim(
    method="lora",
    statement="A low-rank delta comes near full fine-tuning at a small share of its trained numbers.",
    source="Hu et al. 2021, arXiv:2106.09685, abstract and table 2",
    figure="GPT-3 175B: 10,000 times fewer trained numbers at equal or better quality",
    setting=f"{SETTING}; rank 8 beside full fine-tuning of the same matrices.",
    metric=f"{METRIC}; share_of_gain: how much of what full fine-tuning gains, LoRA gains",
    checks=(
        Check("it learns: the loss falls", "loss_lora", "<", "loss_before"),
        Check("it gains at least nine tenths of what full fine-tuning gains", "share_of_gain", ">=", 0.9),
        Check("it forgets less than full fine-tuning", "known_lora", "<", "known_full"),
        Check("it trains less than a twentieth of the numbers", "share_of_numbers", "<", 0.05),
        Check("it keeps fewer bytes for the backward pass", "saved_lora", "<", "saved_full"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    before, _ = shift.before()
    ours, full = shift.run("lora", "r8"), shift.full()
    return {
        **{"loss_before": before, "loss_lora": ours.loss, "loss_full": full.loss},
        **{"known_lora": ours.known, "known_full": full.known},
        **{"saved_lora": float(ours.saved), "saved_full": float(full.saved)},
        "share_of_gain": (before - ours.loss) / (before - full.loss),
        "share_of_numbers": ours.trained / full.trained,
    }
