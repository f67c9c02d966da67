"""The chart of size against quality, drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from trimtab.report.say import (
    NARROW,
    Json,
    finite,
    lower_is_better,
    metric_of,
    point_of,
    safe,
    say,
    say_cost,
    say_numbers,
    say_steps,
)

PLOT_HEIGHT = 320
_NAMES = {"front": "other fitted plans", "best": "the result", "uniform": "uniform plans", "original": "original"}
_SINGLE = {"best": "best within the budget", "uniform": "best uniform plan", "original": "original"}
_LIMITS = {"bytes": "size", "seconds": "latency"}
_TITLES = {"bytes": "Size", "seconds": "Latency"}
_KINDS = ("original", "uniform", "front", "best")  # drawn in this order, so that the result lies on top


class _Scale:
    """A linear or logarithmic map of a range of numbers onto 0..1, with round ticks."""

    def __init__(self, values: Iterable[float], pad: float, log_above: float) -> None:
        values = list(values)
        low, high = min(values), max(values)
        self.log = low > 0 and high / low > log_above
        if self.log:
            low, high = math.log10(low), math.log10(high)
        room = pad * ((high - low) or abs(high) or 1.0)
        self.low, self.high = low - room, high + room

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return (at - self.low) / (self.high - self.low)

    def ticks(self, wanted: int = 5) -> list[float]:
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
                found = [
                    m * 10.0**p for p in powers for m in mantissas if self.low <= math.log10(m * 10.0**p) <= self.high
                ]
                if len(found) <= wanted + 1:
                    break
            return found
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
        first = math.ceil(self.low / step)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step) + 1)]


def front_section(report: Json) -> str:
    """Size against quality; positions are percents across and pixels down, so that text keeps its size on a phone."""
    cost = str(report.get("cost") or "bytes")
    points = sorted(_classified(report), key=lambda pair: (_KINDS.index(pair[0]), pair[1][cost]))
    if len(points) < 2:
        return ""
    points, paired = _paired(points)
    chosen = next((p for kind, p in reversed(points) if kind == "best"), points[0][1])
    split = chosen.get("split")
    budget = report.get("budget")
    limit = finite(budget.get(_LIMITS.get(cost, cost))) if isinstance(budget, Mapping) else None
    everyone = [point for _, point in points]
    x = _Scale([p[cost] for p in everyone] + ([limit] if limit else []), 0.06, 2.5)
    spread = [v for p in everyone for k in ("value", "low", "high") if (v := finite(p.get(k))) is not None]
    y = _Scale(spread, 0.1, 5)
    down = lower_is_better(report)

    def across(value: float) -> str:
        return f"{100 * x(value):.3f}%"

    def height(value: float) -> float:
        at = y(value)
        return round(PLOT_HEIGHT * (at if down else 1 - at), 2)

    ink = [f'<line class="grid" x1="0" x2="100%" y1="{height(t)}" y2="{height(t)}"/>' for t in y.ticks()]
    ink += [f'<text class="tick" x="-8" y="{height(t) + 4}" text-anchor="end">{say(t)}</text>' for t in y.ticks()]
    ink += [
        f'<text class="tick" x="{across(t)}" y="{PLOT_HEIGHT + 20}" text-anchor="middle">{safe(_said(cost, t))}</text>'
        for t in x.ticks(4)
    ]
    ink.append(f'<line class="axis" x1="0" x2="100%" y1="{PLOT_HEIGHT}" y2="{PLOT_HEIGHT}"/>')
    if limit:
        at, text = across(limit), safe(_said(cost, limit))
        ink.append(f'<line class="limit" x1="{at}" x2="{at}" y1="0" y2="{PLOT_HEIGHT}"/>')
        ink.append(f'<text class="note" x="{at}" y="-8" text-anchor="middle">budget {text}</text>')
    for here, there in pairwise(_undominated(points, down, cost)):
        a, b, level, end = across(here[cost]), across(there[cost]), height(here["value"]), height(there["value"])
        ink.append(f'<line class="step" x1="{a}" x2="{b}" y1="{level}" y2="{level}"/>')
        ink.append(f'<line class="step" x1="{b}" x2="{b}" y1="{level}" y2="{end}"/>')
    for kind, point in points:
        ink.append(_mark(kind, point, across(point[cost]), height, metric_of(report), point is chosen))
    metric, title = safe(metric_of(report)), safe(_TITLES.get(cost, cost.capitalize()))
    kinds = {kind for kind, _ in points}
    keys = "".join(f'<span><i class="mark {k}"></i>{_NAMES[k]}</span>' for k in _NAMES if k in kinds)
    logarithmic = ", logarithmic" if y.log else ""
    return f"""<section aria-labelledby="h-front">
