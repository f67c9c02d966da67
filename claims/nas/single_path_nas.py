"""Single-Path NAS: weights and time of a step, and what is found beside networks that are as fast."""

from __future__ import annotations

import itertools
import statistics
from random import Random
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.engine.relaxing import Course, Relaxed
from trimtab.nas.darts import DARTS
from trimtab.nas.single_path_nas import SinglePathNAS
from trimtab.tasks.arena import Arena
from trimtab.tasks.contest import Contest

CLAIM = Claim(
    method="single-path-nas",
    statement="One kernel for all options searches with fewer weights and less time a step than all paths side by "
    "side, gets faster networks as latency weighs more, and beats random ones that are as fast.",
    source="Stamoulis et al. 2019, arXiv:1904.02877, sections 3 and 4",
    figure="74.96 % top-1 at 79 ms on a Pixel 1; 8 epochs of search, up to 5,000 times as fast",
    setting="The space `kernel-chain` (four blocks, kernels 3 and 5, factors 2 and 4), 16 channels, on 2,000 of "
    "CIFAR-10's images in patches of 4 x 4, 150 steps of 32 with latency (l = 0.2), and 100 with ten times as much; "
    "the found network and five of the twenty nearest in predicted seconds trained from nothing, 150 steps of 64. "
    "All paths: DARTS's network of the same space.",
    metric="weights of the search; the processor's seconds of a step, medians; predicted seconds of a network: sums "
    "of its options' as measured; accuracy on 2,000 test images; improvement: over the mean random network's that is "
    "as fast, relative",
    checks=(
        Check("half the weights of all paths at most", "weights", "<", "half_path_weights"),
        Check("half the time of a step at most", "seconds", "<", "half_path_seconds"),
        Check("with a larger weight of latency the prediction is lower", "fast_predicted", "<", "predicted"),
        Check("above the mean random network that is as fast", "found", ">", "as_fast"),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def predicted(search: Relaxed, genome: Any) -> float:
    """Sum of the measured seconds of a network's options."""
    return sum(float(search.costs[k.name][place]) for k, place in zip(search.space.domain.knobs, genome, strict=True))


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest = Contest(lab.data, seed, steps=150)
    arena = Arena(contest, "kernel-chain")
    search = arena.relaxed(SinglePathNAS(0.2), Course(150, 32))
    paths = Relaxed(arena.space, DARTS(), *contest.data, Course(1, 32))
    for _ in range(5):
        paths.step(0.01, learning=True)
    genome = search.choose()
    fast = arena.relaxed(SinglePathNAS(2.0), Course(100, 32)).choose()
    cost = predicted(search, genome)
    others = [g for g in itertools.product(range(4), repeat=4) if g != genome]
    near = sorted(others, key=lambda g: abs(predicted(search, g) - cost))[:20]
    rivals = [arena.accuracy(g) for g in Random(seed).sample(near, 5)]
    found, as_fast = arena.accuracy(genome), sum(rivals) / len(rivals)
    return {
        "weights": sum(p.numel() for p in search.weights),
        "half_path_weights": sum(p.numel() for p in paths.weights) / 2,
        "seconds": statistics.median(search.seconds),
        "half_path_seconds": statistics.median(paths.seconds) / 2,
        "predicted": cost,
        "fast_predicted": predicted(search, fast),
        "found": found,
        "as_fast": as_fast,
        "improvement": found / as_fast - 1,
    }
