"""AdamW: the baseline, beside SGD with momentum."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.pretraining import SETTING

CLAIM = Claim(
    method="adamw",
    statement="Adam learns a language model where SGD with momentum falls behind, for two numbers of state a weight.",
    source="Loshchilov and Hutter 2019, arXiv:1711.05101; the baseline of lean optimisers",
    setting=f"{SETTING}, 200 steps.",
    metric="nats a byte of held-out text (loss); bytes of the optimiser's state (state)",
    checks=(
        Check("the loss is below that of SGD with momentum", "loss_adamw", "<", "loss_momentum"),
        Check("the loss is below that of plain SGD", "loss_adamw", "<", "loss_sgd"),
        Check("the state is twice the weights", "state_adamw", "<=", "twice_weights"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    bench = lab.pretraining(seed, steps=200)
    ours = bench.run("adamw", (2e-3, 3e-3, 4e-3))
    momentum, plain = bench.run("sgd(momentum=0.9)", (0.03, 0.1)), bench.run("sgd", (0.3, 1.0))
    return {
        **{"loss_adamw": ours.loss, "loss_momentum": momentum.loss, "loss_sgd": plain.loss},
        **{"state_adamw": float(ours.state), "state_momentum": float(momentum.state)},
        "twice_weights": 2.0 * sum(p.nbytes for p in ours.model.parameters()),
    }
