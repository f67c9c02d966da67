"""Merges that are killed while they write, by adapters, united vocabularies and kept tasks, go on to the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_merge import save, weights
from test_merge_adapters import adapter
from test_merge_vocabulary import ONE, TWO, model

from trimtab.merging import merge, restore

SLOW = """
import json, sys, time
from trimtab.core.journal import Journal
append = Journal.append
def slow(self, step, value):
    append(self, step, value)
    if len(self.done) == 4:
        print("now", flush=True)
        time.sleep(600)
Journal.append = slow
from trimtab.engine import merge_stream
merge_stream.COMMIT = 8000
import trimtab
trimtab.merge(**json.loads(sys.argv[1]))
"""


def adapters(folder: Path) -> dict[str, Any]:
    base = save(folder / "base", weights(0))
    for seed, name in enumerate(("one", "two")):
        adapter(folder / name, base, seed)
    return {"models": [str(folder / n) for n in ("one", "two")], "apply_adapters": True}


def pairs(folder: Path) -> dict[str, Any]:
    base, other = (save(folder / name, weights(seed)) for name, seed in (("base", 0), ("other", 3)))
    adapter(folder / "one", base, 0)
    return {"models": [f"{base}+{folder / 'one'}", str(other)], "base": str(base), "method": "ties"}


def vocabularies(folder: Path) -> dict[str, Any]:
    model(folder / "one", ONE, 1, 7)
    model(folder / "two", TWO, 2, 5, added=("<|tool|>",))
    return {"models": [str(folder / n) for n in ("one", "two")], "vocabulary": "union"}


def tasks(folder: Path) -> dict[str, Any]:
    names = [str(save(folder / n, weights(i))) for i, n in enumerate(("base", "one", "two"))]
    return {"models": names[1:], "base": names[0], "method": "tall-masks", "keep_tasks": True}


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.parametrize("make", [adapters, pairs, vocabularies, tasks])
def test_a_killed_merge_goes_on_to_the_same_bytes(make: Any, tmp_path: Path) -> None:
    options = {**make(tmp_path), "shard_bytes": 20_000}
    whole, out = tmp_path / "whole", tmp_path / "out"
    merge(**options, out=whole)
    line = [sys.executable, "-c", SLOW, json.dumps({**options, "out": str(out)})]
    process = subprocess.Popen(line, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists() and (tmp_path / ".out.merging").is_dir()
    seen: list[int] = []
    merge(**options, out=out, resume=True, progress=lambda _, done, total: seen.append(done))
    assert contents(out) == contents(whole) and not list(tmp_path.glob(".*")), "something was left"
    if make is tasks:
        restore(out, "two", out=tmp_path / "again")


def test_a_merge_killed_while_it_keeps_tasks_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.engine import merge_tasks

    options = tasks(tmp_path)
    merge(**options, out=tmp_path / "whole")

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_tasks, "write_bytes", cut)
    with pytest.raises(KeyboardInterrupt):
        merge(**options, out=tmp_path / "out")
    monkeypatch.undo()
    merge(**options, out=tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
