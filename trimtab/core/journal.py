"""A run's journal: one JSON line for each finished step, and files committed atomically beside it.

A step is finished when its line is whole and on disk. After a crash the journal's last line may be torn: it is cut
off, and the step is
done again. Files are written under a temporary name, flushed, then renamed.
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
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)


class Journal:
    """The finished steps of a run in `folder/journal.jsonl`; `step` gives a finished step's value or does it."""

    def __init__(self, folder: Path, resume: bool, header: dict[str, Any]) -> None:
        """Open a run's folder.

        Raises:
            UserError: the folder holds other content, another run, or nothing to resume.
        """
        self.folder, self.path = folder, folder / "journal.jsonl"
        if folder.is_file():
            raise UserError(f"{folder} is a file; name a folder for the run")
        self.done: dict[str, Any] = {}
        if self.path.exists():
            if not resume:
                raise UserError(
                    f"{folder} already holds a run; go on with --resume, or choose another folder with --out"
                )
            self._read()
            found = self.done.get("start")
            if found is not None and found != json.loads(json.dumps(header)):
                differing = sorted(
                    k for k in {*found, *header} if found.get(k) != json.loads(json.dumps(header)).get(k)
                )
                raise UserError(
                    f"{folder} holds a run of another job: its {', '.join(differing)} differ "
                    f"({'; '.join(f'{k}: {found.get(k)!r} there, {header.get(k)!r} asked' for k in differing[:2])}); "
                    "choose another folder with --out"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} already exists with other content; choose another folder with --out")
        elif resume and not folder.exists():
            raise UserError(f"--resume was asked for, and {folder} holds no run; leave --resume out to start one")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if "start" not in self.done:
            self.append("start", header)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                self.done[entry["step"]] = entry["value"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path} is damaged ({error}); start the run again in another folder with --out"
                ) from error
        if len(whole) < len(data):
            with writing(self.path), open(self.path, "rb+") as file:
                file.truncate(len(whole))

    def append(self, step: str, value: Any) -> None:
        """Commit a finished step: the line is on disk when this returns."""
        line = json.dumps({"step": step, "value": value}).encode() + b"\n"
        with writing(self.path), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.done[step] = json.loads(json.dumps(value))

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The value of a finished step, or that of `work()`, committed. What comes back has been through JSON either
        way.
        """
        if name not in self.done:
            self.append(name, work())
        return self.done[name]
