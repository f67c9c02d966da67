"""The command line: its JSON, its exit codes, and that it keeps out of the way of what it is piped into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SIZE, SMALL, Run, Said, command

from trimtab import catalogue
from trimtab.core.method import FAMILIES, VERBS, discover

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]
Cli = Callable[..., Said]


def test_importing_trimtab_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, trimtab, trimtab.cli; print([m for m in ('torch', 'transformers', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# ---- methods, show


def test_methods_as_json(cli: Cli) -> None:
    said = cli("methods", "--json")
    assert said.code == 0 and said.err == ""
    rows = said.json()
    assert [r["name"] for r in rows] == list(discover())
    keys = {"name", "family", "catalogue", "paper", "verb", "requires", "leaves", "keeps", "verdict", "record", "stale"}
    for row in rows:
        assert set(row) >= keys, row["name"]
        assert row["family"] in FAMILIES and row["verb"] in VERBS
        assert all(isinstance(row[k], list) for k in ("catalogue", "requires", "leaves", "keeps"))
        assert row["verdict"] in ("held", "partly", "failed", "not run here", "none")
        assert (row["record"] is None) == (row["verdict"] == "none")
        assert isinstance(row["stale"], bool) and not (row["stale"] and row["record"] is None)
    gptq = next(r for r in rows if r["name"] == "gptq")
    assert gptq["family"] == "quant" and gptq["paper"] == "arXiv:2210.17323" and gptq["verb"] == "solve"
    assert "float" in gptq["requires"] and "int" in gptq["leaves"]
    one = cli("methods", "--family", "alloc", "--json").json()
    assert one == [r for r in rows if r["family"] == "alloc"] and len(one) >= 3


def test_methods_and_show_for_readers(cli: Cli) -> None:
    said = cli("methods")
    assert said.code == 0 and all(name in said.out for name in discover())
    said = cli("show", "gptq")
    assert said.code == 0 and "damp = 0.01" in said.out and "Reference:" in said.out and "quant/gptq.py" in said.out


def test_show_as_json(cli: Cli) -> None:
    found = cli("show", "gptq", "--json").json()
    assert found["name"] == "gptq" and "gram" in found["statistics"] and "4b/g64" in found["levels"]
    assert {"name": "damp", "default": 0.01} in found["fields"]
    assert found["file"] == "trimtab/quant/gptq.py"
    assert isinstance(found["checks"], list) and found["claim"]


# ---- plan, fit, report


def test_plan_as_json_says_what_a_fit_would_try(
    tiny: Path, text: Path, run: Run, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.kernels.profile.kept", lambda threads: None)
    said = cli("plan", tiny, "--data", text, "--size", f"{SIZE}B", *SMALL, "--json")
    assert said.code == 0 and said.err == ""
    found = said.json()
    assert found["task"] == "causal-lm" and found["original_bytes"] == run.report["original"]["bytes"]
    assert found["smallest_bytes"] < SIZE < found["original_bytes"]
    assert found["probes"] == sum(len(u["choices"]) for u in found["units"]) > 20
    assert found["seconds"] > 0 and "feasible" in found["feasible"] and found["speed"] is None
    assert {"embed", "lm_head", "down"} <= {u["role"] for u in found["units"]}
    assert list(tmp_path.iterdir()) == []
    said = cli("plan", tiny, "--data", text, *SMALL)
    assert said.code == 0 and "lm_head" in said.out and "probes" in said.out


def test_report_as_json_is_the_file(run: Run, cli: Cli) -> None:
    said = cli("report", run.folder, "--json")
    assert said.code == 0 and said.err == ""
    assert said.json() == json.loads((run.folder / "report.json").read_text())
    said = cli("report", run.folder)
    for part in ("original", "best", "perplexity", "verdict:", "artifact:", "lm_head", "report.html"):
        assert part in said.out


def test_fit_as_a_process(tiny: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    """A report to read, and progress on standard error; with --json one JSON value, and with --quiet the report
    alone.
    """
    line = ("fit", tiny, "--data", text, *SMALL, "--plan", "rtn @ 4b/g32", "--out", tmp_path / "run")
    said = command(*line)
    assert said.code == 0
    assert "verdict:" in said.out and "applying plan: 4 of 4" in said.err
    again = cli(*line, "--resume", "--json")
    assert again.code == 0 and again.err == "" and again.json()["plan"].startswith("rtn @ ")
    assert again.json() == json.loads((tmp_path / "run/report.json").read_text())
    quiet = cli(*line, "--resume", "--quiet")
    assert quiet.code == 0 and quiet.err == "" and "verdict:" in quiet.out


def test_exit_code_3_where_the_budget_is_not_reached(tiny: Path, text: Path, cli: Cli, tmp_path: Path) -> None:
    line = ("fit", tiny, "--data", text, *SMALL, "-q", "--out", tmp_path / "run", "--latency", "1us")
    said = cli(*line, "--plan", "rtn @ 4b/g32")
    assert said.code == 3, said
    assert "latency" in said.out + said.err


def test_exit_codes_2_and_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("fit", "no-such-model", "--size", "1MB").code == 2
    assert cli("--no-such-option").code == 2 and cli("no-such-command").code == 2
    assert cli("--help").code == 0 and cli("fit", "-h").code == 0

    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("it broke")

    monkeypatch.setattr(catalogue, "rows", broken)
    said = cli("methods")
    assert said.code == 1 and said.out == "" and "RuntimeError: it broke" in said.err and "report it" in said.err
    monkeypatch.setenv("TRIMTAB_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="it broke"):
        cli("methods")


def test_exit_code_130_where_interrupted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(catalogue, "rows", interrupted)
    said = cli("methods")
    assert (
        said.code == 130 and said.out == "" and said.err.startswith("trimtab: interrupted") and "--resume" in said.err
    )


# ---- run


def test_run_writes_text(run: Run, cli: Cli) -> None:
    said = cli("run", run.folder, "--prompt", "import ", "--tokens", "12")
    assert said.code == 0 and said.err.count("\n") == 1 and "/s" in said.err  # how fast it was
    assert said.out.startswith("import ") and len(said.out.strip()) > len("import ") + 5
    found = cli("run", run.artifact, "--prompt", "import ", "--tokens", "12", "--json").json()
    assert found["prompt"] == "import " and f"import {found['text']}\n" == said.out
    assert cli("run", run.artifact, "--prompt", "import ", "--tokens", "12", "--packed").out == said.out


def test_run_draws_by_its_seed(run: Run, cli: Cli) -> None:
    def drawn(seed: int) -> str:
        line = ("--prompt", "def ", "--tokens", "16", "--temperature", "1.5", "--seed", seed, "--json")
        return cli("run", run.artifact, *line).json()["text"]

    assert drawn(1) == drawn(1) != drawn(2)


def test_run_takes_an_original_too(tiny: Path, cli: Cli) -> None:
    said = cli("run", tiny, "--prompt", "import ", "--tokens", "3")
    assert said.code == 0 and said.out.startswith("import ")


# ---- pipes


@pytest.mark.parametrize("line", [("methods", "--json"), ("show", "gptq"), ("methods",)], ids=" ".join)
def test_reader_that_stops_reading_is_harmless(line: tuple[str, ...]) -> None:
    code = "from trimtab.cli import main; main()"
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *line], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
        )
    finally:
        os.close(write)
    assert done.returncode == 0 and done.stderr == ""
