"""Merging, streamed: tensors of several checkpoints come in, tile by tile, and one checkpoint goes out.

A reader keeps a few buffers filled, a team of threads computes on tiles that fit a core's cache, and a writer puts
finished pieces where they belong in the output's shards, whose layout is known before the first byte. Memory is the
buffers, whatever the size of the models. Files are read into these buffers and not mapped: pages of a mapped file count
as resident, each costs a fault, and a file that shrinks meanwhile kills the process.
"""

from __future__ import annotations

import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.journal import Journal, writing
from trimtab.engine.memory import free_bytes, keep_freed_memory
from trimtab.engine.merge import TILE, Piece, Survey, check_finite, passes_of, tiles
from trimtab.formats.checkpoint import DTYPES, INDEX, Entry, index_bytes, layout, shard_names

BUFFERS = 24 << 20  # bytes that were read ahead or wait to be written: little enough to stay in the last cache
SLOTS = 3  # buffers that go round: one is filled, one computed on, one ready
COMMIT = 192 << 20  # bytes of output between two lines of the journal
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """A piece, where its parents and its base lie, and the type that it is stored in."""

    piece: Piece
    sources: tuple[Entry, ...]
    base: Entry | None
    dtype: str

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is read: of a copy the one tensor that is copied, else the parents' and then the base's."""
        if self.piece.method is None:
            return (self.base or self.sources[0],)
        return self.sources if self.base is None else (*self.sources, self.base)

    @property
    def count(self) -> int:
        """Elements."""
        return prod(self.piece.shape)

    @property
    def width(self) -> int:
        """Bytes an element of the result."""
        return DTYPES[self.dtype][0]

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return self.count * self.width


def stream(folder: Path, jobs: Sequence[Job], shard_bytes: int, journal: Journal, tell: Tell) -> dict[str, list[str]]:
    """Merge tensor by tensor into safetensors shards in a folder, and go on where its journal says.

    Args:
        folder: gets the shards, and an index where there are several.
        jobs: in the order in which they are done and stored.
        shard_bytes: the most bytes of tensors a shard; a larger tensor has a shard of its own.
        journal: of this run, in that folder; gets a line for each group of tensors that are on disk.
        tell: is told what is done, how many megabytes are written, and of how many.

    Returns:
        For each tensor the SHA-256 of what was read of it, in the order of `Job.entries`.

    Raises:
        UserError: a parent holds NaN or infinity, a file became shorter, or the output cannot be written.
    """
    digests: dict[str, list[str]] = {}
    for step, value in journal.done.items():
        digests |= value if step.startswith("tensors ") else {}
    journal.begin()
    with ExitStack() as stack:
        files, places = _lay_out(folder, jobs, shard_bytes, bool(digests), stack)
        todo = [job for job in jobs if job.piece.name not in digests]
        total, left = (sum(job.bytes for job in group) for group in (jobs, todo))
        tell("merging, MB", total - left >> 20, total >> 20)
        if todo:
            keep_freed_memory(1 << 26)
            threads = torch.get_num_threads()
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1)  # the team's threads take a tile each
            with _Stream(todo, places, files, journal, threads) as running:
                running.go(lambda written: tell("merging, MB", total - left + written >> 20, total >> 20))
                digests |= running.digests
    return digests


def _lay_out(
    folder: Path, jobs: Sequence[Job], limit: int, resumed: bool, stack: ExitStack
) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """The output's files, open, with headers, and for each tensor the number of its file and its first byte there."""
    shards: list[list[Job]] = [[]]
    held = 0
    for job in jobs:
        if shards[-1] and held + job.bytes > limit:
            shards.append([])
            held = 0
        shards[-1].append(job)
        held += job.bytes
    names = shard_names("model", len(shards))
    files: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    weight_map: dict[str, str] = {}
    with writing(folder):
        for name, members in zip(names, shards, strict=True):
            header, where = layout((j.piece.name, j.dtype, j.piece.shape) for j in members)
            if resumed and not (folder / name).is_file():
                raise UserError(
                    f"{folder / name} is missing of the merge that was cut off; start again without --resume"
                )
            file = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, file)
            size = max((stop for _, stop in where.values()), default=len(header))
            if sys.platform == "linux":  # a full disk is known now, and the pieces lie side by side
                os.posix_fallocate(file, 0, size)
            os.truncate(file, size)
            os.pwrite(file, header, 0)
            places |= {n: (len(files), start) for n, (start, _) in where.items()}
            weight_map |= dict.fromkeys(where, name)
            files.append(file)
        if len(names) > 1:
            (folder / f"model{INDEX}").write_bytes(index_bytes(weight_map, sum(job.bytes for job in jobs)))
    return files, places


@dataclass
class _Span:
    """Neighbouring elements of a job's tensors, in buffers, for one of its passes; `last` of that pass."""

    job: Job
    turn: int
    start: int
    stop: int
    last: bool
    buffers: list[Tensor]
    slot: Tensor | None


