"""GaLore: near AdamW's loss with the moments of a low rank."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.pretraining import SETTING

CLAIM = Claim(
    method="galore",
    statement="Adam in the gradient's leading subspace trains about as well as Adam, with less state.",
    source="Zhao et al. 2024, arXiv:2403.03507, abstract and table 2",
    figure="perplexity of LLaMA 60M to 1B within 2 to 7 % of full rank; optimiser memory down by up to 65.5 %",
    setting=f"{SETTING}, 200 steps. Rank 16, a quarter of the width, found anew every 50 steps, on every matrix.",
    metric="nats a byte of held-out text (loss); bytes of the optimiser's state (state)",
    checks=(
        Check("the loss is at most 0.1 nats above AdamW's", "behind_adamw", "<", 0.1),
        Check("the loss is below that of SGD with momentum", "loss_galore", "<", "loss_momentum"),
        Check("the state is less than two fifths of AdamW's", "share_of_state", "<", 0.4),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    bench = lab.pretraining(seed, steps=200)
    adamw, momentum = bench.run("adamw", (2e-3, 3e-3, 4e-3)), bench.run("sgd(momentum=0.9)", (0.1,))
    ours = bench.run("galore(rank=16, every=50)", (0.02, 0.04))
    return {
        **{"loss_galore": ours.loss, "loss_adamw": adamw.loss, "loss_momentum": momentum.loss},
        **{"behind_adamw": ours.loss - adamw.loss, "share_of_state": ours.state / adamw.state},
    }
