"""Claims: a paper's statement as code, measured over seeds; the verdict is computed and kept as a row of `records/`.

A claim file defines one `CLAIM` and one function `measure(lab, seed) -> {name: number}`. Each check compares two of
the numbers
(or one with a constant). Over the seeds, a check holds when the 95 % interval of the paired difference lies on its
side of zero.
All checks hold: *held*; some: *partly*; none: *failed*.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# two-sided 95 % quantiles of Student's t for 1 to 9 degrees of freedom
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Check:
    """`left comparator right`, each the name of a measured number; `right` may be a constant. `say` is the check in
    words.

    With `<=` and `>=` the bound itself passes, and so does a difference whose interval includes zero but whose mean is
    on the right side.
    """

    say: str
    left: str
    comparator: Literal["<", ">", "<=", ">="]
    right: str | float


@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is checked here.

    Fields:
        method: name of the method.
        statement: the paper's statement in one sentence of our own.
        source: where the paper says it.
        figure: the paper's own figure, as text.
        setting: model, data and levels used here, in words; says so where outliers were planted.
        metric: name and unit of the measured numbers.
        checks: what must hold.
        seeds: seeds that the measurement is repeated with; they draw calibration and evaluation data.
        needs: what must be present (`data` for the shared data folder); absent: not run here.
    """

    method: str
    statement: str
    source: str
    setting: str
    metric: str
    checks: tuple[Check, ...]
    figure: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judged:
    """A check with its computed outcome: mean paired difference left - right, the half-width of its 95 % interval,
    and whether it holds.
    """

    say: str
    left: float
    right: float
    difference: float
    half_width: float
    held: bool


def judge(check: Check, rows: Sequence[Mapping[str, float]]) -> Judged:
    """Compute a check over the seeds' rows.

    >>> judge(Check("a below b", "a", "<", "b"), [{"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 2.1}]).held
    True
    """
    left = [float(r[check.left]) for r in rows]
    right = [float(r[check.right]) if isinstance(check.right, str) else float(check.right) for r in rows]
    diff = [a - b for a, b in zip(left, right, strict=True)]
    n = len(diff)
    mean = sum(diff) / n
    half = 0.0
    if n > 1:
        deviation = math.sqrt(sum((d - mean) ** 2 for d in diff) / (n - 1))
        half = _T95[min(n - 2, len(_T95) - 1)] * deviation / math.sqrt(n)
    signed = mean if check.comparator[0] == ">" else -mean
    held = signed >= 0 if "=" in check.comparator else signed - half > 0
    held = held and all(map(math.isfinite, (*left, *right)))
    return Judged(check.say, sum(left) / n, sum(right) / n, mean, half, held)


def verdict(judged: Sequence[Judged]) -> str:
    """`held`, `partly` or `failed`, from the outcomes alone."""
    passed = sum(j.held for j in judged)
    return "held" if passed == len(judged) else "partly" if passed else "failed"


def record(claim: Claim, rows: Sequence[Mapping[str, float]], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The evidence row: claim, numbers by seed, computed checks and verdict, and the facts of the run (machine,
    versions, hashes).
    """
    judged = [judge(c, rows) for c in claim.checks]
    said = {k: v for k, v in asdict(claim).items() if k not in ("checks", "seeds", "needs")}
    row = {**said, "seeds": list(claim.seeds), "values": [dict(r) for r in rows], "checks": [asdict(j) for j in judged]}
    return json.loads(json.dumps({**row, "verdict": verdict(judged), **facts}))
