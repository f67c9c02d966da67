"""Numbers and points of a report in words, and text made safe for markup."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from trimtab.core.budget import say_bytes

Json = Mapping[str, Any]
NARROW = "\u202f"  # a narrow space that keeps a number and its unit on one line


def safe(value: Any) -> str:
    return escape(str(value), quote=True)


def finite(value: Any) -> float | None:
    """A finite number, or None for whatever else a report may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def say(value: Any) -> str:
    """A number with four significant digits, for a reader; a dash where there is none.

    >>> say(12.34567), say(0.8), say(None), say(1234567.0)
    ('12.35', '0.8', '–', '1234567')
    """
    number = finite(value)
    if number is None:
        return "–"
    return f"{number:.0f}" if abs(number) >= 10_000 else f"{number:.4g}"


def say_size(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else say_bytes(number).replace(" ", NARROW)


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


def say_percent(value: Any) -> str:
    number = finite(value)
    return "–" if number is None else f"{100 * number:.1f}{NARROW}%"


def say_duration(value: Any) -> str:
    """Seconds for a reader.

    >>> say_duration(0.25), say_duration(12.3), say_duration(312)
    ('0.25 s', '12 s', '5 min 12 s')
    """
    number = finite(value)
    if number is None:
        return "–"
    if number >= 120:
        return f"{int(number // 60)} min {int(number % 60)} s"
    return f"{number:.0f} s" if number >= 10 else f"{number:.2g} s"


def point_of(report: Json, key: str) -> Json:
    point = report.get(key)
    return point if isinstance(point, Mapping) else {}


def points_of(report: Json) -> list[Json]:
    front = [p for p in report.get("front") or () if isinstance(p, Mapping)]
    return [p for p in (point_of(report, k) for k in ("original", "best", "uniform")) if p] + front


def metric_of(report: Json) -> str:
    return next((str(p["metric"]) for p in points_of(report) if p.get("metric")), "quality")


def lower_is_better(report: Json) -> bool:
    """Read from the points themselves: a point that keeps less than all of the metric lies on its worse side."""
    reference = finite(point_of(report, "original").get("value"))
    for point in points_of(report):
        value, kept = finite(point.get("value")), finite(point.get("retained"))
        if None not in (reference, value, kept) and value != reference and kept != 1:
            return (value > reference) == (kept < 1)  # type: ignore[operator]
    return any(word in metric_of(report) for word in ("perplexity", "loss", "bits", "error", "divergence"))


def say_interval(point: Json) -> str:
    low, high = finite(point.get("low")), finite(point.get("high"))
    return f"{say(low)} to {say(high)}" if low is not None and high is not None else ""


def say_numbers(point: Json, metric: str) -> str:
    parts = [say_size(point.get("bytes")), f"{metric} {say(point.get('value'))}"]
    if interval := say_interval(point):
        parts[-1] += f" ({interval})"
    if finite(point.get("retained")) is not None:
        parts.append(f"{say_percent(point['retained'])} kept")
    return " · ".join(parts)


def say_steps(plan: Any) -> str:
    """A plan with each step on its line; it parses as before."""
    return str(plan).replace(" | ", "\n| ") if plan else "no plan is recorded for this point"
