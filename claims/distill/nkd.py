"""NKD: the normalised loss against KD's and labels alone."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.distill.kd import KD
from trimtab.distill.nkd import NKD
from trimtab.parts.soft_targets import others
from trimtab.tasks.students import School

CLAIM = Claim(
    method="nkd",
    statement="Distributions over the other classes that both sum to 1 teach more than classic distillation.",
    source="Yang et al. 2023, arXiv:2303.13005, table 2",
    figure="ResNet-18 on ImageNet: 69.90 with labels, 71.96 with a ResNet-34 teacher",
    setting="120 handwritten digits with noise, a convolutional student of 740 numbers, 450 steps; the shipped image "
    "transformer as the teacher; KD with its usual weight of 0.9 and temperature of 4",
    metric="accuracy on 600 images that neither has seen; apart: largest difference from 1 of the sums over the other "
    "classes",
    checks=(
        Check("the accuracy is above that of labels alone", "nkd", ">", "labels"),
        Check("the accuracy is at least KD's", "nkd", ">=", "kd"),
        Check("the other classes sum to 1", "apart", "<", 1e-5),
    ),
    seeds=tuple(range(10)),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    school = School(seed=seed)
    sums = others(school.said[0], school.data[1]).softmax(1).sum(1)
    found = {"labels": school.teach(None).accuracy, "kd": school.teach(KD()).accuracy}
    return found | {"nkd": school.teach(NKD()).accuracy, "apart": float((sums - 1).abs().max())}
