"""Long-context peak analysis: four effects of length against what is measured, with packed caches and fewer heads."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from trimtab.core.claim import Check, Claim
from trimtab.core.device import Device
from trimtab.hw.long_context_peak import LongContextPeak
from trimtab.kernels import profile
from trimtab.tasks.stopwatch import LEVEL, Timed, fastest

WIDTH, BLOCKS, FEWER = 1024, 4, 4  # 16 heads, and 4 of keys and values where they are grouped
LENGTHS = (2560, 2048, 1536, 1024, 512)
CACHES = ("fp16", "kivi4", "kivi2")
MEMORY = 1 << 30
WITHIN = 0.25

CLAIM = Claim(
    method="long-context-peak",
    statement="Prefill, users held at once, decoding and switching follow the bytes of the cache, the memory, "
    "arithmetic and bandwidths, at the peak of each.",
    source="Fu 2024, arXiv:2405.08944, sections 2 and 3",
    figure="34 billion weights, 50,000 tokens beside 4,000, one A100: 14.1 s of prefill beside 0.89, 1 user beside "
    "20, 9.8 s for a screen of text beside 8.5, 1.1 s to switch beside 0.1",
    setting="A Llama of random weights at 4b/g64, 1024 wide with 4 blocks and 16 heads of 64 channels, after 512 to "
    "2,560 tokens; caches in fp16, kivi4 and kivi2, and in fp16 with 4 heads of keys and values; 1 GiB of memory; "
    "switching copies buffers of the cache's bytes in memory. A quick profile is measured before each seed. One "
    "thread, seconds of the processor, the fastest of several.",
    metric="of a token's decoding over the bytes of the cache: linear, R squared of a straight line; slope_off, its "
    "seconds a byte beside those at memory's bandwidth, and reached_off, beside those at the share of it that the "
    "profile's attention reaches. Others that end in _off are of measured to predicted, less one: of growth from the "
    "shortest to the longest text (prefill), of seconds (switch), of bytes a text that the session holds (users), of "
    "what a cache's tokens cost beside fp16 with all heads (kivi4, kivi2, grouped). least: the least of measured to "
    "predicted seconds",
    checks=(
        Check("decoding is linear in bytes", "linear", ">=", 0.98),
        Check("at memory's bandwidth, within 25 %", "slope_off", "<", WITHIN),
        Check("at the share of it that attention reaches, within 25 %", "reached_off", "<", WITHIN),
        Check("prefill grows as predicted, within 25 %", "prefill_off", "<", WITHIN),
        Check("a text takes the bytes that are predicted, whatever the cache", "users_off", "<=", 0.0),
        Check("switching takes as long as predicted, within 25 %", "switch_off", "<", WITHIN),
        Check("nothing is faster than the peak", "least", ">=", 1.0),
        *(
            Check(f"{name}: tokens cost as much less as they have fewer bytes, within 25 %", f"{name}_off", "<", WITHIN)
            for name in ("grouped", "kivi4", "kivi2")
        ),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights."""
    device = profile.measure(1, quick=True, levels=(LEVEL,))
    with profile.threads_set(1):
        full = Timed(WIDTH, BLOCKS, None, max(LENGTHS), seed)
        seen = {cache: Series(full, cache, device) for cache in CACHES}
        seen["grouped"] = Series(Timed(WIDTH, BLOCKS, FEWER, max(LENGTHS), seed), "fp16", device)
        switch = switching(int(seen["fp16"].bytes[0]))
    plain = seen["fp16"]
    line = np.polyfit(plain.bytes, plain.decode, 1)
    rest = np.array(plain.decode) - np.polyval(line, plain.bytes)
    slope = float(line[0]) * device.from_memory
    ratios = [m / p for one in seen.values() for m, p in zip(one.decode, one.decode_predicted, strict=True)]
    ratios += [m / p for one in seen.values() for m, p in zip(one.prefill, one.prefill_predicted, strict=True)]
    found = {
        "linear": 1 - float(rest.var() / np.var(plain.decode)),
        "slope": slope,
        "slope_off": abs(slope - 1),
        "reached_off": abs(slope * device.kernel("attention")[0].far - 1),
        "prefill_off": abs(grown(plain.prefill) / grown(plain.prefill_predicted) - 1),
        "users_off": max(abs(one.held / one.bytes[0] - 1) for one in seen.values()),
        "switch_off": abs(switch / plain.switch_predicted - 1),
        "least": min(ratios),
    }
    for name in ("grouped", "kivi4", "kivi2"):
        one = seen[name]
        cost, share = added(one.decode) / added(plain.decode), added(one.bytes) / added(plain.bytes)
        found |= {f"{name}_cost": cost, f"{name}_bytes": share, f"{name}_off": abs(cost / share - 1)}
        found[f"{name}_users"] = float(one.users)
    return {**found, "fp16_users": float(plain.users)}


class Series:
    """One cache of one model at every length, measured and predicted, from the longest to the shortest."""

    def __init__(self, timed: Timed, cache: str, device: Device) -> None:
        method = LongContextPeak(cache=cache, memory=MEMORY)
        said = [method.effects(timed.forward(length), device) for length in LENGTHS]
        self.bytes = [float(e.cache_bytes) for e in said]
        self.decode_predicted = [e.decode for e in said]
        self.prefill_predicted = [said[0].prefill, said[-1].prefill]
        self.switch_predicted, self.users = said[0].switch, said[0].users
        session, two = (timed.open(max(LENGTHS) - 1, sequences, cache) for sequences in (1, 2))
        self.held = two.program.nbytes - session.program.nbytes
        ends = (LENGTHS[-1], LENGTHS[0])
        self.prefill = [fastest(partial(timed.read, session, length), 0.0, 2) for length in ends][::-1]
        # from the longest: what is dropped does not come back
        self.decode = [fastest(partial(timed.write, session, length - 1), 0.1, 10) for length in LENGTHS]


def added(values: list[float]) -> float:
    """From the shortest to the longest text."""
    return values[0] - values[-1]


def grown(values: list[float]) -> float:
    """The longest text's beside the shortest's."""
    return values[0] / values[-1]


def switching(size: int) -> float:
    """Seconds of bringing one cache out of its place, and another in."""
    here, there, other = (torch.ones(size, dtype=torch.uint8) for _ in range(3))

    def switch() -> None:
        there.copy_(here)
        here.copy_(other)

    return fastest(switch, 0.1, 5)
