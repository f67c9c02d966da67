"""What methods exist, what each needs, and what the evidence says: cards, claims and records put together."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.util
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.core.claim import code_hash, record, worse
from trimtab.core.errors import UserError
from trimtab.core.method import FAMILIES, Method, did_you_mean, discover

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
KEPT = Path(importlib.util.cache_from_source(__file__)).with_suffix(".json")  # beside the bytecode, one a Python
NOT_RUN = "not run here"
Entry = dict[str, Any]


def entries() -> dict[str, Entry]:
    """What every method says of itself, by name.

    Asking the classes means importing torch, which takes several times as long as all the rest of `trimtab methods`.
    The answers are therefore kept, and like Python's bytecode they hold until a source has another time or size.
    """
    loaded = {name.split(".")[1] for name in sys.modules if name.startswith("trimtab.")} & set(FAMILIES)
    if loaded or entry_points(group="trimtab.methods"):  # perhaps of older sources, or of some that are not watched
        return _ask()
    state = _state()
    try:
        kept = json.loads(KEPT.read_text("utf-8"))
    except (OSError, ValueError):
        kept = {}
    if kept.get("state") != state:
        found = _ask()
        _keep({"state": state, "entries": found})
        return found
    for entry in kept["entries"].values():
        for field in entry["fields"]:
            field["default"] = _tuples(field["default"])
    return kept["entries"]


def _state() -> str:
    stats = [(str(path), path.stat()) for path in sorted(PACKAGE.rglob("*.py"))]
    return hashlib.sha256(repr([(path, s.st_mtime_ns, s.st_size) for path, s in stats]).encode()).hexdigest()


def _ask() -> dict[str, Entry]:
    return {name: _entry(cls) for name, cls in discover().items()}


def _entry(cls: type[Method]) -> Entry:
    card = cls.card
    fields = [{"name": f.name, "default": f.default} for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return {
        "name": card.name,
        "family": cls.family(),
        "catalogue": list(card.catalogue),
        "paper": card.paper,
        "verb": cls.verb,
        "requires": sorted(card.requires),
        "leaves": sorted(card.leaves),
        "keeps": sorted(card.keeps),
        "doc": inspect.getdoc(cls) or "",
        "fields": fields,
        "statistics": list(cls.needs()),
        "levels": list(card.levels),
        "kinds": sorted(card.kinds),
        "claim": card.claim,
        "file": str(Path(inspect.getfile(cls)).resolve()),
        "module": cls.__module__,
    }


def _keep(kept: Mapping[str, Any]) -> None:
    new = KEPT.with_suffix(f".{os.getpid()}")
    try:
        KEPT.parent.mkdir(exist_ok=True)
        new.write_text(json.dumps(kept), encoding="utf-8")
        new.replace(KEPT)
    except (OSError, TypeError):  # a folder that cannot be written, or a default that JSON cannot say: ask again
        new.unlink(missing_ok=True)


def _tuples(value: Any) -> Any:
    """JSON made lists of the tuples; no default is a list, which dataclasses refuse."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def rows(family: str | None = None) -> list[dict[str, Any]]:
    """A row for each method, as `trimtab methods --json` prints them.

    Raises:
        UserError: no such family.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(
            f"unknown family {family!r}{did_you_mean(family, FAMILIES)}; the families are {', '.join(FAMILIES)}"
        )
    claims = claim_files()
    return [_row(entry, claims) for entry in entries().values() if family in (None, entry["family"])]


def _row(entry: Entry, claims: Mapping[str, Path]) -> dict[str, Any]:
    path, newest = record_path(entry["family"], entry["name"]), newest_record(entry["family"], entry["name"])
    return {
        **{k: entry[k] for k in ("name", "family", "catalogue", "paper", "verb", "requires", "leaves", "keeps")},
        "verdict": newest["verdict"] if newest else "none",
        "record": _say(path) if newest else None,
        "stale": newest is not None and _is_stale(newest, entry, claims),
    }


def _is_stale(row: Mapping[str, Any], entry: Entry, claims: Mapping[str, Path]) -> bool:
    """Whether a row of evidence was measured with other code than the present, or does not say with which."""
    return "code" not in row or row["code"] != code_of(entry, claims)


def code_of(entry: Entry, claims: Mapping[str, Path]) -> str | None:
    """Hash of the sources that the numbers of a method's claim depend on; None where it has no claim."""
    claim = claims.get(entry["name"])
    own = entry["module"].rpartition(".")[0]
    packages = {"trimtab.parts": PACKAGE / "parts", own: Path(entry["file"]).parent}
    return code_hash(entry["module"], claim, packages) if claim else None


def record_path(family: str, name: str) -> Path:
    """Where the rows of evidence of a method lie."""
    return ROOT / "records" / family / f"{name}.jsonl"


def _say(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def newest_record(family: str, name: str) -> dict[str, Any] | None:
    """The newest row of evidence of a method; rows are appended, so it is the last."""
    path = record_path(family, name)
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def found(name: str) -> Entry:
    """What the method of that name says of itself.

    Raises:
        UserError: there is none.
    """
    known = entries()
    if name not in known:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, known)}; `trimtab methods` lists all {len(known)}")
    return known[name]


