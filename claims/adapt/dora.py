"""DoRA: below LoRA's loss at equal rank."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="dora",
    statement="Training lengths and directions of rows apart learns more than LoRA at equal rank.",
    source="Liu et al. 2024, arXiv:2402.09353, abstract and table 1",
    figure="LLaMA-7B on commonsense tasks: +3.7 % over LoRA",
    setting=f"{SETTING}; rank 8 on all linears of the blocks, LoRA of the same rank.",
    metric="nats a token on held-out windows of the new domain; share_of_numbers: trained numbers over LoRA's",
    checks=(
        Check("the loss is below LoRA's", "loss_dora", "<", "loss_lora"),
        Check("it trains at most a tenth more numbers", "share_of_numbers", "<", 1.1),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    theirs, ours = shift.run("lora", "r8"), shift.run("dora", "r8")
    share = ours.trained / theirs.trained
    return {"loss_lora": theirs.loss, "loss_dora": ours.loss, "share_of_numbers": share}
