"""A search's report for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.budget import say_bytes


def say_cost(name: str, value: float) -> str:
    """A cost for a reader.

    >>> say_cost("seconds", 0.0042), say_cost("flops", 4.2e6), say_cost("bytes", 4.2e6)
    ('4.2 ms', '4.2 M', '4.2 MB')
    """
    if name == "seconds":
        return f"{1000 * value:.3g} ms"
    if name == "bytes":
        return say_bytes(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def print_found(found: Mapping[str, Any]) -> None:
    """A report for a reader."""
    best, cost = found["best"], found["cost"]
    print(
        f"{found['networks']:,} networks in {found['space']}; {found['trials']} scored, {found['steps']} steps trained"
    )
    for name, title in (("original", "largest"), ("uniform", "best uniform"), ("best", "result")):
        point = found[name]
        if point is not None:
            spent = ", ".join(f"{say_cost(n, point[n])} {n}" for n in found["ranges"])
            print(
                f"{title:13} {point['metric']} {point['value']:.4g} [{point['low']:.4g}, {point['high']:.4g}]  {spent}"
            )
    latency, random = found["latency"], found["random"]
    if latency["measured"] is not None:
        print(f"latency {1000 * latency['priced']:.3g} ms priced, {1000 * latency['measured']:.3g} ms measured")
    if random["networks"]:
        print(
            f"{random['networks']} random networks of its {cost}: {best['metric']} {random['mean']:.4g} on average; "
            f"the result improves on it by {random['improvement']:.2%}"
        )
    print(found["verdict"])
    print(f"network: {found['artifact']} ({say_bytes(found['gate']['bytes'])}, needs {found['gate']['needs']})")
