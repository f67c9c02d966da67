"""CorDA: the knowledge mode forgets less than LoRA, the instruction mode learns more."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="corda",
    statement="Factors cut along a context's inputs keep that context's knowledge, or learn its task better, than "
    "LoRA.",
    source="Yang et al. 2024, arXiv:2406.05223, abstract, tables 1 and 2",
    figure="both modes above LoRA; no single figure",
    setting=f"{SETTING}; rank 8 on all linears of the blocks; the knowledge mode's context is Python code, the "
    "instruction mode's the new domain.",
    metric="nats a token on held-out windows of the new domain (loss) and of the old one (known)",
    checks=(
        Check("the knowledge mode forgets less than LoRA", "known_knowledge", "<", "known_lora"),
        Check("the knowledge mode learns no less: within 0.05 nats", "behind", "<", 0.05),
        Check("the instruction mode learns more than LoRA", "loss_instruction", "<", "loss_lora"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    theirs = shift.run("lora", "r8")
    keeps = shift.run("corda", "r8", context="code")
    learns = shift.run("corda(mode='instruction')", "r8")
    return {
        **{"loss_lora": theirs.loss, "loss_knowledge": keeps.loss, "loss_instruction": learns.loss},
        **{"known_lora": theirs.known, "known_knowledge": keeps.known, "behind": keeps.loss - theirs.loss},
    }
