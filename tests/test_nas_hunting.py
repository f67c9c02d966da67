"""The driver of a search: one journal, many processes, kills at any point, stopping early, equals evaluated once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Knob
from trimtab.core.method import Trial, method
from trimtab.engine.hunting import Chase, Rung, hunt

DOMAIN = Domain(tuple(Knob(f"k{i}", (0, 1, 2, 3)) for i in range(5)))
CHASE = Chase(DOMAIN, method("evolution"), ("error", "ms"), evaluations=60, batch=4)  # type: ignore[arg-type]

WORKER = """
import sys, time
from pathlib import Path
from test_nas_hunting import CHASE, values
from trimtab.engine.hunting import hunt
def evaluate(genome):
    time.sleep(0.02)
    with open(sys.argv[2], "a") as file:
        file.write(str(genome) + "\\n")
    return values(genome)
hunt(CHASE, evaluate, Path(sys.argv[1]))
"""


def values(genome: tuple[int, ...]) -> dict[str, float]:
    """Two values that pull apart."""
    return {"error": float(sum((3 - g) ** 2 for g in genome)), "ms": float(sum(genome)) + genome[0] * genome[1]}


def rising(genome: tuple[int, ...]) -> Iterator[tuple[float, dict[str, float]]]:
    """An evaluation in four steps, the order of whose errors is right from the first on."""
    for share in (0.25, 0.5, 0.75, 1.0):
        yield share, {**values(genome), "error": values(genome)["error"] * (2 - share)}


def genomes(trials: list[Trial]) -> list[tuple[int, ...]]:
    return [trial.genome for trial in trials]


def worker(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(log)], env=env)


def test_a_search_is_its_journal(tmp_path: Path) -> None:
    whole = hunt(CHASE, values, tmp_path / "whole")
    assert len(whole) == 60 == len(set(genomes(whole)))
    part = hunt(replace(CHASE, evaluations=20), values, tmp_path / "part")
    seen: list[Trial] = []
    assert hunt(CHASE, values, tmp_path / "part", seen.append) == whole, "it goes on where it was"
    assert part == whole[:20] and seen == whole[20:]
    assert hunt(CHASE, values, tmp_path / "part", seen.append) == whole and len(seen) == 40
    assert list((tmp_path / "part").iterdir()) == [tmp_path / "part" / "trials.jsonl"]


@pytest.mark.parametrize("cut", [0, 1, 5, 30])
def test_a_search_that_died_goes_on_with_the_same_proposals(tmp_path: Path, cut: int) -> None:
    whole = hunt(CHASE, values, tmp_path / "whole")
    count = 0

    def dies(genome: tuple[int, ...]) -> dict[str, float]:
        nonlocal count
        if count == cut:
            raise KeyboardInterrupt
        count += 1
        return values(genome)

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        hunt(CHASE, dies, folder)
    with open(folder / "trials.jsonl", "ab") as file:
        file.write(b'{"genome": [0, 1')  # and the last line is torn
    assert hunt(CHASE, values, folder) == whole


def test_processes_share_a_journal_and_survive_a_kill(tmp_path: Path) -> None:
    folder, logs = tmp_path / "shared", [tmp_path / f"log {i}" for i in range(3)]
    workers = [worker(folder, log) for log in logs]
    deadline = time.monotonic() + 60
    while not (logs[0].exists() and len(logs[0].read_text().splitlines()) >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers[0].send_signal(signal.SIGKILL)
    assert [process.wait(timeout=100) for process in workers] == [-signal.SIGKILL, 0, 0]
    trials = hunt(CHASE, values, folder)
    assert len(trials) == 60 == len(set(genomes(trials)))
    evaluated = [line for log in logs for line in log.read_text().splitlines()]
    assert set(evaluated) == {str(genome) for genome in genomes(trials)}
    assert len(evaluated) <= 60 + 1, "at most what was being evaluated is evaluated again"
    assert list(folder.iterdir()) == [folder / "trials.jsonl"]


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    hunt(replace(CHASE, evaluations=4), values, tmp_path)
    with pytest.raises(UserError, match=r"differs in seed, batch; go on with the same, or name another folder"):
        hunt(replace(CHASE, seed=1, batch=1), values, tmp_path)


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text("[1, 2]\n")
    with pytest.raises(UserError, match="damaged"):
        hunt(CHASE, values, tmp_path)


def test_an_evaluation_that_lacks_an_objective_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gave error; the search also needs ms"):
        hunt(CHASE, lambda genome: {"error": 1.0}, tmp_path)


def test_a_domain_that_is_used_up_ends_the_search(tmp_path: Path) -> None:
    tiny = replace(CHASE, domain=Domain((Knob("a", (1, 2)), Knob("b", (1, 2, 3)))))
    trials = hunt(tiny, lambda genome: {"error": 1.0 + genome[0], "ms": 1.0}, tmp_path)
    assert len(trials) == 6


def test_what_computes_the_same_is_evaluated_once(tmp_path: Path) -> None:
    made: list[tuple[int, ...]] = []

    def evaluate(genome: tuple[int, ...]) -> dict[str, float]:
        made.append(genome)
        return values(tuple(sorted(genome)))

    chase = replace(CHASE, identity=lambda genome: str(sorted(genome)), searcher=method("random-search"))
    trials = hunt(chase, evaluate, tmp_path)
    assert len(made) == len({str(sorted(genome)) for genome in made}) == sum(t.effort == 1 for t in trials)
    by = {str(sorted(t.genome)): t.values for t in trials if t.effort == 1}
    assert all(t.values == by[str(sorted(t.genome))] for t in trials)


def test_a_rung_sees_those_that_came_by_before(tmp_path: Path) -> None:
    from trimtab.core.method import Policy

    seen: list[Rung] = []

    class Watch(Policy):
        card = method("evolution").card

        def config(self) -> dict[str, object]:
            return {}

        def decide(self, view: Rung) -> bool:
            seen.append(view)
            return view.rung < 1 or view.values["ms"] > 5

    trials = hunt(replace(CHASE, stopper=Watch(), evaluations=12), rising, tmp_path)
    assert {trial.effort for trial in trials} == {0.5, 1.0}
    assert all((trial.effort == 1) == (trial.values["ms"] > 5) for trial in trials)
    firsts = [view for view in seen if view.rung == 0]
    assert [len(view.others) for view in firsts] == list(range(12))
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert sum("rung" in line for line in lines) == len(seen)
