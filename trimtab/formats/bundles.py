"""Neurons of feed-forward layers on disk, each one run of bytes: its rows of the linears that make it, then its column
of the linear that reads it.

The file is plain safetensors: one tensor `[neurons, record]` a layer, so that anyone can open it. Beside them lie
other tensors, which are read whole. It is checked before it is used and written atomically, layer by layer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.core.errors import UserError
from trimtab.formats.checkpoint import DTYPES, Checkpoint, layout, write_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Spec = tuple[str, str, Sequence[int]]
"""Name, safetensors' type name and shape of a tensor."""


def bundled(rows: Sequence[Tensor], columns: Tensor) -> Tensor:
    """The records `[neurons, record]` of a layer.

    Args:
        rows: of each linear that makes the neurons, its rows `[neurons, inputs]`.
        columns: of the linear that reads them, its matrix `[outputs, neurons]`.

    >>> import torch
    >>> bundled([torch.tensor([[1, 2], [3, 4]])], torch.tensor([[5, 6], [7, 8], [9, 0]])).tolist()
    [[1, 2, 5, 7, 9], [3, 4, 6, 8, 0]]
    """
    import torch

    return torch.cat([*rows, columns.T], 1)


def write_bundles(
    path: str | os.PathLike[str],
    specs: Sequence[Spec],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of bundles, atomically and one tensor at a time.

    Args:
        specs: all tensors of the file.
        tensor: gives the one of that name; it is asked once for each, in the file's order.
        metadata: texts for the header.

    Raises:
        UserError: the disk is full, or the folder cannot be written; nothing is left behind.
    """
    import torch

    header, places = layout(specs, metadata)

    def pieces() -> Iterable[bytes | memoryview]:
        yield header
        for name, (start, stop) in places.items():
            made = tensor(name).contiguous()
            assert made.nbytes == stop - start, f"{name} has {made.nbytes} bytes, and {stop - start} were announced"
            yield made.reshape(-1).view(torch.uint8).numpy().data

    write_bytes(path, pieces())


class Bundles:
    """A file of bundles, open for reading.

    Neighbours are read together. The system's cache of the file may answer, which `from_disk` tells; `cold` asks it to
    forget what was read, so that every read goes to the disk, as where the memory is full.

    Args:
        path: the file.
        threads: that read at once, where there are so many runs: a disk answers several questions in the time of one
            (paper of `llm-in-a-flash`: 32).
        cold: leave nothing of it in the system's cache.

    Attributes:
        metadata: the header's texts.
        reads, bytes, seconds: how many runs of records were read, their bytes, and how long that took.

    Raises:
        UserError: it is missing, damaged, or no file of bundles.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 16, cold: bool = False) -> None:
        self.path, self.threads, self.cold = Path(path), threads, cold
        self._checkpoint = Checkpoint(self.path)
        self.metadata = self._checkpoint.metadata
        self.reads = self.bytes = 0
        self.seconds = 0.0
        self._pool: ThreadPoolExecutor | None = None
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as reason:
            raise UserError(f"{self.path}: cannot be read: {reason.strerror}; name a file that can") from None
        self._advise("POSIX_FADV_RANDOM")
        if cold:
            self._advise("POSIX_FADV_DONTNEED")
        self._before = blocks_read()

    def close(self) -> None:
        """Close the file."""
        if self._pool is not None:
            self._pool.shutdown()
        os.close(self._file)

    def __enter__(self) -> Bundles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """Names of all tensors."""
        return self._checkpoint.names()

    def spec(self, name: str, rows: int | None = None, width: int | None = None) -> tuple[int, int, torch.dtype]:
        """How many records a tensor has, elements of each, and their type.

        Raises:
            UserError: it is not there, or other numbers were expected.
        """
        import torch

        entry = self._checkpoint.entry(name)
        expected = (rows, width)
        if len(entry.shape) != 2 or any(w is not None and w != s for w, s in zip(expected, entry.shape, strict=True)):
            raise UserError(
                f"{self.path}: {name} has the shape {list(entry.shape)}, and {rows or 'any number of'} records of "
                f"{width or 'any number of'} elements were expected; delete the file, and it is written again"
            )
        return entry.shape[0], entry.shape[1], getattr(torch, DTYPES[entry.dtype][1])

    def whole(self, name: str) -> Tensor:
        """A tensor, all of it; it counts as no read of records."""
        return self._checkpoint.read(name)

    def read(self, name: str, neurons: Sequence[int]) -> Tensor:
        """The records `[neurons, record]` of these neurons, numbers in rising order.

        Raises:
            UserError: there is no such neuron, or the file has become shorter.
        """
        import torch

        entry = self._checkpoint.entry(name)
        count, width, dtype = self.spec(name)
        if any(b <= a for a, b in pairwise(neurons)) or (len(neurons) and not 0 <= neurons[0] <= neurons[-1] < count):
            raise UserError(
                f"neurons {list(neurons)[:8]} of {name} were asked for; it has {count}, numbers 0 to {count - 1}, and "
                "takes each once, in rising order"
            )
        record, start = width * dtype.itemsize, time.perf_counter()
        made = torch.empty(len(neurons), width, dtype=dtype)
        target = made.reshape(-1).view(torch.uint8).numpy().data
        wanted = runs(neurons)
        places = [0, *accumulate(length * record for _, length in wanted)]

        def fill(some: range) -> None:
            for i in some:
                target[places[i] : places[i + 1]] = self._bytes(
                    entry.start + wanted[i][0] * record, wanted[i][1] * record
                )

        if self.threads > 1 and len(wanted) > self.threads:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads)
            parts = [range(i, len(wanted), self.threads) for i in range(self.threads)]
            list(self._pool.map(fill, parts))
        else:
            fill(range(len(wanted)))
        if self.cold:
            self._advise("POSIX_FADV_DONTNEED")
        self.reads, self.bytes = self.reads + len(wanted), self.bytes + places[-1]
        self.seconds += time.perf_counter() - start
        return made

    @property
    def from_disk(self) -> int | None:
        """Bytes that this process has read from disks since the file was opened, in whole blocks; None where the system
        does not say.
        """
        now = blocks_read()
        return None if now is None or self._before is None else now - self._before

    def _bytes(self, start: int, count: int) -> bytes:
        data = os.pread(self._file, count, start)
        while len(data) < count:  # a read may be cut short, and of a file that is whole the rest comes next
            more = os.pread(self._file, count - len(data), start + len(data))
            if not more:
                raise UserError(f"{self.path}: the file became shorter while it was read; leave it alone and try again")
            data += more
        return data

    def _advise(self, what: str) -> None:
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # a system that takes no advice reads all the same
                os.posix_fadvise(self._file, 0, 0, getattr(os, what))  # all of it


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Rising numbers as runs of neighbours: (first, length) of each.

    >>> runs([2, 3, 4, 7, 9, 10])
    [(2, 3), (7, 1), (9, 2)]
    """
    if not len(numbers):
        return []
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1)]
    return [(int(numbers[a]), b - a) for a, b in pairwise([*starts, len(numbers)])]


def blocks_read() -> int | None:
    """Bytes that this process has caused to be read from disks, as the system counts them, or None."""
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))
    except (OSError, StopIteration):
        return None
