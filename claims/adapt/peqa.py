"""PEQA: trained scales make up for 3 bits, and the codes stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Card, Wrapper
from trimtab.models.adapter import frames
from trimtab.parts.frozen import Frozen
from trimtab.parts.trained_grid import OnGrid

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)
LEVEL, RATES = "3b/row", (4e-3, 1.6e-2)

CLAIM = Claim(
    method="peqa",
    statement="A model of 3 bits is tuned by its scales alone to below the full-precision model's loss.",
    source="Kim et al. 2023, arXiv:2305.14152, abstract, tables 2 and 5",
    figure="below 4 bits, restored to or above full precision (LLaMA to 65B)",
    setting=f"{SETTING}; all linears of the blocks rounded to nearest at 3 bits, one scale a row. QAT trains every "
    "weight through the same rounding, and the scales, at rates ten times lower.",
    metric="nats a token on held-out windows of the new domain; share: PEQA's gain over rounding as a share of QAT's; "
    "changed: codes that are others after the training; swapped: differences of the losses once the base's scales "
    "were put in again, and then the task's; state_bytes: of AdamW, state_share: as a share of QAT's",
    checks=(
        Check("the loss is below that of rounding", "peqa", "<", "rounded"),
        Check("the loss is below the full-precision model's", "peqa", "<", "original"),
        Check("half of what QAT of all weights gains is gained", "share", ">", 0.5),
        Check("no code changed", "changed", "<=", 0.0),
        Check("a task's scales bring its loss back", "swapped", "<=", 0.0),
        Check("the optimiser's state is below a hundredth of QAT's", "state_share", "<", 0.01),
    ),
)


@dataclass(frozen=True)
class QAT(Wrapper):
    """Every weight is trained through the rounding, and the scales: a factor of full size beside a frozen identity."""

    card = Card("qat", levels=("3b/g64",))

    def wrap(self, module: nn.Module, level: Any) -> nn.Module:
        base = Frozen(module)
        whole = torch.eye(base.in_features), torch.zeros(base.out_features, base.in_features)
        frame = OnGrid(module, level, *whole)
        frame.a.requires_grad_(False)
        return frame


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    original, rounded = shift.before()[0], shift.untrained("peqa", LEVEL)
    ours = shift.run("peqa", LEVEL, rates=RATES)
    qat = shift.run(QAT(), LEVEL, rates=(4e-4, 1.6e-3))
    tuned = frames(ours.model).values()
    changed = sum(int((f.packed().tensors["codes"] != f.stored.tensors["codes"]).sum()) for f in tuned)
    mine = [f.gain.detach().clone() for f in tuned]
    for frame in tuned:
        frame.gain.data.zero_()
    swapped = abs(shift.loss(ours.model) - rounded)
    for frame, gain in zip(tuned, mine, strict=True):
        frame.gain.data.copy_(gain)
    return {
        **{"original": original, "rounded": rounded, "peqa": ours.loss, "qat": qat.loss},
        **{"share": (rounded - ours.loss) / (rounded - qat.loss), "changed": float(changed)},
        **{"swapped": swapped + abs(shift.loss(ours.model) - ours.loss)},
        **{"state_bytes": 8.0 * ours.trained, "state_share": ours.trained / qat.trained},
    }
