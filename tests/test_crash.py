"""A run that is killed at any write of its journal, or interrupted, goes on with --resume and gives the same bytes.

Many deaths would cost as many imports, so one process imports everything and warms up once; each life of a run is a
fork of it, until the last lives, which are the command itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import SIZE, SMALL, Run, command, tree

from trimtab.core.journal import Journal

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]

# The parent imports, goes through a finished run once, and then forks for each line on its standard input. The child
# dies at the step that the line names, or finishes; the parent answers with its wait status. It has one thread, for a
# fork takes no other along.
NURSERY = """
import json, os, signal, subprocess, sys
import torch, transformers, transformers.models.llama.modeling_llama, transformers.tokenization_utils_fast
import trimtab.job, trimtab.evidence, trimtab.tasks.build, trimtab.report.page
import trimtab.models.compiled, trimtab.models.fresh
from trimtab.core.journal import Journal
from trimtab.cli import main

torch.set_num_threads(1)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
append = Journal.append


def deadly(mode, wanted):
    def die(self, step, value):
        if step != wanted:
            return append(self, step, value)
        if mode == "torn":
            line = json.dumps({"step": step, "value": value}).encode()
            with open(self.path, "ab") as file:
                file.write(line[: len(line) // 2])
        if mode == "after":
            append(self, step, value)
        os.kill(os.getpid(), signal.SIGKILL)
    return die


def forked(command, **options):
    # the checks in a fresh process, from here: a fork has the modules, and none of the run's own state but these
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        sys.argv = command[2:]
        code = 1
        try:
            sys.modules[command[2]].main()
            sys.stdout.flush()
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as file:
        out = file.read()
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), out, "")


try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
for line in sys.stdin:
    mode, step, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        Journal.append = deadly(mode, step)
        trimtab.evidence.subprocess.run = forked
        try:
            main(arguments)
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(9)
    print(os.waitpid(child, 0)[1], file=answers, flush=True)
"""


@dataclass
class Nursery:
    """The process whose forks are the lives of runs."""

    process: subprocess.Popen[str]

    def live(self, mode: str, step: str, *arguments: str | Path) -> int:
        """One life; its exit code, or minus the signal that ended it."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([mode, step, list(map(str, arguments))]) + "\n")
        self.process.stdin.flush()
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))


def arguments(tiny: Path, text: Path, out: Path) -> tuple[str | Path, ...]:
    return ("fit", tiny, "--data", text, "--size", f"{SIZE}B", *SMALL, "--quiet", "--out", out)


@pytest.fixture(scope="module")
def nursery(run: Run, tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    finished = shutil.copytree(run.folder, tmp_path_factory.mktemp("nursery") / "run")
    line = [sys.executable, "-c", NURSERY, *map(str, arguments(tiny, text, Path(finished))), "--resume"]
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **single}}
    with subprocess.Popen(line, **pipes) as process:
        yield Nursery(process)
        process.stdin.close()


def steps(run: Run) -> list[str]:
    """Names of the journal's entries in order."""
    return [json.loads(line)["step"] for line in (run.folder / "journal.jsonl").read_text().splitlines()]


def same(folder: Path, run: Run) -> None:
    """The artifact byte for byte, and all of the evidence that no clock or memory meter goes into."""
    assert tree(folder / "artifact") == tree(run.artifact)
    ours, theirs = json.loads((folder / "report.json").read_text()), run.report
    for key in ("best", "original", "uniform", "front", "plan", "verdict", "sites", "data", "budget"):
        assert ours[key] == theirs[key], key
    assert [p for p in folder.rglob("*") if p.name.endswith((".part", ".tmp"))] == []
    assert (folder / "journal.jsonl").read_bytes().endswith(b"\n")


@pytest.mark.parametrize("modes", [("torn", "after"), ("after", "before")], ids="-".join)
def test_killed_at_every_write(
    modes: tuple[str, str], nursery: Nursery, run: Run, tiny: Path, text: Path, tmp_path: Path
) -> None:
    """One run that dies at each write of its journal; between the two, each step is once lost and once kept."""
    out = tmp_path / "run"
    names = steps(run)
    assert len(names) >= 20 and len(set(names)) == len(names)
    line = arguments(tiny, text, out)
    for i, name in enumerate(names):
        resume = ("--resume",) if out.exists() else ()
        assert nursery.live(modes[i % 2], name, *line, *resume) == -signal.SIGKILL, f"{name} was not written"
        assert not (out / "report.json").exists()
    assert nursery.live("", "", *line, "--resume") == 0
    same(out, run)
    assert steps(Run(out, {})) == names


@pytest.mark.parametrize("share", [0.2, 0.85])
def test_real_processes(share: float, nursery: Nursery, run: Run, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Killed in a fork, gone on with by the command itself, in a process of its own."""
    out = tmp_path / "run"
    names = steps(run)
    line = arguments(tiny, text, out)
    assert nursery.live("torn", names[int(share * len(names))], *line) == -signal.SIGKILL
    said = command(*line, "--resume")
    assert said.code == 0, said
    same(out, run)


def test_finished_run_resumed_does_nothing_again(
    run: Run, nursery: Nursery, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(run.folder, tmp_path / "run"))
    journal = (out / "journal.jsonl").read_bytes()
    assert nursery.live("", "", *arguments(tiny, text, out), "--resume") == 0
    same(out, run)
    assert (out / "journal.jsonl").read_bytes() == journal


def test_artifact_lost_after_the_run(run: Run, nursery: Nursery, tiny: Path, text: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(run.folder, tmp_path / "run"))
    shutil.rmtree(out / "artifact")
    assert nursery.live("", "", *arguments(tiny, text, out), "--resume") == 0
    same(out, run)


def test_interrupt_leaves_a_run_that_goes_on(
    run: Run, nursery: Nursery, tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    line = [sys.executable, "-c", "from trimtab.cli import main; main()", *map(str, arguments(tiny, text, out))]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background is started deaf to it
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    journal, deadline = out / "journal.jsonl", time.monotonic() + 100
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        said == ""
        and error == "trimtab: interrupted; a fit or merge goes on where it stopped with --resume and the same --out\n"
    )
    assert not (out / "report.json").exists()
    assert nursery.live("", "", *line[3:], "--resume") == 0
    same(out, run)


# ---- the journal by itself


def test_journal_keeps_whole_lines_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    journal = Journal(folder, False, {"a": 1})
    assert not folder.exists()
    assert journal.step("one", lambda: {"x": 0.1 + 0.2}) == {"x": 0.30000000000000004}
    assert journal.step("one", lambda: pytest.fail("done before")) == {"x": 0.30000000000000004}
    whole = (folder / "journal.jsonl").read_bytes()
    assert whole.count(b"\n") == 2
    for torn in (b"{", b'{"step": "two", "value": 2}', b"\0\0\0\0", b"\xff" * 5000):
        (folder / "journal.jsonl").write_bytes(whole + torn)
        again = Journal(folder, True, {"a": 1})
        assert set(again.done) == {"start", "one"}
        assert (folder / "journal.jsonl").read_bytes() == whole + torn, "opening alone changes nothing"
        assert again.step("two", lambda: [1, 2]) == [1, 2]
        assert (folder / "journal.jsonl").read_bytes() == whole + b'{"step": "two", "value": [1, 2]}\n'


def test_journal_whose_first_line_is_torn_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(b'{"step": "sta')
    journal = Journal(tmp_path, True, {"a": 1})
    journal.step("one", lambda: 1)
    assert [json.loads(x)["step"] for x in (tmp_path / "journal.jsonl").read_text().splitlines()] == ["start", "one"]
