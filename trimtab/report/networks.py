"""A search's report for a reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.budget import say_bytes
from trimtab.report.say import say_cost


def print_found(found: Mapping[str, Any]) -> None:
    """A report for a reader."""
    best, cost = found["best"], found["cost"]
    print(
        f"{found['networks']:,} networks in {found['space']}; {found['trials']} scored, {found['steps']} steps trained"
    )
    units = {"seconds": "", "bytes": ""}
    for name, title in (("original", "largest"), ("uniform", "best uniform"), ("best", "result")):
        point = found[name]
        if point is not None:
            spent = ", ".join(f"{say_cost(n, point[n])} {units.get(n, n)}".strip() for n in found["ranges"])
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
