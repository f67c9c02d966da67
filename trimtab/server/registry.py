"""The adapters of a folder: which there are, what each takes, and bringing one in beside the loop that serves."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from trimtab.core.errors import UserError
from trimtab.engine.adapters import Bank, pooled_bytes
from trimtab.engine.memory import give_back_freed_memory
from trimtab.formats.checkpoint import Checkpoint, read_header
from trimtab.formats.peft import CONFIG, PREFIX, WEIGHTS, read_adapter

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Registry:
    """Adapters by name, each a folder as PEFT saves it, within one folder; no name from outside becomes a path.

    Args:
        folder: holds them; None: there are none.
        bank: where they are brought to.
        check: refuses one that was trained on another model.

    Attributes:
        folders: of those that the last look found, by name.
        broken: name -> why it cannot be used.
    """

    def __init__(self, folder: Path | None, bank: Bank, check: Callable[[Path], object]) -> None:
        self.folder, self.bank, self.check = folder, bank, check
        self.folders: dict[str, Path] = {}
        self.broken: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(1, "adapters")
        self._coming: dict[str, Future[None]] = {}

    def scan(self) -> dict[str, Path]:
        """Look which there are: their folders by name."""
        if self.folder is not None:
            found = (entry for entry in sorted(self.folder.iterdir()) if NAME.fullmatch(entry.name))
            self.folders = {entry.name: entry for entry in found if (entry / CONFIG).is_file()}
        return self.folders

    def sizes(self) -> dict[str, int]:
        """Bytes that each takes in the pool, from the headers of their files alone; a damaged one is `broken`."""
        return {name: size for name in self.scan() if (size := self.size(name)) is not None}

    def size(self, name: str) -> int | None:
        """Bytes that one takes; None where it is damaged, and then it is `broken`."""
        self.broken.pop(name, None)
        try:
            if not (weights := self.folders[name] / WEIGHTS).is_file():
                Checkpoint(self.folders[name])  # says what is there in its place
            return _pooled(weights)
        except UserError as error:
            self.broken[name] = self._said(error)
            return None

    def start(self, name: str) -> None:
        """Begin to bring one in."""
        self._coming[name] = self._pool.submit(self._bring, name)

    def finished(self) -> list[tuple[str, UserError | None]]:
        """Those brought in since the last call, and why one could not be."""
        done = [name for name, future in self._coming.items() if future.done()]
        return [(name, self._outcome(name, self._coming.pop(name))) for name in done]

    def drop(self, name: str) -> None:
        """Take one out that no one uses."""
        self.bank.remove(name)

    def _bring(self, name: str) -> None:
        folder = self.folders[name]
        adapter = read_adapter(folder)
        self.check(folder)
        self.bank.add(name, adapter)
        del adapter
        give_back_freed_memory()  # of the factors as they were read, in pieces between others that stay

    def _outcome(self, name: str, future: Future[None]) -> UserError | None:
        error = future.exception()
        if error is None:
            return None
        self.broken[name] = self._said(error)
        return UserError(self.broken[name])

    def _said(self, error: BaseException) -> str:
        """What went wrong, without where on this machine."""
        return str(error).replace(f"{self.folder}/", "") or type(error).__name__


def _pooled(weights: Path) -> int:
    entries, _ = read_header(weights)
    shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, entry in entries.items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name.removeprefix(PREFIX))
        if found is None:
            raise UserError(f"it holds {name}, which is no factor of a linear")
        shapes[found[1]][found[2]] = tuple(entry.shape)
    for path, pair in shapes.items():
        if set(pair) != {"A", "B"} or any(len(shape) != 2 for shape in pair.values()) or pair["A"][0] != pair["B"][1]:
            raise UserError(f"the factors of {path} do not fit together")
    return pooled_bytes((pair["A"][0], pair["A"][1], pair["B"][0]) for pair in shapes.values())
