"""LST: bytes kept for the backward pass and loss, beside LoRA's."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.models.adapter import frames
from trimtab.parts.ladder import Rung

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="lst",
    statement="A side network that reads a frozen one keeps far less for the backward pass than factors inside it, at "
    "a comparable loss.",
    source="Sung et al. 2022, arXiv:2206.06522, abstract and table 1",
    figure="69 % less memory than full fine-tuning, where LoRA and adapters save 26 %",
    setting=f"{SETTING}; a side network of a quarter of the width, LoRA of rank 8 on all linears of the blocks, which "
    "trains about as many numbers; full fine-tuning of these.",
    metric="nats a token on held-out windows of the new domain; saved: most bytes that autograd kept for a backward "
    "pass; reached: blocks below the last rung through which a gradient would go",
    checks=(
        Check("half of what LoRA keeps is kept, or less", "share_of_lora", "<", 0.5),
        Check("it trains no more numbers than LoRA", "share_of_numbers", "<=", 1.0),
        Check("no gradient goes through a block", "reached", "<=", 0.0),
        Check("the loss is below the untrained model's", "lst", "<", "original"),
        Check("the loss is within 0.1 nats of LoRA's", "behind", "<", 0.1),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    ours, lora, full = shift.run("lst", "w25%"), shift.run("lora", "r8"), shift.full()
    reached: list[bool] = []

    def see(block: Any, args: Any, out: Any) -> None:
        reached.append((out[0] if isinstance(out, tuple) else out).requires_grad)

    for rung in frames(ours.model).values():
        assert isinstance(rung, Rung)
        rung.base.register_forward_hook(see)
    with torch.enable_grad():
        shift.train(ours.model, torch.arange(2))
    return {
        **{"original": shift.before()[0], "lst": ours.loss, "lora": lora.loss, "full": full.loss},
        **{"behind": ours.loss - lora.loss, "reached": float(sum(reached))},
        **{"saved_lst": float(ours.saved), "saved_lora": float(lora.saved), "saved_full": float(full.saved)},
        **{"share_of_lora": ours.saved / lora.saved, "share_of_numbers": ours.trained / lora.trained},
    }
