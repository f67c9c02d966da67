"""APOLLO-Mini: how near AdamW's loss next to no state comes."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.pretraining import SETTING

CLAIM = Claim(
    method="apollo-mini",
    statement="One factor a tensor, seen in one random direction, trains as well as AdamW with state near SGD's.",
    source="Zhu et al. 2025, arXiv:2412.05270, section 4.3 and table 2",
    figure="perplexity of LLaMA 60M to 1B at AdamW's; LLaMA 7B in less than 12 GB with quantised weights",
    setting=f"{SETTING}, 200 steps. The direction is drawn anew every 50 steps; every matrix is scaled so.",
    metric="nats a byte of held-out text (loss); bytes of the optimiser's state (state)",
    checks=(
        Check("the loss is at most 0.05 nats above AdamW's", "behind_adamw", "<", 0.05),
        Check("the loss is below that of plain SGD", "loss_mini", "<", "loss_sgd"),
        Check("the loss is below that of SGD with momentum, whose state is larger", "loss_mini", "<", "loss_momentum"),
        Check("the state is less than a twentieth of AdamW's", "share_of_state", "<", 0.05),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    bench = lab.pretraining(seed, steps=200)
    adamw, ours = bench.run("adamw", (2e-3, 3e-3, 4e-3)), bench.run("apollo-mini(every=50)", (5e-4, 1e-3, 2e-3))
    momentum, plain = bench.run("sgd(momentum=0.9)", (0.1,)), bench.run("sgd", (1.0,))
    return {
        **{"loss_mini": ours.loss, "loss_adamw": adamw.loss, "loss_momentum": momentum.loss, "loss_sgd": plain.loss},
        **{"behind_adamw": ours.loss - adamw.loss, "share_of_state": ours.state / adamw.state},
    }
