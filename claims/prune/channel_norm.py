"""Channel removal by norm: the channels of smallest norm are worth less than others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Width
from trimtab.core.plan import Plan, Step
from trimtab.prune.channels import ChannelNorm

MODELS = {"cnn": "pocket-cnn", "lm": "pocket-lm"}
WIDTHS = (0.75, 0.5)

CLAIM = Claim(
    method="channel-norm",
    statement="At equal width, removing the channels of smallest norm loses less than removing random ones.",
    source="Li et al. 2017, arXiv:1608.08710, section 4.4, figure 8",
    figure="VGG-16 on CIFAR-10: the smallest filters cost less than random ones in most layers",
    setting="The shipped CNN (channels of all convolutions) and the shipped language model (channels of all MLPs), "
    "without retraining; 64 windows or 200 images that the models were not trained on.",
    metric="KL to the original, nats a prediction",
    checks=tuple(
        Check(f"{model}, {100 * w:g} % of the channels: below random", f"norm_{name}_{w}", "<", f"random_{name}_{w}")
        for name, model in MODELS.items()
        for w in WIDTHS
    ),
    seeds=(0, 1, 2, 3, 4),
)


@dataclass(frozen=True)
class RandomChannels(ChannelNorm):
    """The baseline: scores that say nothing."""

    seed: int = 0

    def score(self, slices: list[Tensor]) -> Tensor:
        """Scores `[units]`, drawn."""
        units = len(slices[0])
        return torch.rand(units, generator=torch.Generator().manual_seed(self.seed + units))


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Damage of either at each width; the seed draws the data and the random channels."""
    found = {}
    for name, model in MODELS.items():
        bench = lab.bench(model, seed, **({"items": 200, "calibration": 300} if name == "cnn" else {}))
        for width in WIDTHS:
            for kind, method in (("norm", ChannelNorm()), ("random", RandomChannels(seed=1000 * seed))):
                plan = Plan((Step(method, (("*", Width(width)),)),))
                found[f"{kind}_{name}_{width}"] = bench.measure(plan).damage
    return found
