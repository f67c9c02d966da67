"""KD: a teacher's outputs teach more than labels."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.distill.kd import KD
from trimtab.tasks.students import School

CLAIM = Claim(
    method="kd",
    statement="A small network learns more from a large one's softened outputs than from labels alone.",
    source="Hinton et al. 2015, arXiv:1503.02531, sections 2 and 3",
    figure="MNIST: 146 errors with labels, 74 with the teacher",
    setting="120 handwritten digits with noise, a convolutional student of 740 numbers, 450 steps; the shipped image "
    "transformer as the teacher",
    metric="accuracy on 600 images that neither has seen",
    checks=(Check("the accuracy is above that of labels alone", "kd", ">", "labels"),),
    seeds=tuple(range(10)),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    school = School(seed=seed)
    return {"labels": school.teach(None).accuracy, "kd": school.teach(KD()).accuracy}
