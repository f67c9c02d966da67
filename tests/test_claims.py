"""Claims: measured, recorded, stale once their code is another, and compared with what is recorded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Said

from trimtab import catalogue, docs
from trimtab.core.claim import code_hash

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]
Cli = Callable[..., Said]

CLAIM = """
from trimtab.core.claim import Check, Claim

CLAIM = Claim(
    method="rtn",
    statement="One is less than two.",
    source="nowhere",
    setting="arithmetic",
    metric="numbers",
    checks=(Check("one below two", "one", "<", "two"), Check("two below one", "two", "<", "one")),
    seeds=(0, 1, 2),
)


def measure(lab, seed):
    return {"one": 1.0 + 0.01 * seed, "two": 2.0 + 0.03 * seed}
"""
METHOD = '''
"""A method."""

from trimtab.parts.rounding import nearest


def solve(weight):
    """The weight."""
    return nearest(weight)  # to even
'''


@pytest.fixture
def claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with one claim, of a method whose sources lie in it."""
    entry = catalogue.entries()["rtn"] | {"file": str(tmp_path / "trimtab" / "quant" / "rtn.py")}
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path / "trimtab")
    monkeypatch.setattr(catalogue, "entries", lambda: {"rtn": entry})
    for file, text in {
        "claims/quant/rtn.py": CLAIM,
        "trimtab/quant/rtn.py": METHOD,
        "trimtab/parts/rounding.py": "import trimtab.core.level\nfrom trimtab.parts import halves\n\nnearest = round\n",
        "trimtab/parts/halves.py": "half = 0.5\n",
        "trimtab/parts/other.py": "half = 0.5\n",
        "trimtab/core/level.py": "level = 4\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def recorded(clone: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (clone / "records" / "quant" / "rtn.jsonl").read_text().splitlines()]


def test_claim_is_measured_and_recorded(claims: Path, cli: Cli) -> None:
    said = cli("claim", "rtn", "--json")
    assert said.code == 0, said
    row = said.json()
    assert row["verdict"] == "partly" and row["seeds"] == [0, 1, 2] and len(row["values"]) == 3
    assert [c["held"] for c in row["checks"]] == [True, False]
    assert row["checks"][0]["difference"] == pytest.approx(-1.02) and row["checks"][0]["half_width"] > 0
    assert row["machine"]["cores"] == os.cpu_count() and row["versions"]["torch"]
    assert recorded(claims) == [row]
    said = cli("claim", "--all", "-q")
    assert said.code == 0 and "rtn: partly" in said.out and "holds: one below two" in said.out and said.err == ""
    assert len(recorded(claims)) == 2
    listed = next(r for r in cli("methods", "--json").json() if r["name"] == "rtn")
    assert listed["verdict"] == "partly" and listed["record"] == "records/quant/rtn.jsonl"
    assert [c["held"] for c in cli("show", "rtn", "--json").json()["checks"]] == [True, False]


def test_claim_without_its_data_is_not_run(claims: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    change(claims / "claims/quant/rtn.py", "seeds=(0, 1, 2)", 'needs=("data",)')
    monkeypatch.setenv("TRIMTAB_DATA", str(claims / "nowhere"))
    row = cli("claim", "rtn", "--json").json()
    assert row["verdict"] == "not run here" and "data" in row["reason"] and row["values"] == []
    assert len(row["code"]) == 16 and not cli("show", "rtn", "--json").json()["stale"]


@pytest.mark.parametrize(
    "line", [("claim",), ("claim", "rtn", "--all"), ("claim", "--all", "--stale"), ("claim", "rtn", "--stale")], ids=str
)
def test_one_choice_of_claims_is_needed(line: tuple[str, ...], claims: Path, cli: Cli) -> None:
    said = cli(*line)
    assert said.code == 2 and said.out == "" and said.err.startswith("trimtab: which claims?")
    assert all(word in said.err for word in line[1:]) and not (claims / "records").exists()


# ---- stale


@pytest.mark.parametrize(
    ("file", "old", "new", "other"),
    [
        ("trimtab/quant/rtn.py", "return nearest(weight)", "return nearest(weight + 1)", True),
        ("trimtab/quant/rtn.py", "from trimtab.parts.rounding", "from ..parts.rounding", True),
        ("claims/quant/rtn.py", "0.03", "0.04", True),
        ("trimtab/parts/rounding.py", "nearest = round", "nearest = int", True),
        ("trimtab/parts/halves.py", "0.5", "0.25", True),
        ("trimtab/parts/other.py", "0.5", "0.25", False),
        ("trimtab/core/level.py", "4", "5", False),
        ("trimtab/quant/rtn.py", "# to even", "# to the even one", False),
        ("trimtab/quant/rtn.py", '"""The weight."""', '"""The weight,\n    rounded.\n    """', False),
        ("trimtab/quant/rtn.py", "nearest(weight)", "nearest(\n        weight,\n    )", False),
    ],
)
def test_verdict_is_stale_once_its_code_is_another(
    file: str, old: str, new: str, other: bool, claims: Path, cli: Cli
) -> None:
    cli("claim", "rtn", "-q")
    assert not cli("show", "rtn", "--json").json()["stale"]
    change(claims / file, old, new)
    assert cli("show", "rtn", "--json").json()["stale"] is other
    assert cli("methods", "--json").json()[0]["stale"] is other
    said = cli("methods").out + cli("show", "rtn").out
    assert said.count("stale") == 2 * other
    assert catalogue.stale() == ["rtn"] * other


def test_a_part_is_followed_however_it_is_imported(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "quant").mkdir()
    packages = {"trimtab.parts": tmp_path / "parts", "trimtab.quant": tmp_path / "quant"}
    (claim := tmp_path / "claim.py").write_text("")
    for text in (
        "from trimtab.parts.grids import affine",
        "from trimtab.parts import grids",
        "import trimtab.parts.grids as g",
        "from ..parts import grids",
        "from ..parts.grids import affine",
        "def f():\n    from trimtab.parts import grids",
        "from .gptq import GPTQ",
    ):
        (tmp_path / "quant" / "mine.py").write_text(text)
        (tmp_path / "quant" / "gptq.py").write_text("import trimtab.quant.mine, trimtab.parts.grids")
        hashes = set()
        for body in ("a = 1", "a = 2"):
            (tmp_path / "parts" / "grids.py").write_text(body)
            hashes.add(code_hash("trimtab.quant.mine", claim, packages))
        assert len(hashes) == 2, text


def test_every_claim_of_ours_has_a_hash_of_its_own() -> None:
    files, entries = catalogue.claim_files(), catalogue.entries()
    hashes = {catalogue.code_of(entries[name], files) for name in files}
    assert len(hashes) == len(files) > 10 and None not in hashes


def test_a_row_without_code_is_stale_and_measured_again(claims: Path, cli: Cli) -> None:
    record = claims / "records" / "quant" / "rtn.jsonl"
    record.parent.mkdir(parents=True)
    record.write_text('{"method": "rtn", "verdict": "held", "checks": []}\n')
    assert cli("show", "rtn", "--json").json()["stale"]
    said = cli("claim", "--stale")
    assert said.code == 0 and "rtn: partly" in said.out and "claim rtn: 3 of 3" in said.err
    assert [row["verdict"] for row in recorded(claims)] == ["held", "partly"]
    said = cli("claim", "--stale")
    assert said.code == 0 and "no claim is stale" in said.out and said.err == "" and len(recorded(claims)) == 2
    assert cli("claim", "--stale", "--json").json() == []


def test_a_row_is_of_the_code_that_was_there_when_the_claims_began(claims: Path, cli: Cli) -> None:
    """A source that is edited while claims run is not what they measure."""
    edit = f"Path({str(claims / 'trimtab/parts/halves.py')!r}).write_text('half = 0.25')"
    change(claims / "claims/quant/rtn.py", "def measure", f"from pathlib import Path\n\n{edit}\n\n\ndef measure")
    assert cli("claim", "rtn", "-q").code == 0
    assert cli("show", "rtn", "--json").json()["stale"]


def test_a_claim_without_a_record_is_measured_with_the_stale(claims: Path, cli: Cli) -> None:
    assert not cli("show", "rtn", "--json").json()["stale"]
    (row,) = cli("claim", "--stale", "--json").json()
    assert recorded(claims) == [row]


def test_stale_claims_come_quickest_first(claims: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (claims / "records" / "quant").mkdir(parents=True)
    entry = catalogue.entries()["rtn"]
    names = ("slow", "quick", "new")
    monkeypatch.setattr(catalogue, "entries", lambda: {n: entry | {"name": n} for n in names})
    for name, seconds in zip(names, (700.0, 3.0, None), strict=True):
        (claims / "claims" / "quant" / f"{name}.py").write_text(CLAIM.replace("rtn", name))
        if seconds:
            row = {"verdict": "held", "seconds": seconds}
            (claims / "records" / "quant" / f"{name}.jsonl").write_text(json.dumps(row))
    assert catalogue.stale() == ["quick", "slow", "new"]


def test_no_claim_starts_after_the_minutes(claims: Path, cli: Cli) -> None:
    said = cli("claim", "--stale", "--minutes", "0")
    assert said.code == 0 and said.out == "" and "left out" in said.err and "rtn" in said.err
    assert not (claims / "records").exists()
    assert cli("claim", "--stale", "--minutes", "-1").code == 2


def test_pages_mark_a_stale_verdict(claims: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = docs.discover()["rtn"]
    monkeypatch.setattr(docs, "discover", lambda: {"rtn": cls})
    cli("claim", "rtn", "-q")
    docs.main([str(tmp_path / "methods")])
    pages = [tmp_path / "methods" / name for name in ("index.md", "quant/rtn.md")]
    assert not any("tale" in page.read_text("utf-8") for page in pages)
    change(claims / "trimtab/parts/halves.py", "0.5", "0.25")
    docs.main([str(tmp_path / "methods")])
    index, page = (page.read_text("utf-8") for page in pages)
    assert "| partly (stale) |" in index and "present code: 1." in index
    assert "Verdict: **partly**" in page and "Stale: not of the present code" in page


# ---- compared with the record


@pytest.mark.parametrize(
    ("before", "code"), [("held", 3), ("partly", 0), ("failed", 0), ("not run here", 0), (None, 0)], ids=str
)
def test_check_fails_where_a_verdict_is_worse_than_recorded(
    before: str | None, code: int, claims: Path, cli: Cli
) -> None:
    record = claims / "records" / "quant" / "rtn.jsonl"
    if before:
        record.parent.mkdir(parents=True)
        record.write_text('{"verdict": "failed"}\n' + json.dumps({"verdict": before, "code": "of another day"}) + "\n")
    kept = record.read_bytes() if before else None
    said = cli("claim", "--stale", "--check", "--json")
    (row,) = said.json()
    assert said.code == code and row["verdict"] == "partly"
    assert row["recorded"] == before and row["worse"] is (code == 3)
    said = cli("claim", "rtn", "--check", "-q")
    assert said.code == code and ("worse than recorded: held" in said.out) is (code == 3)
    assert (record.read_bytes() if record.exists() else None) == kept


def test_check_leaves_alone_what_is_of_the_present_code(claims: Path, cli: Cli) -> None:
    cli("claim", "rtn", "-q")
    said = cli("claim", "--stale", "--check")
    assert said.code == 0 and "no claim is stale" in said.out and len(recorded(claims)) == 1


@pytest.mark.parametrize(
    ("tests", "sanitized", "fuzzed", "claimed", "code"),
    [(0, 0, 0, 0, 0), (0, 0, 0, 2, 1), (0, 0, 1, 0, 1), (0, 2, 0, 0, 1), (2, 0, 0, 0, 2)],
)
def test_continuous_integration(
    tests: int, sanitized: int, fuzzed: int, claimed: int, code: int, tmp_path: Path
) -> None:
    """`.ci/run` runs the tests, the sanitizers, hostile input, then the claims; the tests' closing line is the last."""
    last = "31 passed, 2 skipped in 3.21s"
    (tmp_path / ".ci").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(Path(__file__).parent.parent / ".ci" / "run", tmp_path / ".ci" / "run")
    make = tmp_path / "bin" / "make"
    make.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n'
        f'if [ "$1" = test ]; then echo "{last}"; exit {tests}; fi\n'
        f'if [ "$1" = sanitize ]; then exit {sanitized}; fi\n'
        f'if [ "$1" = fuzz ]; then exit {fuzzed}; fi\n'
        f'echo "rtn: partly"; exit {claimed}\n'
    )
    make.chmod(0o755)
    done = subprocess.run(
        [str(tmp_path / ".ci" / "run")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PATH": f"{make.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == code, done
    assert done.stdout.splitlines()[-1] == last
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == (["test"] if tests else ["test", "sanitize", "fuzz", "claims-check"])


# ---- what is kept of the methods


def test_what_the_methods_say_is_kept_until_a_source_changes(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    code = (
        f"import json, pathlib, sys\nfrom trimtab import catalogue as c\nc.KEPT = pathlib.Path({str(kept)!r})\n"
        "print(json.dumps(['torch' in sys.modules, repr(c.entries()), 'torch' in sys.modules]))"
    )

    def ask() -> list[Any]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    said = repr(catalogue.entries())
    assert ask() == [False, said, True] and kept.exists()
    assert ask() == [False, said, False]
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"state": "of other sources"}))
    assert ask() == [False, said, True]
    kept.write_text('{"state":')
    assert ask() == [False, said, True]
