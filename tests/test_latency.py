"""A limit on latency: prices by the profile, levels that are slower here, what is refused, and what is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from battery import device
from conftest import SMALL, Run, Said, fitted, tree

from trimtab import pace
from trimtab.core.device import Device, Kernel
from trimtab.core.errors import BudgetError
from trimtab.core.table import Row
from trimtab.evidence import Evidence
from trimtab.job import Job
from trimtab.kernels import profile
from trimtab.pace import LEAVE, Measured, Predicted

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]
SLOW = "8b/row"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A machine that knows the levels of the small menu, one of which is slow on it."""
    plain = device(threads=1)
    levels = ("bf16", "2b/g32", "3b/g128", "3b/g32", "4b/g128", "4b/g32", "5b/g64", "6b/g128", "6b/g64")
    rows = [Kernel("linear", t, m, "vnni", 1e-6, 1e-10, 0.5, 0.8) for t in levels for m in (1, 64)]
    rows += [Kernel("linear", SLOW, m, "vnni", 1e-3, 0.0, 0.5, 0.8) for m in (1, 64)]
    found = device(threads=1, kernels=(*plain.kernels, *rows))
    monkeypatch.setattr(profile, "here", lambda threads, levels: found)
    return found


@pytest.fixture
def limited(tiny: Path, text: Path, tmp_path: Path, machine: Device) -> Run:
    """The tiny model fitted to a latency that any plan meets, and to a size."""
    return fitted(tiny, tmp_path / "run", data=str(text), size=620_000, latency="5s")


def test_a_level_that_is_slower_here_is_left_out_and_what_was_measured_is_what_runs(limited: Run) -> None:
    report = limited.report
    assert report["met"] and report["forecast"]["how"] == "predicted"
    assert report["forecast"]["slower_here"] == [f"gptq@{SLOW}"], "embeddings are looked up: rtn@8b/row stays"
    assert 0 < report["forecast"]["seconds"] < 5
    linears = [row for row in report["sites"] if row["role"] != "embed"]
    assert linears and all(row["level"] != SLOW for row in linears)
    assert report["gate"]["seconds"] > 0 and "kernels, 1 threads" in report["gate"]["engine"]


def test_a_resumed_run_sees_the_same_prices(
    limited: Run, tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(limited.folder / "artifact")
    journal = limited.folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if json.loads(line)["step"].startswith("probe/1"))
    journal.write_text("".join(lines[:last]))

    def gone(threads: int, levels: Any) -> Device:
        raise AssertionError("the run has its prices")

    monkeypatch.setattr(profile, "here", gone)
    again = fitted(tiny, limited.folder, data=str(text), size=620_000, latency="5s", resume=True)
    assert tree(again.artifact) == before


def test_what_no_plan_reaches_is_refused_with_the_least(
    tiny: Path, text: Path, tmp_path: Path, machine: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"data": str(text), "latency": "1us", "target": "gguf"}  # which knows no dropped sublayers
    with pytest.raises(BudgetError, match=r"latency 0.001 ms .* is the least predicted here .*no sublayer"):
        fitted(tiny, tmp_path / "predicted", **options)
    monkeypatch.setattr(pace, "compiles", lambda job: False)
    with pytest.raises(BudgetError, match="is the least measured here"):
        fitted(tiny, tmp_path / "measured", **options)


def test_a_result_that_is_late_is_planned_again_with_less_time_but_not_with_next_to_none(
    tiny: Path, text: Path, tmp_path: Path, machine: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose other work makes everything a hundred times slower: no sublayer is dropped for that."""
    gate = Evidence.gate
    monkeypatch.setattr(Evidence, "gate", lambda self, *of: {**gate(self, *of), "seconds": 500.0})
    asked = []
    best_for = Job.best_for
    monkeypatch.setattr(Job, "best_for", lambda self, *of: asked.append(of[4:]) or best_for(self, *of))
    found = fitted(tiny, tmp_path / "run", data=str(text), size=620_000, latency="5s").report
    assert asked[-3:] == [(0.5,)] * 3
    assert not found["met"] and "latency 5e+03 ms was asked for, and 5e+05 ms was measured" in found["verdict"]
    assert "drop" not in found["plan"]


# ---- without a run


FOUND: Any = SimpleNamespace(sites=[SimpleNamespace(path=f"b.{i}.mlp.up") for i in (0, 1)])
OFFERS = (("fp32", 32, 2.0, 0), ("x@4b", 4, 1.0, 1))
ROWS = [Row(site.path, *offer, 8) for site in FOUND.sites for offer in OFFERS]


def test_only_as_much_is_dropped_as_the_limit_needs() -> None:
    drops = {"b.0.mlp": 0.5, "b.1.mlp": 0.1}

    def seconds(dropped: Any) -> float:
        return 1.0 + 2.0 * (2 - len(dropped))

    def least(wanted: float) -> tuple[str, ...]:
        return Measured(wanted / LEAVE, FOUND, "fp32", seconds).fewest(ROWS, drops)

    assert least(3.0) == () and least(2.9) == ("b.1.mlp",) and least(1.9) == ("b.1.mlp", "b.0.mlp")
    with pytest.raises(BudgetError, match="with every sublayer dropped"):
        least(0.9)
    assert Measured(4.0, FOUND, "fp32", seconds).beside(ROWS, ("b.1.mlp",)) == 1.0


def test_predictions_add_up_to_the_forecast_of_the_original(machine: Device) -> None:
    from test_hw import mapped

    from trimtab.engine.pricing import forecast
    from trimtab.engine.probe import Unit, original_row

    found, _ = mapped()
    units = [Unit(s.path, (s,), ()) for s in found.sites if s.kind == "linear"]
    pace = Predicted(1.0, found, "bf16", machine, 64)
    rows = pace.priced(units, [original_row(u, "bf16") for u in units])
    whole = forecast(found, {}, machine, dtype="bf16", prompt=64).prefill.mid
    assert pace.original() == whole > pace.beside(rows) > 0
    assert pace.left(rows) == pytest.approx(LEAVE - pace.beside(rows))


def test_a_plan_says_what_each_choice_costs_here(
    cli: Callable[..., Said], tiny: Path, text: Path, machine: Device
) -> None:
    line = ("plan", tiny, "--data", text, *SMALL, "--latency", "5s")
    said = cli(*line, "--json").json()
    speed = said["speed"]
    assert speed["how"] == "predicted" and 0 < speed["fastest"] < speed["original"]
    unit = next(u for u in said["units"] if u["role"] == "down")
    offers = speed["units"][unit["name"]]
    assert offers[f"gptq@{SLOW}"] > offers["bf16"] > offers["gptq@4b/g32"] > 0
    assert f"gptq@{SLOW}" not in unit["choices"] and "gptq@4b/g32" in unit["choices"]
    read = cli(*line)
    assert "microseconds here" in read.out.replace("\n", " ") and "ms (predicted)" in " ".join(read.out.split())
