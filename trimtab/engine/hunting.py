"""The driver of a search: ask, evaluate, write down; several processes share one journal, and none of them is needed.

A journal is a file of JSON lines: what the search is, then claims and trials. Whoever asks holds the file's lock, reads
what is new, and claims what the searcher proposes. A worker holds a lock of its own while it lives, which the system
frees when it dies, however it dies: its claims are then taken over by the next who asks. So a search that was killed at
any point goes on with the same proposals.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import IO, Any

from trimtab.core.errors import UserError
from trimtab.core.journal import writing
from trimtab.core.knob import Domain, Genome
from trimtab.core.method import Hunt, Policy, Searcher, Trial

Values = Mapping[str, float]
Evaluate = Callable[[Genome], Values | Iterator[tuple[float, Values]]]
WAIT = 0.05  # seconds between looks at a journal in which others are at work


@dataclass(frozen=True)
class Chase:
    """What a search is to find, and with what.

    Fields:
        domain, objectives, limits, seed: as of `Hunt`.
        searcher: proposes.
        evaluations: how many trials there are to be.
        batch: proposals a time; a searcher with predictors fits them once for all.
        stopper: decides after each rung of an evaluation whether it goes on; None: all do.
        first: genomes that are evaluated before the searcher is asked.
        price, nodes, identity: what a searcher may ask for by name, see `Searcher`.
    """

    domain: Domain
    searcher: Searcher
    objectives: tuple[str, ...] = ("error",)
    limits: Mapping[str, float] = field(default_factory=dict)
    evaluations: int = 100
    batch: int = 1
    seed: int = 0
    stopper: Policy | None = None
    price: Callable[[list[Genome]], Mapping[str, Any]] | None = None
    nodes: Callable[[list[Genome]], Any] | None = None
    identity: Callable[[Genome], str] | None = None
    first: tuple[Genome, ...] = ()

    def header(self) -> dict[str, Any]:
        """What a journal must agree with."""
        knobs = [
            [k.name, k.kind, [str(o) for o in k.options], [[n, sorted(p)] for n, p in k.when]]
            for k in self.domain.knobs
        ]
        searcher = {"name": self.searcher.card.name} | self.searcher.config()
        stopper = {"name": self.stopper.card.name} | self.stopper.config() if self.stopper else None
        said = {"knobs": knobs, "objectives": self.objectives, "limits": dict(self.limits), "seed": self.seed}
        return json.loads(json.dumps(said | {"searcher": searcher, "stopper": stopper, "batch": self.batch}))

    def ask(self, trials: Sequence[Trial], pending: Sequence[Genome], count: int) -> list[Genome]:
        """What the searcher proposes next, given what it asks for by name."""
        known = {trial.genome for trial in trials} | set(pending)
        if left := [genome for genome in self.first if genome not in known]:
            return left[:count]
        hunt = Hunt(self.domain, tuple(trials), self.objectives, self.limits, tuple(pending), self.seed)
        rng = Random(f"{self.seed}/{len(trials)}")
        offered = {"rng": rng, "price": self.price, "nodes": self.nodes, "identity": self.identity}
        return self.searcher.ask(hunt, count, **{name: offered[name] for name in self.searcher.needs()})


@dataclass(frozen=True)
class Rung:
    """An evaluation that reached a rung, and what others had when they did.

    Fields:
        values: of this one, here.
        others: values of those that came by here before.
        objectives, limits: of the search.
        effort: of a whole evaluation, here.
        rung: which, from 0 on.
    """

    values: Values
    others: tuple[Values, ...]
    objectives: tuple[str, ...]
    limits: Mapping[str, float]
    effort: float
    rung: int


class Journal:
    """The journal of a search in `folder`, as one worker sees it."""

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        """Open it, or begin it.

        Raises:
            UserError: it is of another search, damaged, or cannot be written.
        """
        self.path, self.name = folder / "trials.jsonl", uuid.uuid4().hex
        self.trials: list[Trial] = []
        self.rungs: dict[int, list[Values]] = {}
        self._claims: dict[Genome, str] = {}
        self._read = 0
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._alive = open(folder / f"worker-{self.name}", "w")  # noqa: SIM115 - held while it lives
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._header: dict[str, Any] | None = None
        try:
            self._begin(header)
        except BaseException:
            self.close()
            raise

    def _begin(self, header: Mapping[str, Any]) -> None:
        with self.locked() as file:
            if self._header is None:
                self._append(file, {"search": dict(header)})
            elif self._header != header:
                differing = [key for key in header if self._header.get(key) != header[key]]
                raise UserError(
                    f"{self.path.parent} holds a search that differs in {', '.join(differing)}; go on with the same, "
                    "or name another folder"
                )

    @contextmanager
    def locked(self) -> Iterator[IO[bytes]]:
        """The file, locked, with all that is new read; a line that a crash tore is cut off."""
        with writing(self.path), open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read)
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) < len(data):
                file.truncate(self._read + len(whole))
            for line in whole.splitlines():
                self._take(line)
            self._read += len(whole)
            yield file

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            if "search" in entry:
                self._header = entry["search"]
                return
            genome = tuple(entry["genome"])
            if "values" in entry and "rung" in entry:
                self.rungs.setdefault(entry["rung"], []).append(entry["values"])
            elif "values" in entry:
                self.trials.append(Trial(genome, entry["values"], entry["effort"]))
                self._claims.pop(genome, None)
            else:
                self._claims[genome] = entry["worker"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged ({error!r}); begin the search in another folder") from None

    def _append(self, file: IO[bytes], *entries: Mapping[str, Any]) -> None:
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())
        for line in lines.splitlines():
            self._take(line)
        self._read += len(lines)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Commit a line: it is on disk when this returns."""
        with self.locked() as file:
            self._append(file, entry)

    def _lives(self, worker: str) -> bool:
        if worker == self.name:
            return True
        try:
            with open(self.path.with_name(f"worker-{worker}")) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(file.name).unlink(missing_ok=True)
            return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True

    def claim(self, chase: Chase) -> list[Genome] | None:
        """What this worker is to evaluate: what a dead one left, else what the searcher proposes; empty where it must
        wait for others, None where there is nothing left to do.
        """
        with self.locked() as file:
            left = [genome for genome, worker in self._claims.items() if not self._lives(worker)]
            open_ = chase.evaluations - len(self.trials)
            if open_ <= 0:
                return None
            if not left and len(self._claims) < open_:
                left = chase.ask(self.trials, list(self._claims), min(chase.batch, open_ - len(self._claims)))
                if not left and not self._claims:
                    return None
            self._append(file, *({"genome": genome, "worker": self.name} for genome in left))
            return left

    def close(self) -> None:
        """Leave the search; the worker's lock is freed."""
        self._alive.close()
        Path(self._alive.name).unlink(missing_ok=True)


