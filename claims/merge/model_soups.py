"""Model soups: a greedy soup is no worse than the best member on held-out data, and better on shifted data."""

from __future__ import annotations

import itertools
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.merge.model_soups import ModelSoups
from trimtab.parts.merging import greedy_members
from trimtab.tasks import domains as d

TASK = "turned"
SHIFTED = ("plain", "striped", "shifted", "sheared")
TUNINGS = tuple(
    d.Tuning(epochs=e, rate=r, decay=w, smoothing=s)
    for (e, w), (r, s) in itertools.product(((4, 0.01), (8, 0.1)), ((2e-4, 0.0), (5e-4, 0.1), (1e-3, 0.0)))
)

CLAIM = Claim(
    method="model-soups",
    statement="A greedy soup of models that were tuned with several hyperparameters is no worse than the best of them "
    "on held-out data, and above it under shift, at the size of one model.",
    source="Wortsman et al. 2022, arXiv:2203.05482, abstract and table 3",
    figure="CLIP ViT-B/32, ImageNet: 80.38 (best single), 79.97 (uniform), 81.03 (greedy); five shifts, mean: 47.83, "
    "51.45, 50.75",
    setting="The shipped image transformer tuned to digits that are turned by 40 degrees, with six settings of epochs, "
    "rate, decay and smoothing; members chosen on 300 search images, tested on 300 others, and shifted: on four other "
    "ways to show them.",
    metric="accuracy; shifted: mean over the other ways",
    checks=(
        Check("greedy: held-out accuracy at least the best member's", "greedy", ">=", "best"),
        Check("greedy: shifted accuracy above the best member's", "greedy_shifted", ">", "best_shifted"),
        Check("uniform: shifted accuracy above the best member's", "uniform_shifted", ">", "best_shifted"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of the order of training images for all settings."""
    members = [d.tuned((TASK,), 10 * seed + i, tuning) for i, tuning in enumerate(TUNINGS)]
    lab.hashes |= {"pocket-vit": d.base_hash()}

    def soup(chosen: tuple[int, ...]) -> Any:
        return d.merged_state(ModelSoups(), members, None, [float(i in chosen) for i in range(len(members))])

    scores = [d.accuracy(m, TASK, "search") for m in members]
    greedy = greedy_members(scores, lambda chosen: d.accuracy(soup(chosen), TASK, "search"))
    found = {"members": float(len(greedy))}
    states = {
        "best": members[scores.index(max(scores))],
        "uniform": soup(tuple(range(len(members)))),
        "greedy": soup(greedy),
    }
    for name, state in states.items():
        found[name] = d.accuracy(state, TASK, "test")
        found[f"{name}_shifted"] = d.mean_accuracy(state, "test", SHIFTED)
    return found
