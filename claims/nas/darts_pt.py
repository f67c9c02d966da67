"""DARTS-PT: of one trained network, what it misses most against what has the largest number."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.engine.relaxing import Course
from trimtab.nas.darts import DARTS
from trimtab.nas.darts_pt import DARTSPT
from trimtab.tasks.arena import CELL, Arena
from trimtab.tasks.contest import Contest

CLAIM = Claim(
    method="darts-pt",
    statement="What a trained network misses most makes better architectures than its largest numbers, with fewer "
    "skips.",
    source="Wang et al. 2021, arXiv:2108.04392, tables 1 to 3",
    figure="CIFAR-10, space of DARTS: 2.61 % error against 3.00 % with the largest numbers",
    setting="The space `cell` (three nodes, five options an edge, two edges a node), 16 channels, two cells alike, "
    "on 2,000 of CIFAR-10's images in patches of 4 x 4: 60 steps of 32 of weights and of votes, 5 after each "
    "choice. Both rules choose from the same trained network; theirs and five random networks trained from nothing, "
    "60 steps of 64.",
    metric="accuracy on 2,000 test images; skips among the edges of a cell; improvement: over the mean random "
    "network's, relative",
    checks=(
        Check("above the largest numbers' network", "found", ">", "largest"),
        Check("no more skips", "skips", "<=", "largest_skips"),
        Check("above the mean random network", "found", ">", "random"),
        Check("not below what drawing hands over", "found", ">=", "drawing"),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    arena = Arena(Contest(lab.data, seed, steps=60), "cell", CELL)
    figures = arena.random_figures()
    search = arena.relaxed(DARTSPT(), Course(60, 32))
    genomes = {"largest": search.genome(DARTS().choose(search.votes)), "found": search.choose()}
    for name, genome in genomes.items():
        skips = list(arena.space.domain.setting(genome).values()).count("skip")
        figures |= {name: arena.accuracy(genome), "skips" if name == "found" else "largest_skips": skips}
    return figures | {"improvement": figures["found"] / figures["random"] - 1}
