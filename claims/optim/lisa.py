"""LISA: below LoRA's loss at equal bytes of gradients and state, and near full fine-tuning's."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.lab import TUNED, Tuning

CLAIM = Claim(
    method="lisa",
    statement="Training a few random blocks at a time beats LoRA at its memory and comes near full fine-tuning.",
    source="Pan et al. 2024, arXiv:2403.17919, abstract, tables 1 to 3",
    figure="MT-Bench scores above LoRA's by 11 to 37 %, at no more memory",
    setting=f"{TUNED}, 48 steps, all parameters. One of 6 blocks for 6 steps at a time, the embedding always; LoRA on "
    "all linears at the largest rank that holds no more bytes of gradients and state.",
    metric="nats a token on held-out windows of the new domain (loss); most bytes of gradients and state (held)",
    checks=(
        Check("the loss is below LoRA's", "loss_lisa", "<", "loss_lora"),
        Check("it holds less than half of the bytes of full fine-tuning", "share", "<", 0.5),
        Check("it gains at least nine tenths of what full fine-tuning gains", "share_of_gain", ">=", 0.9),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed, steps=48)
    before, _ = shift.before()
    full = shift.tune(Tuning(whole=True), (1e-4, 4e-4))
    ours = shift.tune(Tuning(whole=True, freeze="lisa(blocks=1, every=6)"), (5e-4, 2e-3))
    theirs = shift.run("lora", shift.matched("lora", ours.held // 12))
    return {
        **{"loss_before": before, "loss_lisa": ours.loss, "loss_lora": theirs.loss, "loss_full": full.loss},
        **{"held_lisa": float(ours.held), "held_lora": float(theirs.held), "held_full": float(full.held)},
        **{"share": ours.held / full.held, "share_of_gain": (before - ours.loss) / (before - full.loss)},
    }
