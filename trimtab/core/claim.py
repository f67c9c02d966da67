"""Claims: a paper's statement as code, measured over seeds; the verdict is computed and kept as a row of `records/`.

A claim file defines one `CLAIM` and one function `measure(lab, seed) -> {name: number}`. Each check compares two of the
numbers (or one with a constant). Over the seeds, a check holds when the 95 % interval of the paired difference lies on
its side of zero. All checks hold: *held*; some: *partly*; none: *failed*.

A row also says with which code it was measured. Once the code is another, the row's verdict is stale.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

VERDICTS = ("failed", "partly", "held")  # from worst to best

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


def worse(verdict: str, recorded: str | None) -> bool:
    """Whether a verdict is worse than a recorded one; what was not run can be neither better nor worse.

    >>> worse("partly", "held"), worse("held", "partly"), worse("failed", None)
    (True, False, False)
    """
    return verdict in VERDICTS and recorded in VERDICTS and VERDICTS.index(verdict) < VERDICTS.index(recorded)


def code_hash(module: str, claim: Path, packages: Mapping[str, Path]) -> str:
    """Hash of the sources that a claim's numbers depend on: the method's, the claim's, and those of the packages that
    the method imports, directly or not. It is read off the text, and comments, docstrings and layout do not count.

    Args:
        module: full name of the method's module; it lies in one of the packages.
        claim: file of the claim.
        packages: full name -> folder.
    """
    found = {"": _substance(claim.read_text("utf-8"), "")[0]}
    queue = [module]
    while queue:
        name = queue.pop()
        package, _, last = name.rpartition(".")
        if name in found or package not in packages or not (file := packages[package] / f"{last}.py").is_file():
            continue
        found[name], imported = _substance(file.read_text("utf-8"), name)
        queue += imported
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


@cache
def _substance(text: str, module: str) -> tuple[str, tuple[str, ...]]:
    """A source as text without comments, docstrings and layout, and the full names of what it imports."""
    tree = ast.parse(text)
    return _plain(tree), tuple(_imports(tree, module))


def _plain(node: Any) -> str:
    """A syntax tree as text. `ast.dump` would say the same of empty fields differently from one Python to the next."""
    if isinstance(node, ast.AST):
        filled = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return f"{type(node).__name__}({', '.join(f'{name}={_plain(value)}' for name, value in filled)})"
    if isinstance(node, list):
        return f"[{', '.join(_plain(part) for part in node if not _is_docstring(part))}]"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    """A statement that is a text alone, wherever it stands, does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imports(tree: ast.Module, module: str) -> Iterator[str]:
    """Full names of the modules, and of the names in them, that a module imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))
