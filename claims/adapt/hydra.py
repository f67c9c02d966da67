"""Hydra: two branches against one at equal trained numbers."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="hydra",
    statement="A branch beside the matrix and one behind it learn more than one branch alone.",
    source="Kim et al. 2023, arXiv:2309.06922, abstract and section 4",
    figure="above single-branch adapters; no single figure",
    setting=f"{SETTING}; LoRA of rank 8 on all linears of the blocks, and Hydra of the rank that trains no more "
    "numbers.",
    metric="nats a token on held-out windows of the new domain",
    checks=(Check("the loss is below LoRA's at no more trained numbers", "loss_hydra", "<", "loss_lora"),),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    theirs = shift.run("lora(alpha=8.0)", "r8")
    ours = shift.run("hydra", shift.matched("hydra", theirs.trained))
    return {"loss_lora": theirs.loss, "loss_hydra": ours.loss, "numbers_hydra": ours.trained / theirs.trained}
