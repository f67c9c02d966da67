"""SMoRA: ranks as experts against LoRA and a mixture of LoRAs of equal rank."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="smora",
    statement="Routing single ranks learns more than LoRA and than a mixture of LoRA experts of equal total rank.",
    source="Zhao et al. 2025, arXiv:2501.15103, abstract and table 1",
    figure="8 of 64 active ranks above LoRA of rank 64",
    setting=f"{SETTING}; rank 16 on all linears of the blocks, 4 in use: single ranks, and 4 experts of rank 4 with "
    "top-1 routing; LoRA of rank 16. One new domain, not a mixture of tasks.",
    metric="nats a token on held-out windows of the new domain",
    checks=(
        Check("the loss is below LoRA's of equal rank", "loss_smora", "<", "loss_lora"),
        Check("the loss is below that of a mixture of LoRAs", "loss_smora", "<", "loss_mixture"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    theirs = shift.run("lora", "r16")
    ours, mixture = shift.run("smora(active=4)", "r16"), shift.run("smora(active=4, block=4)", "r16")
    return {"loss_lora": theirs.loss, "loss_smora": ours.loss, "loss_mixture": mixture.loss}
