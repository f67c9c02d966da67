"""SlimFit: layers frozen by how far they move, beside layers frozen at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Card, Policy
from trimtab.lab import TUNED, Tuning


@dataclass(frozen=True)
class Drawn(Policy):
    """A fifth of the layers, drawn anew at each step."""

    card = Card("drawn", claim="The baseline: chance.")

    def decide(self, view: Any, *, rng: torch.Generator) -> tuple[str, ...]:
        """Paths of the layers that the step trains."""
        chosen = torch.randperm(len(view.layers), generator=rng)[: round(0.2 * len(view.layers))]
        return tuple(view.layers[i].path for i in chosen.tolist())


CLAIM = Claim(
    method="slimfit",
    statement="Freezing the layers that move least keeps quality better than freezing at random, at half the memory.",
    source="Ardakani et al. 2023, arXiv:2305.18513, abstract, tables 1 to 3 and figure 6",
    figure="up to 95 % of the layers frozen; 2.2 times less memory at 0.2 % less accuracy on average",
    setting=f"{TUNED}, 48 steps, all parameters. Of the layers of blocks 80 % are frozen at a step, and what must be "
    "kept is kept in 8 bits; full fine-tuning keeps all in fp32; random: as many layers, drawn anew at each step.",
    metric="nats a token on held-out windows of the new domain (loss); most bytes kept for the backward pass (saved)",
    checks=(
        Check("the loss is below that of freezing at random", "loss_slimfit", "<", "loss_random"),
        Check("it gains at least nine tenths of what full fine-tuning gains", "share_of_gain", ">=", 0.9),
        Check("it keeps less than half of the bytes for the backward pass", "share_of_saved", "<", 0.5),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed, steps=48)
    before, _ = shift.before()
    full = shift.tune(Tuning(whole=True), (1e-4, 4e-4))
    ours = shift.tune(Tuning(whole=True, freeze="slimfit(frozen=0.8)", codec="int8"), (4e-4, 1e-3))
    drawn = shift.tune(Tuning(whole=True, freeze=Drawn(), codec="int8"), (4e-4, 1e-3))
    return {
        **{"loss_before": before, "loss_slimfit": ours.loss, "loss_random": drawn.loss, "loss_full": full.loss},
        **{"saved_slimfit": float(ours.saved), "saved_random": float(drawn.saved), "saved_full": float(full.saved)},
        "share_of_saved": ours.saved / full.saved,
        "share_of_gain": (before - ours.loss) / (before - full.loss),
    }
