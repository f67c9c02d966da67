"""What methods exist, what each needs, and what the evidence says: cards, claims and records put together."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.method import FAMILIES, Method, did_you_mean, discover

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN = "not run here"


def rows(family: str | None = None) -> list[dict[str, Any]]:
    """A row for each method, as `trimtab methods --json` prints them.

    Raises:
        UserError: no such family.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(
            f"unknown family {family!r}{did_you_mean(family, FAMILIES)}; the families are {', '.join(FAMILIES)}"
        )
    return [_row(cls) for cls in discover().values() if family in (None, cls.family())]


def _row(cls: type[Method]) -> dict[str, Any]:
    card, newest = cls.card, newest_record(cls)
    return {
        **{
            "name": card.name,
            "family": cls.family(),
            "catalogue": list(card.catalogue),
            "paper": card.paper,
            "verb": cls.verb,
        },
        **{"requires": sorted(card.requires), "leaves": sorted(card.leaves), "keeps": sorted(card.keeps)},
        **{"verdict": newest["verdict"] if newest else "none", "record": _say(record_path(cls)) if newest else None},
    }


def record_path(cls: type[Method]) -> Path:
    """Where the rows of evidence of a method lie."""
    return ROOT / "records" / cls.family() / f"{cls.card.name}.jsonl"


def _say(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def newest_record(cls: type[Method]) -> dict[str, Any] | None:
    """The newest row of evidence of a method; rows are appended, so it is the last."""
    path = record_path(cls)
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return json.loads(lines[-1]) if lines else None


def found(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UserError: there is none.
    """
    known = discover()
    if name not in known:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, known)}; `trimtab methods` lists all {len(known)}")
    return known[name]


def about(name: str) -> dict[str, Any]:
    """All about one method, as `trimtab show --json` prints it."""
    cls = found(name)
    card, newest = cls.card, newest_record(cls)
    fields = [{"name": f.name, "default": f.default} for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return {
        **_row(cls),
        **{
            "doc": inspect.getdoc(cls) or "",
            "fields": fields,
            "statistics": list(cls.needs()),
            "levels": list(card.levels),
            "kinds": sorted(card.kinds),
        },
        **{
            "claim": card.claim,
            "file": _say(Path(inspect.getfile(cls)).resolve()),
            "checks": newest["checks"] if newest else [],
        },
    }


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


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"claims_{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def data_folder() -> Path | None:
    """The shared data: `TRIMTAB_DATA`, or `../shared/data` beside a clone; None where there is none."""
    import os

    path = Path(os.environ.get("TRIMTAB_DATA") or ROOT.parent / "shared" / "data")
    return path if path.is_dir() else None


def run_claim(
    name: str, progress: Callable[[str, int, int], None] | None = None, append: bool = True
) -> dict[str, Any]:
    """Measure a method's claim over its seeds, and append the row to its record.

    Raises:
        UserError: no such method, or it has no claim here.
    """
    from trimtab.core.claim import record
    from trimtab.evidence import machine, versions
    from trimtab.lab import Lab

    cls = found(name)
    path = claim_files().get(name)
    if path is None:
        raise UserError(
            f"{name} has no claim here; claims lie in the folder claims/ of a clone, for "
            f"{', '.join(claimed()) or 'no method'}"
        )
    module = _module(path)
    claim = module.CLAIM
    data = data_folder()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts: dict[str, Any] = {
        "catalogue": list(cls.card.catalogue),
        "paper": cls.card.paper,
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
        for i, seed in enumerate(claim.seeds):
            values.append(module.measure(lab, seed))
            if progress:
                progress(f"claim {name}", i + 1, len(claim.seeds))
        from trimtab.engine.measure import peak_bytes

        facts |= {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak_bytes(), "hashes": lab.hashes}
        row = record(claim, values, facts)
    if append:
        target = record_path(cls)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return row


def _said(claim: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(claim).items() if k not in ("checks", "seeds", "needs")}
