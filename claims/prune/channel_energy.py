"""Channel removal by energy: what a channel adds to its readers' outputs, and a refit of the readers."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim

MODELS = {"cnn": "pocket-cnn", "lm": "pocket-lm"}
LEVELS = ("w75%", "w50%")

CLAIM = Claim(
    method="channel-energy",
    statement="At equal width, removing the channels that carry least into the next layer on data, with a refit of "
    "what reads the rest, loses less than removing those of smallest norm; both the choice and the refit help.",
    source="He et al. 2017, arXiv:1707.06168, sections 3.1 and 4.1",
    figure="VGG-16 at 2x, single layers: reconstruction below `first k` and `max response` everywhere",
    setting="The shipped CNN (channels of all convolutions; 2,000 calibration and 200 test images) and the shipped "
    "language model (channels of all MLPs; 24 and 64 windows), without retraining.",
    metric="KL to the original, nats a prediction",
    checks=tuple(
        check
        for name, model in MODELS.items()
        for level in LEVELS
        for check in (
            Check(f"{model} at {level}: below norm", f"energy_{name}_{level}", "<", f"norm_{name}_{level}"),
            Check(
                f"{model} at {level}: below energy without refit", f"energy_{name}_{level}", "<", f"bare_{name}_{level}"
            ),
            Check(f"{model} at {level}: without refit below norm", f"bare_{name}_{level}", "<", f"norm_{name}_{level}"),
        )
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Damage of each at each width; the seed draws the data."""
    plans = {"norm": "channel-norm", "bare": "channel-energy(refit=False)", "energy": "channel-energy"}
    found = {}
    for name, model in MODELS.items():
        bench = lab.bench(model, seed, **({"items": 200, "calibration": 2000} if name == "cnn" else {}))
        for level in LEVELS:
            for kind, method in plans.items():
                found[f"{kind}_{name}_{level}"] = bench.measure(f"{method} @ {level}").damage
    return found
