"""USKD: soft labels of the student's own against labels alone."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.distill.uskd import USKD
from trimtab.tasks.students import School

CLAIM = Claim(
    method="uskd",
    statement="A network makes itself soft labels that teach it more than labels alone, at nearly no cost.",
    source="Yang et al. 2023, arXiv:2303.13005, table 3",
    figure="MobileNet on ImageNet +1.17, DeiT-Tiny +0.55",
    setting="120 handwritten digits with noise, a convolutional network of 740 numbers, 450 steps; no teacher",
    metric="accuracy on 600 images that were not trained on; slower: a step's processor time over that of labels alone",
    checks=(
        Check("the accuracy is above that of labels alone", "uskd", ">", "labels"),
        Check("a step takes less than half as long again", "slower", "<", 1.5),
    ),
    seeds=tuple(range(10)),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    school = School(seed=seed)
    plain, ours = school.teach(None), school.teach(USKD())
    return {"labels": plain.accuracy, "uskd": ours.accuracy, "slower": ours.seconds / plain.seconds}
