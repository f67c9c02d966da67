"""DARTS: beside random architectures of the same space and training."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.engine.relaxing import Course
from trimtab.nas.darts import DARTS
from trimtab.tasks.arena import CELL, Arena
from trimtab.tasks.contest import Contest

CLAIM = Claim(
    method="darts",
    statement="Numbers trained by gradients find better architectures than the mean random one.",
    source="Liu et al. 2018, arXiv:1806.09055, table 1; judged as Yang et al. 2020, arXiv:1912.12522, section 3 say",
    figure="2.76 % error on CIFAR-10, random 3.29 %; by the second paper DARTS is 0.3 % above the mean random one "
    "there",
    setting="The space `cell` (three nodes, five options an edge, two edges a node), 16 channels, two cells alike, "
    "on 2,000 of CIFAR-10's images in patches of 4 x 4: 100 steps of 32 of weights and of votes; the found and five "
    "random networks trained from nothing, 150 steps of 64. Drawing: the best of the five on 1,000 further images.",
    metric="accuracy on 2,000 test images; improvement: over the mean random network's, relative",
    checks=(
        Check("above the mean random network", "found", ">", "random"),
        Check("not below what drawing hands over", "found", ">=", "drawing"),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    arena = Arena(Contest(lab.data, seed, steps=150), "cell", CELL)
    search = arena.relaxed(DARTS(), Course(100, 32))
    figures = arena.random_figures() | {"found": arena.accuracy(search.choose())}
    return figures | {"improvement": figures["found"] / figures["random"] - 1}
