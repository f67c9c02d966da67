"""Low-rank adapters of one model, of which a batch may use many (S-LoRA: Sheng et al. 2023, arXiv:2311.03285)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import did_you_mean
from trimtab.engine.program import Matrix
from trimtab.formats.peft import Adapter

MOST = 64  # ranks that there is room for
PANEL, HUGE = 16, 2 << 20  # outputs that lie side by side in the kernels' factors; bytes of a huge page


class Bank:
    """The adapters that are at hand, by name. They may come and go between any two steps.

    Args:
        kernels: the compiled kernels, or None for plain torch.
        matrices: path -> matrix, of the model's linears.
        most: ranks that an adapter may have.
    """

    def __init__(self, kernels: Any, matrices: Mapping[str, Matrix], most: int = MOST) -> None:
        self.kernels, self.most = kernels, most
        self.matrices = {path: matrix for path, matrix in matrices.items() if matrix.kind == "linear"}
        self.rows = {path: matrix.rows for path, matrix in matrices.items()}
        self.places = {path: i for i, path in enumerate(self.matrices)}
        sizes = [(matrix.rows, matrix.cols) for matrix in self.matrices.values()]
        self.pool = None if kernels is None else kernels.Adapters(sizes, most)
        self.held: dict[str, Adapter] = {}  # for torch; the kernels hold their own
        self.numbers: dict[str, int] = {}
        self._next = 0

    def add(self, name: str, adapter: Adapter) -> None:
        """Take an adapter in, in the place of one of that name; its factors are held as halves.

        Raises:
            UserError: it is for another model, or of too high a rank.
        """
        for path, (down, up) in adapter.factors.items():
            if path not in self.matrices:
                raise UserError(
                    f"{adapter.name} adapts {path}, and this model has no linear of that name"
                    f"{did_you_mean(path, self.matrices)}; it is an adapter of another model"
                )
            matrix = self.matrices[path]
            if (len(up), down.shape[1]) != (matrix.rows, matrix.cols):
                raise UserError(
                    f"{adapter.name} adapts {path} as {len(up)} x {down.shape[1]}, and it is {matrix.rows} x "
                    f"{matrix.cols} here; it is an adapter of another model"
                )
        if adapter.rank > self.most:
            raise UserError(f"{adapter.name} has rank {adapter.rank}, and there is room for {self.most}")
        if self.pool is not None:
            parts = [self._correction(adapter.factors.get(path)) for path in self.matrices]
            self.pool.put(self._next, parts)
            if name in self.numbers:
                self.pool.drop(self.numbers[name])
        else:
            self.held[name] = adapter
        self.numbers[name] = self._next
        self._next += 1

    def remove(self, name: str) -> None:
        """Let go of an adapter; steps that run now still have it.

        Raises:
            UserError: there is none of that name.
        """
        self.number(name)
        if self.pool is not None:
            self.pool.drop(self.numbers[name])
        self.held.pop(name, None)
        del self.numbers[name]

    def number(self, name: str | None) -> int:
        """The kernels' number of an adapter; -1 for None.

        Raises:
            UserError: there is none of that name.
        """
        if name is None:
            return -1
        if name not in self.numbers:
            raise UserError(
                f"there is no adapter {name!r}{did_you_mean(name, self.numbers)}; {len(self.numbers)} are loaded"
            )
        return self.numbers[name]

    def parts(self, paths: Sequence[str]) -> list[tuple[int, int]]:
        """Of a weight that is several matrices one below the other: (place, first row) of those that can be adapted."""
        firsts = accumulate((self.rows[path] for path in paths), initial=0)
        return [(self.places[path], first) for path, first in zip(paths, firsts, strict=False) if path in self.places]

    def _correction(self, factors: tuple[Tensor, Tensor] | None) -> Any:
        if factors is None:
            return None
        down, up = (half(factor).numpy().view("uint16") for factor in factors)
        return self.kernels.low_rank(up, down)


def pooled_bytes(shapes: Iterable[tuple[int, int, int]]) -> int:
    """What an adapter takes of the kernels' memory, which comes in huge pages.

    Args:
        shapes: (rank, inputs, outputs) of each linear that it adapts.

    >>> pooled_bytes([(16, 64, 64)]), pooled_bytes([(16, 2048, 2048)] * 100)
    (4096, 14680064)
    """
    total = sum(-(-2 * rank * (cols + -(-rows // PANEL) * PANEL) // 64) * 64 for rank, cols, rows in shapes)
    return -(-total // HUGE) * HUGE if total >= HUGE else total


def half(factor: Tensor) -> Tensor:
    """A factor as it is held.

    Raises:
        UserError: a value is beyond the halves.
    """
    held = factor.to(torch.float16).contiguous()
    if not held.isfinite().all():
        raise UserError(
            f"an adapter's factor reaches {float(factor.abs().max()):.3g}, and halves end at 65504; scale it"
        )
    return held