<h2 id="h-front">{title} against quality</h2>
<p class="lead">{metric}{f" on the {safe(split)} data" if split else ""}, better upwards{logarithmic}, with
95 % intervals{" of the paired difference from the original" if paired else ""}. Choose a point to read its plan.</p>
<div class="plot"><svg id="front" height="{PLOT_HEIGHT}" role="group" aria-label="{title} against {metric}">
{"".join(ink)}</svg></div>
<p class="keys">{keys}</p>
<div class="chosen" aria-live="polite"><h3 id="chosen-name">{safe(chosen.get("name") or "chosen")}</h3>
<p id="chosen-numbers">{safe(say_numbers(chosen, metric_of(report)))}</p>
<pre id="chosen-plan" tabindex="0">{safe(say_steps(chosen.get("plan")))}</pre></div>
</section>"""


def _classified(report: Json) -> list[tuple[str, Json]]:
    """The points of one chart, each with its kind: the front's, and the three of the verdict where those are alike.

    The front is measured on the data of the search and the verdict on data that it never saw: two scales.
    """
    best, uniform = point_of(report, "best"), point_of(report, "uniform")
    cost = str(report.get("cost") or "bytes")
    plans = {"best": report.get("plan") or best.get("plan"), "uniform": uniform.get("plan")}
    found: list[tuple[str, Json]] = []
    for point in report.get("front") or ():
        if isinstance(point, Mapping) and _drawable(point, cost):
            kind = next((k for k, plan in plans.items() if plan and point.get("plan") == plan), "front")
            kind = "uniform" if kind == "front" and point.get("family") == "uniform" else kind
            found.append(("original" if point.get("name") == "original" else kind, point))
    if found and best and "best" not in {kind for kind, _ in found}:
        same = best.get("name")
        found = [("best" if kind == "front" and p.get("name") == same else kind, p) for kind, p in found]
    splits = {point.get("split") for _, point in found}
    for key in ("original", "uniform", "best"):
        point = point_of(report, key)
        if _drawable(point, cost) and splits <= {point.get("split")} and key not in {kind for kind, _ in found}:
            found.append((key, {"name": _SINGLE[key]} | ({"plan": plans[key]} if key in plans else {}) | dict(point)))
    return found


def _paired(points: list[tuple[str, Json]]) -> tuple[list[tuple[str, Json]], bool]:
    """Ends of the intervals from the paired difference to the original, where every point has one.

    What makes an item hard for one model makes it hard for all; between points of one chart that cancels.
    """
    base = next((p["value"] for kind, p in points if kind == "original"), None)
    spans = [p.get("difference") for _, p in points]
    if base is None or not all(
        isinstance(s, list | tuple) and len(s) == 2 and None not in map(finite, s) for s in spans
    ):
        return points, False
    ends = [(base + s[0], base + s[1]) for s in spans]  # type: ignore[index]
    moved: list[tuple[str, Json]] = [
        (k, {**p, "low": low, "high": high}) for (k, p), (low, high) in zip(points, ends, strict=True)
    ]
    return moved, True


def _undominated(points: list[tuple[str, Json]], lower: bool, cost: str) -> list[Json]:
    """From small to large, the fitted points that are better than every smaller one."""
    kept: list[Json] = []
    for point in sorted((p for kind, p in points if kind in ("front", "best")), key=lambda p: p[cost]):
        if not kept or ((point["value"] < kept[-1]["value"]) == lower and point["value"] != kept[-1]["value"]):
            kept.append(point)
    return kept


def _said(cost: str, value: float) -> str:
    return say_cost(cost, value).replace(" ", NARROW)


def _drawable(point: Json, cost: str) -> bool:
    count = finite(point.get(cost))
    return count is not None and count > 0 and finite(point.get("value")) is not None


def _mark(key: str, point: Json, x: str, height: Any, metric: str, chosen: bool) -> str:
    """A point with its interval; a nested viewport takes the percentage for shapes that cannot."""
    y = height(point["value"])
    low, high = finite(point.get("low")), finite(point.get("high"))
    whisker = ""
    if low is not None and high is not None and low < high:
        whisker = f'<line class="whisker" x1="0" x2="0" y1="{height(low) - y}" y2="{height(high) - y}"/>'
    shape = {
        "front": '<circle r="5"/>',
        "best": '<circle class="ring" r="11"/><circle r="6.5"/>',
        "uniform": '<rect x="-6" y="-6" width="12" height="12"/>',
        "original": '<path d="M0-8 8 0 0 8-8 0Z"/>',
    }[key]
    name, numbers = str(point.get("name") or "front"), say_numbers(point, metric)
    return (
        f'<svg class="point {key}" x="{x}" y="{y}" tabindex="0" role="button" aria-pressed="{str(chosen).lower()}" '
        f'aria-label="{safe(f"{name}: {numbers}")}" data-name="{safe(name)}" data-tip="{safe(numbers)}" '
        f'data-plan="{safe(say_steps(point.get("plan")))}">{whisker}<circle class="halo" r="15"/>{shape}</svg>'
    )
