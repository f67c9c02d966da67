"""LoRAM: factors trained on a pruned model, used with the whole one."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.models.adapter import frames
from trimtab.models.source import open_source

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="loram",
    statement="LoRA trained on a pruned model and used with the whole one beats the whole model without it, and the "
    "pruned model with it; aligning the pruned model first helps.",
    source="Zhang et al. 2025, arXiv:2502.13533, abstract, figures 3 and 5",
    figure="LLaMA-2-70B trained at 15.8 to 17 times fewer bytes, above LoRA on a smaller model",
    setting=f"{SETTING}; rank 8 on all linears of the blocks, which are pruned to 2:4; LoRA on the whole model beside.",
    metric="nats a token on held-out windows of the new domain; small: of the pruned model with its factors; share: "
    "bytes of the matrices that training reads, of those of the model as it is stored",
    checks=(
        Check("the loss is below the untrained model's", "loram", "<", "original"),
        Check("the loss is below that of the pruned model with the same factors", "loram", "<", "small"),
        Check("aligned is below not aligned", "loram", "<", "rough"),
        Check("the loss is within 0.05 nats of LoRA's on the whole model", "behind", "<", 0.05),
        Check("training reads fewer than six tenths of the bytes", "share", "<", 0.6),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    ours, rough = shift.run("loram", "r8"), shift.run("loram(align=False)", "r8")
    lora, tuned = shift.run("lora", "r8"), frames(ours.model)
    width = {"fp32": 4, "bf16": 2, "fp16": 2}[open_source(shift.model).dtype]
    read = sum(frame.pruned.nbytes for frame in tuned.values())
    whole = sum(width * frame.weight.numel() for frame in tuned.values())
    for frame in tuned.values():
        frame.frozen = frame.small
    return {
        **{"original": shift.before()[0], "loram": ours.loss, "rough": rough.loss, "lora": lora.loss},
        **{"behind": ours.loss - lora.loss, "small": shift.loss(ours.model), "share": read / whole},
    }
