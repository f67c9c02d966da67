"""A run's journal: one JSON line for each finished step, and files committed atomically beside it.

A step is finished when its line is whole and on disk. After a crash the journal's last line may be torn: it is cut
off, and the step is done again. Files are written under a temporary name, flushed, then renamed. Nothing at all is
written before the first step begins, so that what is refused before leaves no trace.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says while `path` is written into one sentence for the user."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cure = "nothing half-written was left: free some space or name another folder; a run goes on with --resume"
            raise UserError(f"{path}: the disk is full ({error.strerror}); {cure}") from None
        cure = "name a folder that you may write to"
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; {cure}") from None


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to disk, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def commit_folder(temporary: Path, folder: Path) -> None:
    """Rename a finished temporary folder to its name, replacing what a crash left there."""
    with writing(folder):
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _flush(folder.parent)


def _flush(path: Path) -> None:
    """Have a file's or folder's content on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Journal:
    """The finished steps of a run in `folder/journal.jsonl`; `step` gives a finished step's value or does it."""

    def __init__(self, folder: Path, resume: bool, header: dict[str, Any]) -> None:
        """Open a run's folder; it is made, and the header written, when the first step begins.

        Raises:
            UserError: the folder holds other content, another run, or nothing to resume, or it cannot be written.
        """
        self.folder, self.path, self.header = folder, folder / "journal.jsonl", json.loads(json.dumps(header))
        self.done: dict[str, Any] = {}
        self._whole, self._begun = 0, False
        with writing(folder):
            self._check(resume)

    def _check(self, resume: bool) -> None:
        folder = self.folder
        if folder.is_file():
            raise UserError(f"{folder} is a file; name a folder for the run with --out")
        if self.path.exists():
            if not resume:
                raise UserError(
                    f"{folder} already holds a run; go on with --resume, or choose another folder with --out"
                )
            self._read()
            found = self.done.get("start", self.header)
            if not isinstance(found, dict):
                raise UserError(f"{self.path} is damaged; start the run again in another folder with --out")
            if found != self.header:
                differing = [k for k in {**self.header, **found} if found.get(k) != self.header.get(k)]
                pairs = [f"{k}: {found.get(k)!r} there, {self.header.get(k)!r} asked" for k in differing[:2]]
                raise UserError(
                    f"{folder} holds a run of another job: its {', '.join(differing)} differ ({'; '.join(pairs)}); "
                    "choose another folder with --out"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} already exists with other content; choose another folder with --out")
        elif resume and not folder.exists():
            raise UserError(f"--resume was asked for, and {folder} holds no run; leave --resume out to start one")
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{nearest} is no folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.done[entry["step"]] = entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path} is damaged ({error}); start the run again in another folder with --out"
                ) from error
        self._whole = len(whole)

    def begin(self) -> None:
        """Make the folder and write the header, where that is not done; cut off a line that a crash tore."""
        if self._begun:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(self._whole)
        if "start" not in self.done:
            self.append("start", self.header)
        self._begun = True

    def append(self, step: str, value: Any) -> None:
        """Commit a finished step: the line is on disk when this returns."""
        line = json.dumps({"step": step, "value": value}).encode() + b"\n"
        with writing(self.path), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.done[step] = json.loads(json.dumps(value))

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The value of a finished step, or that of `work()`, committed; it has been through JSON either way."""
        if name not in self.done:
            self.begin()
            self.append(name, work())
        return self.done[name]
