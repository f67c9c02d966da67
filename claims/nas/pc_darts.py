"""PC-DARTS: memory, time and what is found, beside DARTS and random architectures."""

from __future__ import annotations

import statistics
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.engine.relaxing import Course, Relaxed
from trimtab.nas.darts import DARTS
from trimtab.nas.pc_darts import PCDARTS
from trimtab.tasks.arena import CELL, Arena
from trimtab.tasks.contest import Contest

CLAIM = Claim(
    method="pc-darts",
    statement="Options that see a quarter of the channels need less memory and time than DARTS, and find no worse.",
    source="Xu et al. 2019, arXiv:1907.05737, table 1 and section 4.2",
    figure="CIFAR-10: 2.57 % error in 0.1 GPU-days; DARTS 2.76 % in 1",
    setting="The space `cell` (three nodes, five options an edge, two edges a node), 16 channels, two cells alike, "
    "on 2,000 of CIFAR-10's images in patches of 4 x 4: 60 steps of 32 of weights and, past the warm-up, of votes; "
    "K = 4. The found and five random networks trained from nothing, 60 steps of 64. Memory and time of a step: the "
    "same space with 32 channels and a batch of 64, three steps.",
    metric="accuracy on 2,000 test images; bytes kept for a backward pass at most; the processor's seconds of a step "
    "of weights and votes; skips among the edges of a cell; improvement: over the mean random network's, relative",
    checks=(
        Check("half of DARTS's memory at most", "bytes", "<", "half_darts_bytes"),
        Check("less time a step", "seconds", "<", "darts_seconds"),
        Check("no more skips than DARTS", "skips", "<=", "darts_skips"),
        Check("what is found is not worse than DARTS's", "found", ">=", "darts"),
        Check("above the mean random network", "found", ">", "random"),
        Check("not below what drawing hands over", "found", ">=", "drawing"),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def step(contest: Contest, method: Any) -> tuple[int, float]:
    """Bytes kept and seconds of a step of weights and votes, in a wider space."""
    wide = Arena(contest, "cell", CELL, arguments=(("width", 32),))
    search = Relaxed(wide.space, method, *contest.data, Course(1, 64))
    for _ in range(3):
        search.step(0.01, learning=True)
    return max(search.saved_bytes.values()), statistics.median(search.seconds)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest = Contest(lab.data, seed, steps=60)
    arena = Arena(contest, "cell", CELL)
    figures = arena.random_figures()
    for name, method in (("found", PCDARTS()), ("darts", DARTS())):
        genome = arena.relaxed(method, Course(60, 32)).choose()
        figures[name] = arena.accuracy(genome)
        skips = list(arena.space.domain.setting(genome).values()).count("skip")
        figures["skips" if name == "found" else "darts_skips"] = skips
    (bytes_, seconds), (darts_bytes, darts_seconds) = (step(contest, method) for method in (PCDARTS(), DARTS()))
    figures |= {
        "bytes": bytes_,
        "seconds": seconds,
        "half_darts_bytes": darts_bytes / 2,
        "darts_seconds": darts_seconds,
    }
    return figures | {"improvement": figures["found"] / figures["random"] - 1}
