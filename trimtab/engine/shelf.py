"""Where solved weights are kept: in memory, or on disk beside the journal, committed place by place and read back
when wanted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, MutableMapping

from trimtab.core.journal import Journal
from trimtab.core.level import parse_level
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.packed import Packed, tensor_names


class Shelf(MutableMapping[str, Packed]):
    """Packed weights by site path.

    Args:
        journal: the run's journal, or None to keep all in memory.
        name: the folder below the run's in which the places' files lie.
    """

    def __init__(self, journal: Journal | None = None, name: str = "") -> None:
        self.journal, self.name = journal, name
        self.held: dict[str, Packed] = {}
        self.files: dict[str, Checkpoint] = {}

    def __getitem__(self, path: str) -> Packed:
        return self.held[path] if path in self.held else _load(self.files[path], path)

    def __setitem__(self, path: str, packed: Packed) -> None:
        if path not in self.files:
            self.held[path] = packed

    def __delitem__(self, path: str) -> None:
        self.held.pop(path, None)
        self.files.pop(path, None)

    def __iter__(self) -> Iterator[str]:
        return iter({**self.held, **self.files})

    def __len__(self) -> int:
        return len({**self.held, **self.files})

    def keep(self, place: str, work: Callable[[], dict[str, Packed]]) -> dict[str, Packed]:
        """What `work` solves at a place, committed before it is used; on a resumed run what was committed."""
        if self.journal is None:
            return work()
        step, file = f"{self.name}/{place}", self.journal.folder / self.name / f"{place}.safetensors"

        def solve() -> dict[str, str]:
            solved = work()
            file.parent.mkdir(parents=True, exist_ok=True)
            tensors = {f"{path}|{part}": t for path, p in solved.items() for part, t in p.tensors.items()}
            levels = {path: [str(p.level), list(p.shape)] for path, p in solved.items()}
            write_safetensors(tensors, file, {"levels": json.dumps(levels)})
            return {path: str(p.level) for path, p in solved.items()}

        paths = self.journal.step(step, solve)
        stored = Checkpoint(file)
        self.files |= {path: stored for path in paths}
        for path in paths:
            self.held.pop(path, None)
        return {path: _load(stored, path) for path in paths}


def _load(file: Checkpoint, path: str) -> Packed:
    text, shape = json.loads(file.metadata["levels"])[path]
    level = parse_level(text)
    return Packed(level, tuple(shape), {part: file.read(f"{path}|{part}") for part in tensor_names(level)})