@dataclass
class _Result:
    """A piece of the output; `last` of its tensor."""

    job: Job
    start: int
    last: bool
    content: Tensor
    slot: Tensor | None


class _Stopped(Exception):
    """Another thread has failed, or the run was interrupted."""


class _Stream:
    """The three stages, and the buffers that go round between them."""

    def __init__(
        self,
        jobs: Sequence[Job],
        places: Mapping[str, tuple[int, int]],
        files: Sequence[int],
        journal: Journal,
        threads: int,
    ) -> None:
        self.jobs, self.places, self.files, self.journal = jobs, places, files, journal
        self.digests: dict[str, list[str]] = {}
        self.filled: queue.Queue[_Span] = queue.Queue()
        self.results: queue.Queue[_Result | None] = queue.Queue()
        self.inputs: queue.Queue[Tensor] = queue.Queue()
        self.outputs: queue.Queue[Tensor] = queue.Queue()
        reads = max(sum(DTYPES[e.dtype][0] for e in job.entries) for job in jobs)
        writes = max(job.width for job in jobs)
        longest = -(-max(job.count for job in jobs) // TILE) * TILE
        self.span = max(TILE, min(longest, BUFFERS // (SLOTS * (reads + writes)) // TILE * TILE))
        for _ in range(SLOTS):
            self.inputs.put(torch.empty(self.span * reads, dtype=torch.uint8))
            self.outputs.put(torch.empty(self.span * writes, dtype=torch.uint8))
        self.stopping, self.written = threading.Event(), 0
        self.failure: BaseException | None = None
        self.crowded = sum(e.stop - e.start for job in jobs for e in job.entries) > (free_bytes() or 1 << 62) // 2
        self.committer = ThreadPoolExecutor(1)
        self.team = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1))

    def __enter__(self) -> _Stream:
        self.reader, self.writer = (
            threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in (self._read, self._write)
        )
        self.reader.start()
        self.writer.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self.stopping.set()
        self.team.shutdown(cancel_futures=True)
        self.committer.shutdown(cancel_futures=True)
        self.reader.join()
        self.writer.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _Stopped:
            return
        except BaseException as error:
            self.failure = error
            self.stopping.set()

    def _take(self, line: queue.Queue[Any]) -> Any:
        while not self.stopping.is_set():
            with suppress(queue.Empty):
                return line.get(timeout=0.1)
        raise _Stopped

    # ---- reading

    def _read(self) -> None:
        with ExitStack() as stack:
            opened: dict[Path, int] = {}
            for job in self.jobs:
                for entry in job.entries:
                    if entry.file not in opened:
                        opened[entry.file] = _open(entry.file)
                        stack.callback(os.close, opened[entry.file])
                for turn in range(passes_of(job.piece) + 1):
                    for span in self._spans(job, turn):
                        for entry, buffer in zip(job.entries, span.buffers, strict=True):
                            _fill(opened[entry.file], entry, span.start * DTYPES[entry.dtype][0], buffer)
                        self.filled.put(span)
                if self.crowded and sys.platform == "linux":  # or they would drive out what is still needed
                    for entry in job.entries:
                        size = entry.stop - entry.start
                        os.posix_fadvise(opened[entry.file], entry.start, size, os.POSIX_FADV_DONTNEED)

    def _spans(self, job: Job, turn: int) -> Iterator[_Span]:
        whole = job.piece.method is not None and not job.piece.method.tiled
        step = max(1, job.count) if whole else self.span
        for start, stop in pairwise([*range(0, job.count, step), job.count] if job.count else [0, 0]):
            sizes = [DTYPES[e.dtype][0] * (stop - start) for e in job.entries]
            slot = None if whole else self._take(self.inputs)
            memory = torch.empty(sum(sizes), dtype=torch.uint8) if slot is None else slot
            buffers, at = {}, 0
            for i in sorted(range(len(sizes)), key=lambda i: -DTYPES[job.entries[i].dtype][0]):  # so that all align
                buffers[i] = memory[at : at + sizes[i]]
                at += sizes[i]
            yield _Span(job, turn, start, stop, stop == job.count, [buffers[i] for i in range(len(sizes))], slot)

    # ---- computing

    def go(self, tell: Callable[[int], None]) -> None:
        """Carry all jobs out; `tell` is told how many bytes are written."""
        try:
            for job in self.jobs:
                self._one(job)
                tell(self.written)
            self.results.put(None)
            while self.writer.is_alive():
                self.writer.join(0.2)
        except _Stopped:
            pass
        if self.failure is not None:
            raise self.failure

    def _one(self, job: Job) -> None:
        survey, hashes = Survey(job.piece), [hashlib.sha256() for _ in job.entries]
        for turn in range(survey.passes + 1):
            statistics = survey.statistics() if turn == survey.passes else {}
            last = False
            while not last:
                span: _Span = self._take(self.filled)
                last = span.last
                work: list[Callable[[], Any]] = []
                if not turn:
                    work += [partial(h.update, _bytes(b)) for h, b in zip(hashes, span.buffers, strict=True)]
                if turn < survey.passes:
                    work += [partial(self._look, survey, span, at) for at in tiles(span.stop - span.start)]
                    for add in filter(None, self._together(work)):
                        add()
                else:
                    self._finish(span, statistics, work, hashes)
                if span.slot is not None:
                    self.inputs.put(span.slot)
            if turn < survey.passes:
                survey.close()

    def _finish(
        self, span: _Span, statistics: Mapping[str, Any], work: list[Callable[[], Any]], hashes: Sequence[Any]
    ) -> None:
        job = span.job
        size = (span.stop - span.start) * job.width
        slot = None if span.slot is None else self._take(self.outputs)
        content = torch.empty(size, dtype=torch.uint8) if slot is None else slot[:size]
        if job.piece.method is None:
            work.append(partial(content.copy_, span.buffers[0]))
        elif slot is None:
            work.append(partial(self._whole, span, statistics, content))
        else:
            work += [partial(self._tile, span, statistics, at, content) for at in tiles(span.stop - span.start)]
        self._together(work)
        if span.last:
            self.digests[job.piece.name] = [h.hexdigest() for h in hashes]
        self.results.put(_Result(job, span.start, span.last, content, slot))

    def _together(self, work: Sequence[Callable[[], Any]]) -> list[Any]:
        if len(work) == 1:
            return [work[0]()]
        return [future.result() for future in [self.team.submit(task) for task in work]]

    def _tensors(self, span: _Span, at: slice) -> tuple[list[Tensor], Tensor | None]:
        found = []
        for entry, buffer in zip(span.job.entries, span.buffers, strict=True):
            found.append(buffer.view(_type(entry.dtype))[at].float())
            if not span.turn:
                check_finite(found[-1], span.job.piece.name, str(entry.file.parent))
        return (found, None) if span.job.base is None else (found[:-1], found[-1])

    def _look(self, survey: Survey, span: _Span, at: slice) -> Callable[[], None]:
        return survey.look(*self._tensors(span, at))

    def _tile(self, span: _Span, statistics: Mapping[str, Any], at: slice, content: Tensor) -> None:
        piece = span.job.piece
        assert piece.method is not None
        tensors, base = self._tensors(span, at)
        result = piece.method.merge(tensors, base, **piece.given(statistics, (span.start + at.start) // TILE))
        content.view(_type(span.job.dtype))[at].copy_(result)

    def _whole(self, span: _Span, statistics: Mapping[str, Any], content: Tensor) -> None:
        piece = span.job.piece
        assert piece.method is not None
        tensors, base = self._tensors(span, slice(None))
        shaped = [t.reshape(piece.shape) for t in tensors]
        origin = None if base is None else base.reshape(piece.shape)
        result = piece.method.merge(shaped, origin, **piece.given(statistics, 0))
        content.view(_type(span.job.dtype)).copy_(result.reshape(-1))

    # ---- writing

    def _write(self) -> None:
        finished: list[str] = []
        waiting, touched = 0, set()
        commits: list[Future[None]] = []
        while True:
            result: _Result | None = self._take(self.results)
            if result is not None:
                name = result.job.piece.name
                shard, first = self.places[name]
                with writing(self.journal.folder):
                    _write_all(self.files[shard], result.content, first + result.start * result.job.width)
                waiting, self.written = waiting + len(result.content), self.written + len(result.content)
                touched.add(shard)
                finished += [name] if result.last else []
                if result.slot is not None:
                    self.outputs.put(result.slot)
            if finished and (result is None or waiting >= COMMIT):
                commits.append(self.committer.submit(self._commit, finished, touched))
                finished, waiting, touched = [], 0, set()
            while commits and (result is None or commits[0].done()):
                commits.pop(0).result()
            if result is None:
                return

    def _commit(self, finished: Sequence[str], touched: Iterable[int]) -> None:
        """Have tensors on disk, and then say so; meanwhile the next are written."""
        with writing(self.journal.folder):
            for shard in touched:
                os.fsync(self.files[shard])
        self.journal.append(f"tensors {len(self.journal.done)}", {n: self.digests[n] for n in finished})


def _type(name: str) -> torch.dtype:
    return getattr(torch, DTYPES[name][1])


def _bytes(buffer: Tensor) -> memoryview:
    """A buffer's memory."""
    return buffer.numpy().data


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; name a file that can") from None


def _fill(file: int, entry: Entry, offset: int, buffer: Tensor) -> None:
    """Fill a buffer with a tensor's bytes from an offset on."""
    target, done = _bytes(buffer), 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], entry.start + offset + done)
        if not count:
            raise UserError(f"{entry.file}: the file became shorter while it was read; leave it alone and try again")
        done += count


def _write_all(file: int, content: Tensor, offset: int) -> None:
    source, done = _bytes(content), 0
    while done < len(source):
        done += os.pwrite(file, source[done:], offset + done)