def about(name: str) -> dict[str, Any]:
    """All about one method, as `trimtab show --json` prints it."""
    entry = found(name)
    newest = newest_record(entry["family"], name)
    return {
        **_row(entry, claim_files()),
        **{key: entry[key] for key in ("doc", "fields", "statistics", "levels", "kinds", "claim")},
        "file": _say(Path(entry["file"])),
        "checks": newest["checks"] if newest else [],
    }


def keep_benchmark(row: Mapping[str, Any], kept: bool = True) -> None:
    """Print what a benchmark measured, with machine, versions and date, and append it to the record of its name.

    Args:
        row: its name as `benchmark`, and what it measured.
        kept: append it; a try that measures less only prints.
    """
    from trimtab.evidence import machine, versions

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = json.dumps({**row, "machine": machine(), "versions": versions(), "date": now})
    print(text, flush=True)
    if kept:
        target = record_path("benchmarks", row["benchmark"])
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def claim_files() -> dict[str, Path]:
    """Method name -> claim file; the claims lie beside the package in a clone."""
    files = {}
    for path in sorted((ROOT / "claims").glob("*/*.py")):
        text = path.read_text("utf-8")
        name = next((line.split('"')[1] for line in text.splitlines() if line.strip().startswith("method=")), None)
        if name:
            files[name] = path
    return files


def claimed() -> list[str]:
    """Names of the methods that have a claim."""
    return list(claim_files())


def stale() -> list[str]:
    """Names of the methods whose claim was measured with other code than the present, the quickest first, and then of
    those whose claim has no record.
    """
    claims, known = claim_files(), entries()
    recorded, missing = [], []
    for name in claims.keys() & known.keys():
        newest = newest_record(known[name]["family"], name)
        if newest is None:
            missing.append(name)
        elif _is_stale(newest, known[name], claims):
            recorded.append((newest.get("seconds", 0.0), name))
    return [*(name for _, name in sorted(recorded)), *sorted(missing)]


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"claims_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their own
    spec.loader.exec_module(module)
    return module


def data_folder() -> Path | None:
    """The shared data: `TRIMTAB_DATA`, or `../shared/data` beside a clone; None where there is none."""
    path = Path(os.environ.get("TRIMTAB_DATA") or ROOT.parent / "shared" / "data")
    return path if path.is_dir() else None


def run_claim(
    name: str,
    check: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    code: str | None = None,
) -> dict[str, Any]:
    """Measure a method's claim over its seeds, and append the row to its record.

    Args:
        name: of the method.
        check: append nothing; the row gets two more keys, `recorded` (verdict of the newest row of the record, or None)
            and `worse` (than that).
        progress: is told what, how much of it is done, and how much there is.
        code: hash of the sources that this process runs; by default that of those on disk.

    Raises:
        UserError: no such method, or it has no claim here.
    """
    from trimtab.evidence import machine, versions
    from trimtab.lab import Lab

    entry, claims = found(name), claim_files()
    if name not in claims:
        raise UserError(
            f"{name} has no claim here; claims lie in the folder claims/ of a clone, which has them for {len(claims)} "
            "methods; `trimtab methods` says which"
        )
    module = _module(claims[name])
    claim = module.CLAIM
    data = data_folder()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts: dict[str, Any] = {
        "catalogue": entry["catalogue"],
        "paper": entry["paper"],
        "code": code or code_of(entry, claims),
        "machine": machine(),
        "versions": versions(),
        "date": now,
    }
    missing = [need for need in claim.needs if need == "data" and data is None]
    if missing:
        row = {
            **_said(claim),
            "seeds": list(claim.seeds),
            "values": [],
            "checks": [],
            "verdict": NOT_RUN,
            "reason": f"needs {missing[0]}",
            **facts,
        }
    else:
        start, values, lab = time.perf_counter(), [], Lab(data)
        progress(f"claim {name}", 0, len(claim.seeds))
        for i, seed in enumerate(claim.seeds):
            values.append(module.measure(lab, seed))
            progress(f"claim {name}", i + 1, len(claim.seeds))
        from trimtab.engine.measure import peak_bytes

        facts |= {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak_bytes(), "hashes": lab.hashes}
        row = record(claim, values, facts)
    if check:
        newest = newest_record(entry["family"], name)
        recorded = newest["verdict"] if newest else None
        return {**row, "recorded": recorded, "worse": worse(row["verdict"], recorded)}
    target = record_path(entry["family"], name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def run_claims(
    names: Sequence[str],
    minutes: float = math.inf,
    check: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure claims one after the other, see `run_claim`; none is started after so many minutes.

    Returns:
        The rows, and the names of the claims that were left out.
    """
    start = time.monotonic()
    claims, known = claim_files(), entries()
    # Taken before the first is measured: an hour later the files may hold other methods than those that are loaded.
    codes = {name: code_of(known[name], claims) for name in names if name in known}
    measured: list[dict[str, Any]] = []
    for name in names:
        if time.monotonic() - start >= 60 * minutes:
            break
        measured.append(run_claim(name, check, progress, codes.get(name)))
        if len(names) > 1:
            progress("claims", len(measured), len(names))
    return measured, list(names[len(measured) :])


def _said(claim: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(claim).items() if k not in ("checks", "seeds", "needs")}
