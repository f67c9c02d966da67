"""1-bit adapters: against LoRA at equal rank, and at equal bytes."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.models.adapter import frames

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="bi-lora",
    statement="An adapter of one bit is about as good as one of 32 bits and equal rank, and better at equal bytes.",
    source="Jie et al. 2023, arXiv:2307.16867, abstract, figure 4 and table 2",
    figure="1-bit adapters above all others on VTAB-1K, at the smallest size",
    setting=f"{SETTING}; all linears of the blocks, rank 8 and 32 at one bit, LoRA of ranks 8 and 1 in fp32.",
    metric="nats a token on held-out windows of the new domain; behind: at rank 8, less LoRA's; wide: of rank 32 at "
    "one bit, whose codes take what LoRA of rank 1 takes; bytes of what is stored of each",
    checks=(
        Check("at equal rank the loss is within 0.05 nats of LoRA's", "behind", "<", 0.05),
        Check("it takes a thirtieth of LoRA's bytes or less", "byte_share", "<", 1 / 30),
        Check("wide at one bit is below narrow at 32 bits", "wide", "<", "narrow"),
        Check("and takes no more bytes, but for two numbers a factor", "wide_over", "<=", 0.0),
    ),
)


def stored(model: Any) -> int:
    """Bytes of the adapters' tensors, as they are written."""
    states = [(k, v) for frame in frames(model).values() for k, v in frame.state_dict().items()]
    return sum(v.numel() * v.element_size() for k, v in states if not k.startswith("base."))


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    ours, lora = shift.run("bi-lora", "r8"), shift.run("lora", "r8")
    wide, narrow = shift.run("bi-lora", "r32"), shift.run("lora", "r1")
    over = stored(wide.model) - 16 * len(frames(wide.model)) - stored(narrow.model)
    return {
        **{"one_bit": ours.loss, "lora": lora.loss, "behind": ours.loss - lora.loss},
        **{"byte_share": stored(ours.model) / stored(lora.model), "wide": wide.loss, "narrow": narrow.loss},
        **{"wide_bytes": float(stored(wide.model)), "narrow_bytes": float(stored(narrow.model))},
        **{"wide_over": float(over)},
    }
