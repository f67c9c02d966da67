"""Q-GaLore: GaLore's loss with fewer bytes of weights and state, and fewer decompositions."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.pretraining import SETTING

CLAIM = Claim(
    method="q-galore",
    statement="Weights in 8 bits rounded at random, projections in 4 and ever rarer subspaces train like GaLore.",
    source="Zhang et al. 2024, arXiv:2407.08296, table 1 and figures 2 and 5",
    figure="LLaMA 7B from nothing on one GPU of 16 GB; up to 0.84 perplexity above GaLore for 60M to 1B",
    setting=f"{SETTING}, 200 steps. Rank 16, found anew every 10 steps at first; the linears' weights in 8 bits, the "
    "embedding in fp32.",
    metric="nats a byte of held-out text (loss); bytes of weights and the optimiser's state (bytes); decompositions",
    checks=(
        Check("the loss is at most 0.05 nats above GaLore's", "behind_galore", "<", 0.05),
        Check("weights and state take less than half of GaLore's bytes", "share_of_bytes", "<", 0.5),
        Check("less than half as many subspaces are found", "share_of_found", "<", 0.5),
        Check("rounding at random is better than to the nearest", "loss_q_galore", "<", "loss_nearest"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    bench = lab.pretraining(seed, steps=200)
    galore = bench.run("galore(rank=16, every=10)", (0.02, 0.04))
    ours = bench.run("q-galore(rank=16, every=10)", (0.02, 0.04))
    nearest = bench.run("q-galore(rank=16, every=10, rounding='nearest')", (0.02, 0.04))
    return {
        **{"loss_galore": galore.loss, "loss_q_galore": ours.loss, "loss_nearest": nearest.loss},
        **{"bytes_galore": float(galore.weights + galore.state), "bytes_q_galore": float(ours.weights + ours.state)},
        "behind_galore": ours.loss - galore.loss,
        "share_of_bytes": (ours.weights + ours.state) / (galore.weights + galore.state),
        "share_of_found": ours.numbers["found"] / (20 * sum(p.ndim == 2 for p in galore.model.parameters())),
    }
