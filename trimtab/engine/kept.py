"""Forms of programs that proved themselves, kept in the user's cache: to run the same artifact again needs neither the
model's class nor another proof.

A form is plain data, a JSON file named by a hash of all that it follows from: the artifact's description, the kernels,
and the sources that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.journal import write_atomic
from trimtab.engine.program import Form, Gate, Heads, Matrix, Rotary, Scale

SOURCES = ("core/anatomy.py", "core/coupling.py", "core/modelmap.py", "core/trace.py", "engine/program.py")


def folder() -> Path:
    """Where forms lie: `trimtab/forms` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab" / "forms"


def key(kernels: Any, texts: Iterable[str]) -> str:
    """What a form is kept under: a hash of the kernels' name, of the sources that make forms, and of the texts that
    describe the artifact.
    """
    package = Path(__file__).resolve().parent.parent
    sources = [(package / name).read_text("utf-8") for name in SOURCES]
    return hashlib.sha256("\0".join([kernels.__name__, *sources, *texts]).encode()).hexdigest()[:32]


def keep(key: str, form: Form) -> None:
    """Keep a form; where the cache cannot be written, nothing happens."""
    text = json.dumps(asdict(form), separators=(",", ":"))
    try:
        write_atomic(folder() / f"{key}.json", lambda path: path.write_text(text, "utf-8"))
    except (UserError, OSError):
        return


def kept(key: str) -> Form | None:
    """The form that was kept under this key, or None where there is none, or a damaged one."""
    try:
        return _form(json.loads((folder() / f"{key}.json").read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _form(table: dict[str, Any]) -> Form:
    """A form as `dataclasses.asdict` took it apart."""
    rotary, norm = table["rotary"], table["norm"]
    return Form(
        **{
            **table,
            "branches": tuple(map(_branch, table["branches"])),
            "norm": norm and Scale(**norm),
            "rotary": rotary and Rotary(tuple(rotary["frequencies"]), rotary["factor"]),
            "matrices": {path: Matrix(**matrix) for path, matrix in table["matrices"].items()},
        }
    )


def _branch(table: dict[str, Any]) -> Heads | Gate:
    fields = {**table, "inputs": tuple(table["inputs"]), "norm": Scale(**table["norm"])}
    if "gated" in table:
        return Gate(**fields)
    return Heads(**{**fields, **{name: table[name] and Scale(**table[name]) for name in ("q_norm", "k_norm")}})
