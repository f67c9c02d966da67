"""APOLLO: AdamW's loss with a quarter of its state, and projections by products or by buckets."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.pretraining import SETTING

CLAIM = Claim(
    method="apollo",
    statement="Scaling the raw gradient by what Adam does in a random subspace trains as well as AdamW.",
    source="Zhu et al. 2025, arXiv:2412.05270, abstract and table 2",
    figure="perplexity of LLaMA 60M to 1B at or below AdamW's, at an eighth of its optimiser memory or less",
    setting=f"{SETTING}, 200 steps. Rank 16, a quarter of the width, drawn anew every 50 steps, on every matrix.",
    metric="nats a byte of held-out text (loss); bytes of the optimiser's state (state)",
    checks=(
        Check("the loss is at most 0.05 nats above AdamW's", "behind_adamw", "<", 0.05),
        Check("the loss is below that of SGD with momentum", "loss_apollo", "<", "loss_momentum"),
        Check("the state is less than three tenths of AdamW's", "share_of_state", "<", 0.3),
        Check("buckets in place of products cost less than 0.05 nats", "behind_gaussian", "<", 0.05),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    bench = lab.pretraining(seed, steps=200)
    adamw, momentum = bench.run("adamw", (2e-3, 3e-3, 4e-3)), bench.run("sgd(momentum=0.9)", (0.1,))
    ours = bench.run("apollo(rank=16, every=50)", (0.01, 0.02))
    buckets = bench.run("apollo(rank=16, every=50, projection='buckets')", (0.01, 0.02))
    return {
        **{"loss_apollo": ours.loss, "loss_buckets": buckets.loss},
        **{"loss_adamw": adamw.loss, "loss_momentum": momentum.loss},
        **{"behind_adamw": ours.loss - adamw.loss, "behind_gaussian": buckets.loss - ours.loss},
        **{"state_apollo": float(ours.state), "share_of_state": ours.state / adamw.state},
    }
