"""S2FT: a cheaper step than LoRA's, and less forgotten."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="s2ft",
    statement="Training a few heads and channels densely is cheaper than LoRA, and forgets less of what was known.",
    source="Yang et al. 2024, arXiv:2412.06289, abstract, tables 1 to 4",
    figure="4.6 % above LoRA on commonsense tasks; about 10 % less memory and latency than LoRA",
    setting=f"{SETTING}; LoRA of rank 8 on all linears of the blocks, and as many inputs of output and down "
    "projections as train no more numbers.",
    metric="nats a token on held-out windows of the new domain (loss) and of the old one (known); bytes kept; "
    "processor seconds of a step",
    checks=(
        Check("the loss is within 0.05 nats of LoRA's", "behind", "<", 0.05),
        Check("less of the old domain is forgotten than with LoRA", "known_s2ft", "<", "known_lora"),
        Check("fewer bytes are kept than by LoRA", "saved_s2ft", "<", "saved_lora"),
        Check("a step takes less time than LoRA's", "seconds_s2ft", "<", "seconds_lora"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    theirs = shift.run("lora", "r8")
    ours = shift.run("s2ft", shift.matched("s2ft", theirs.trained))
    return {
        **{"loss_lora": theirs.loss, "loss_s2ft": ours.loss, "behind": ours.loss - theirs.loss},
        **{"known_lora": theirs.known, "known_s2ft": ours.known},
        **{"saved_lora": float(theirs.saved), "saved_s2ft": float(ours.saved)},
        **{"seconds_lora": theirs.seconds, "seconds_s2ft": ours.seconds},
    }
