"""Idealized runtime: four isolated runs of a model predict others, and rank models that noise would put in disorder."""

from __future__ import annotations

import random
import statistics
from functools import partial
from typing import Any

from scipy.stats import kendalltau

from trimtab.core.claim import Check, Claim
from trimtab.hw.idealized_runtime import IdealizedRuntime, Run
from trimtab.kernels import profile
from trimtab.tasks.stopwatch import LEVEL, Timed, fastest

MODELS = ((256, 4), (256, 6), (320, 6), (384, 5), (384, 8), (512, 6), (512, 8), (640, 6))  # width, blocks
FITTED = ((32, 1), (32, 24), (384, 1), (384, 24))  # tokens read and written
UNSEEN = ((16, 40), (64, 64), (128, 12), (256, 80), (512, 4), (448, 48))
NOISE = 1.0  # mean of what contention adds to a run, in its own seconds

CLAIM = Claim(
    method="idealized-runtime",
    statement="A prompt's time and a written token's, fitted on a few isolated runs, give the time of any run, and "
    "rank models as runs without contention do.",
    source="Narayanan et al. 2023, arXiv:2305.02440, sections 3 to 5",
    figure="ten models compared; the runs of a public interface have up to several times the idealized seconds",
    setting="Eight Llamas of random weights at 4b/g64, 256 to 640 wide with 4 to 8 blocks; four runs are fitted, of 32 "
    "and 384 tokens read and 1 and 24 written, and six of other lengths are predicted. A quick profile is measured "
    "before each seed. One thread, seconds of the processor, the fastest of several. Noise is planted: an observed run "
    "is one of the six with a time added that is exponentially distributed, of the run's own seconds on average.",
    metric="off: |predicted / measured - 1| of the unseen runs, median and worst over 48; rank: Kendall's tau of the "
    "models' seconds, all six runs together, to the measured ones; observed: of runs with noise; one_token: a prompt "
    "read at the speed of a written token's, which is a model of one part",
    checks=(
        Check("unseen runs within 10 %, median", "off", "<", 0.1),
        Check("none off by 30 % and more", "worst", "<", 0.3),
        Check("nearer than with one part", "off", "<", "one_token_off"),
        Check("models in the order of isolated runs, tau of 0.95 and more", "rank", ">=", 0.95),
        Check("and nearer to it than by observed runs", "rank", ">", "observed_rank"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and noise."""
    device, rng = profile.measure(1, quick=True, levels=(LEVEL,)), random.Random(seed)
    errors: list[float] = []
    flat: list[float] = []
    isolated, observed, predicted = [], [], []
    with profile.threads_set(1):
        for width, blocks in MODELS:
            timed = Timed(width, blocks, context=640, seed=seed)
            session = timed.open(640)

            def spent(prompt: int, outputs: int, timed: Timed = timed, session: Any = session) -> float:
                return fastest(partial(timed.run, session, prompt, outputs), 0.1, 3)

            runs = [Run(p, o, spent(p, o)) for p, o in FITTED]
            method = IdealizedRuntime.fitted(timed.work, device, runs)
            token = (runs[1].seconds - runs[0].seconds) / (runs[1].outputs - 1)
            true = [spent(p, o) for p, o in UNSEEN]
            said = [method.runtime(timed.work, device, p, o).mid for p, o in UNSEEN]
            errors += [abs(s / t - 1) for s, t in zip(said, true, strict=True)]
            flat += [abs(token * (p + o - 1) / t - 1) for (p, o), t in zip(UNSEEN, true, strict=True)]
            isolated.append(sum(true))
            predicted.append(sum(said))
            observed.append(sum(t * (1 + rng.expovariate(1 / NOISE)) for t in true))
    return {
        "off": statistics.median(errors),
        "worst": max(errors),
        "one_token_off": statistics.median(flat),
        "rank": float(kendalltau(predicted, isolated).statistic),
        "observed_rank": float(kendalltau(observed, isolated).statistic),
    }