def hunt(
    chase: Chase, evaluate: Evaluate, folder: Path, watch: Callable[[Trial], None] = lambda trial: None
) -> list[Trial]:
    """Search until there are as many trials as were asked for, or the domain is exhausted; other processes may do the
    same in the same folder at the same time.

    With an identity, a genome that computes what an earlier trial computed is given that trial's values, at no effort.

    Args:
        evaluate: values of a genome; or, for a stopper, yields (share of the whole, values so far) pairs in order.
        watch: is told each trial of this process.

    Returns:
        All trials, in the order of the journal.

    Raises:
        UserError: the folder holds another search, or a value of an objective is missing.
    """
    journal = Journal(folder, chase.header())
    hashes: dict[str, Trial] = {}
    hashed = 0
    try:
        while (claimed := journal.claim(chase)) is not None:
            if not claimed:
                time.sleep(WAIT)
            for genome in claimed:
                if chase.identity:
                    for trial in journal.trials[hashed:]:
                        hashes.setdefault(chase.identity(trial.genome), trial)
                    hashed = len(journal.trials)
                same = hashes.get(chase.identity(genome)) if chase.identity else None
                trial = Trial(genome, same.values, 0.0) if same else _evaluated(chase, evaluate, genome, journal)
                journal.add({"genome": genome, "values": dict(trial.values), "effort": trial.effort})
                watch(trial)
        return journal.trials
    finally:
        journal.close()


def _evaluated(chase: Chase, evaluate: Evaluate, genome: Genome, journal: Journal) -> Trial:
    found = evaluate(genome)
    if isinstance(found, Mapping):
        return Trial(genome, _checked(chase, found))
    effort, values = 0.0, {}
    for rung, (effort, reached) in enumerate(found):
        values = _checked(chase, reached)
        if chase.stopper is None or effort >= 1:
            continue
        others = tuple(journal.rungs.get(rung, ()))
        journal.add({"genome": genome, "rung": rung, "values": values})
        if not chase.stopper.decide(Rung(values, others, chase.objectives, chase.limits, effort, rung)):
            break
    return Trial(genome, values, effort)


def _checked(chase: Chase, values: Values) -> dict[str, float]:
    missing = [name for name in (*chase.objectives, *chase.limits) if name not in values]
    if missing:
        raise UserError(
            f"an evaluation gave {', '.join(values) or 'nothing'}; the search also needs {', '.join(missing)}"
        )
    return {name: float(value) for name, value in values.items()}
