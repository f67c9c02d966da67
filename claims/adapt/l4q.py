"""L4Q: trained through the rounding against rounded after training."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.models.adapter import frames, merge

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)
LEVEL = "3b/row"

CLAIM = Claim(
    method="l4q",
    statement="Low-rank factors and steps trained through the rounding give a better quantised model than factors that "
    "are rounded when they are merged.",
    source="Jeon et al. 2024, arXiv:2402.04902, abstract and tables 2 to 4",
    figure="sub-4-bit LLaMA and LLaMA-2 above quantise-then-tune, in comparable training time",
    setting=f"{SETTING}; rank 8 on all linears of the blocks, 3 bits and one scale a row. After LoRA its product is "
    "merged, and the matrix rounded to nearest, or by GPTQ with the training windows' statistics; GPTQ alone is of the "
    "model as it came.",
    metric="nats a token on held-out windows of the new domain; over: stored bytes beyond those of the level; "
    "state_share: AdamW's state as a share of that of training every weight",
    checks=(
        Check("the loss is below LoRA's, merged and rounded to nearest", "l4q", "<", "lora_rounded"),
        Check("the loss is below LoRA's, merged and rounded by GPTQ", "l4q", "<", "lora_gptq"),
        Check("the loss is below that of GPTQ without training", "l4q", "<", "gptq"),
        Check("the merged matrices take the level's bytes", "over", "<=", 0.0),
        Check("the optimiser's state is below a tenth of full QAT's", "state_share", "<", 0.1),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    ours = shift.run("l4q", LEVEL)
    over, weights = 0, 0
    for frame in frames(ours.model).values():
        packed = frame.packed()
        over += packed.nbytes - packed.level.bytes(packed.shape)
        weights += frame.weight.numel() + len(frame.start)
    lora = shift.run("lora", "r8")
    merged = merge(lora.model)
    kept = {name: p.clone() for name, p in merged.named_parameters()}
    rounded = shift.solved(merged, "rtn", LEVEL)
    merged.load_state_dict(kept, strict=False)
    return {
        **{"l4q": ours.loss, "lora": lora.loss, "lora_rounded": rounded},
        **{"lora_gptq": shift.solved(merged, "gptq", LEVEL), "gptq": shift.solved(shift.open().model, "gptq", LEVEL)},
        **{"over": float(over), "state_share": ours.trained / weights},
    }
