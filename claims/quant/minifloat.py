"""Minifloats: at three to five bits below integers of the same bytes, and what a multiply-accumulate costs."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, log2
from typing import Any

from trimtab.core.claim import Check, Claim

PAIRS = {3: ("e1m1", "3b"), 4: ("e2m1", "4b"), 5: ("e2m2", "5b"), 6: ("e2m3", "6b"), 8: ("e3m4", "8b")}
LOW = (3, 4, 5)

CLAIM = Claim(
    method="minifloat",
    statement="At few bits minifloats lose less than integers of equal bits; counting what a multiply-accumulate "
    "costs, integers keep much of the Pareto front.",
    source="Aggarwal et al. 2023, arXiv:2311.12359, sections III and IV",
    figure="minifloats ahead from four bits on; integers often Pareto-optimal against FPGA resources",
    setting="The shipped convolutional network on 8x8 digits, weights of all sites, one scale a channel by squared "
    "error; integers rounded to nearest, symmetric; minifloats with the mean corrected, and without; 256 calibration "
    "and 150 test images. A multiply-accumulate is priced by formula, weights and activations alike: cells of the "
    "product, and an exact accumulator of the paper's width, behind a shifter for floats; nothing was synthesised.",
    metric="kl: mean KL divergence to the original, nats an image; front: share of integers among the Pareto-optimal",
    checks=(
        *(Check(f"KL at {b} bits below integers'", f"kl_float_{b}", "<", f"kl_int_{b}") for b in LOW),
        *(Check(f"and without correction, at {b} bits", f"kl_plain_{b}", "<", f"kl_int_{b}") for b in LOW),
        Check("integers are half of the front or more", "front", ">=", 0.5),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test images."""
    bench = lab.bench("pocket-cnn", seed, calibration=256, items=150)
    terms = ceil(log2(max(s.weights // s.shape[0] for s in bench.sites if s.shape)))
    numbers, points = {"accuracy": bench.measure().value}, []
    for bits, (small, integer) in PAIRS.items():
        found = {
            "float": bench.measure(f"minifloat @ {small}/row"),
            "plain": bench.measure(f"minifloat(correct=False) @ {small}/row"),
            "int": bench.measure(f"rtn(rule='mse') @ {integer}/row/sym"),
        }
        numbers |= {f"kl_{name}_{bits}": m.damage for name, m in found.items()}
        numbers |= {f"accuracy_{name}_{bits}": m.value for name, m in found.items()}
        points.append((float_cost(int(small[1]), int(small[3]), terms), found["float"].damage, False))
        points.append((integer_cost(bits, terms), found["int"].damage, True))
    numbers["front"] = share_of_integers(points)
    return numbers


def integer_cost(bits: int, terms: int) -> float:
    """Cells of a product of two integers, and the exact accumulator of 2**terms of them: b^2 + (2 b + terms + 1)."""
    return bits**2 + 2 * bits + terms + 1


def float_cost(e: int, m: int, terms: int) -> float:
    """Cells of a product of two minifloats and the adder of their exponents, and the exact accumulator of 2**terms of
    them, 2^(e+1) + 2 m + terms - 1 bits wide, behind a shifter of e + 1 stages."""
    accumulator = 2 ** (e + 1) + 2 * m + terms - 1
    return (m + 1) ** 2 + 2 * e + accumulator * (e + 2)


def share_of_integers(points: Iterable[tuple[float, float, bool]]) -> float:
    """Share of integers among the points that no other point undercuts in cost and damage."""
    best, front = float("inf"), []
    for _, damage, integer in sorted(points):
        if damage < best:
            best = damage
            front.append(integer)
    return sum(front) / len(front)
