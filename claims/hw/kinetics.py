"""Kinetics: reads weighed with the machine's intensity, beside operations alone, over contexts and batches."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from scipy.stats import kendalltau

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Pricer
from trimtab.hw.kinetics import Kinetics
from trimtab.hw.long_context_peak import LongContextPeak
from trimtab.kernels import profile
from trimtab.parts.counting import counted
from trimtab.tasks.stopwatch import LEVEL, Timed, fastest

MODELS = ((512, 6, None), (1024, 2, None), (1024, 4, 4))  # width, blocks, heads of keys and values
CONTEXTS, BATCHES = (1024, 256, 32), (1, 3, 6)

CLAIM = Claim(
    method="kinetics",
    statement="The cost of writing text follows operations and reads weighed with the machine's intensity, their sum, "
    "and not operations alone.",
    source="Sadhukhan et al. 2025, arXiv:2506.05333, section 3",
    setting="Llamas of random weights at 4b/g64 (512 wide with 6 blocks, 1024 with 2, 1024 with 4 and a quarter of the "
    "heads of keys and values); a token written after 32, 256 and 1,024 others, of 1, 3 and 6 sequences: 27 points a "
    "seed. A quick profile is measured before each seed. One thread, seconds of the processor, the fastest of several. "
    "The half of the claim on sparse attention and best of N is not measured.",
    metric="rank: Kendall's tau to the measured seconds; off: median |predicted / measured - 1| once the median ratio "
    "is taken out, since operations have no seconds of their own; raw_off: the same as predicted, operations at the "
    "peak; larger: the larger of the two in place of the sum",
    checks=(
        Check("the rank is better than that of operations", "rank", ">", "operations_rank"),
        Check("the rank is 0.8 and more", "rank", ">=", 0.8),
        Check("nearer than operations, scaled", "off", "<", "operations_off"),
        Check("nearer than operations, as predicted", "raw_off", "<", "operations_raw_off"),
        Check("within 25 %, scaled", "off", "<", 0.25),
        Check("the sum is nearer than the larger of the two", "raw_off", "<", "larger_raw_off"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights."""
    device = profile.measure(1, quick=True, levels=(LEVEL,))
    seconds: list[float] = []
    said: dict[str, list[float]] = {"": [], "operations_": [], "larger_": []}
    pricers: dict[str, Pricer] = {"": Kinetics(), "larger_": LongContextPeak()}
    with profile.threads_set(1):
        for width, blocks, kv_heads in MODELS:
            timed = Timed(width, blocks, kv_heads, max(CONTEXTS), seed)
            session = timed.open(max(CONTEXTS), max(BATCHES))
            for sequence in range(max(BATCHES)):
                timed.read(session, max(CONTEXTS), sequence)
            for context in CONTEXTS:  # from the longest: what is dropped does not come back
                for batch in BATCHES:
                    seconds.append(fastest(partial(timed.write, session, context, batch), 0.1, 10))
                    work = timed.forward(1, context, batch)
                    said["operations_"].append(counted(work, device).arithmetic)
                    for name, pricer in pricers.items():
                        said[name].append(pricer.price(work, device).mid)
    found = {"points": float(len(seconds))}
    for name, prices in said.items():
        ratios = [price / spent for price, spent in zip(prices, seconds, strict=True)]
        middle = statistics.median(ratios)
        found[f"{name}rank"] = float(kendalltau(prices, seconds).statistic)
        found[f"{name}off"] = statistics.median(abs(r / middle - 1) for r in ratios)
        found[f"{name}raw_off"] = statistics.median(abs(r - 1) for r in ratios)
    return found
