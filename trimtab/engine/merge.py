"""One tensor of several models into one: what its method is given, the statistics that it asks for, and the merge.

Tensors are taken in tiles that fit a core's cache. `merged` does it for tensors in memory; `engine.merge_stream` for
checkpoints of any size, with the same tiles and so to the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Merger
from trimtab.parts.selection import PASSES, KthLargest, count_for

TILE = 1 << 18  # elements; of one parent a megabyte in fp32. Random masks hang on it: another size, other masks


@dataclass(frozen=True)
class Piece:
    """One tensor of the result, and what its method is to be given.

    Fields:
        name, shape: of the tensor.
        method: with the fields of this tensor; None: the base's (or first parent's) tensor is copied.
        parents: names of the parents, by which random numbers are seeded.
        weight, density: a number a parent.
        depth: where its block lies.
        seed: of everything random.
        block: place of its block, and how many there are.
    """

    name: str
    shape: tuple[int, ...]
    method: Merger | None
    parents: tuple[str, ...] = ()
    weight: tuple[float, ...] = ()
    density: tuple[float, ...] = ()
    depth: float = 0.0
    seed: int = 0
    block: tuple[int, int] = (0, 1)

    def given(self, statistics: Mapping[str, Any], tile: int) -> dict[str, Any]:
        """What the method's keyword-only parameters name, for one tile."""
        assert self.method is not None
        found: dict[str, Any] = {"weight": self.weight, "density": self.density, "depth": self.depth}
        found |= {"block": self.block, **statistics}
        needs = self.method.needs()
        if "rng" in needs:
            found["rng"] = tuple(
                torch.Generator().manual_seed(_seed(self.seed, self.name, parent, tile)) for parent in self.parents
            )
        return {name: found[name] for name in needs}


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


# ---- statistics


def passes_of(piece: Piece) -> int:
    """How often a tensor is gone through before it is merged."""
    needs = piece.method.needs() if piece.method else ()
    if "threshold" in needs and any(d < 1 for d in piece.density):
        return PASSES
    return int("gram" in needs or "peak" in needs)


class Survey:
    """The statistics of a tensor that its method asks for, from tiles in a few passes."""

    def __init__(self, piece: Piece) -> None:
        needs = piece.method.needs() if piece.method else ()
        count = len(piece.parents)
        self.kth: list[KthLargest | None] = []
        if "threshold" in needs:
            elements = max(1, prod(piece.shape))
            ks = [None if d >= 1 else KthLargest(count_for(d, elements)) for d in piece.density]
            self.kth = [*ks]
        self.gram = torch.zeros(count, count, dtype=torch.float64) if "gram" in needs else None
        self.peak = torch.zeros(count) if "peak" in needs else None
        self.passes = passes_of(piece)
        self._pass = 0

    def look(self, tensors: Sequence[Tensor], base: Tensor | None) -> Callable[[], None]:
        """Look at a tile; what is returned adds the result, and is not to be called side by side."""
        counted: list[tuple[KthLargest, Tensor]] = []
        for kth, tensor in zip(self.kth, tensors, strict=False):
            if kth is not None:
                assert base is not None
                counted.append((kth, kth.count(tensor - base)))
        gram = peak = None
        if self.gram is not None and not self._pass:
            flat = torch.stack([t.reshape(-1) for t in tensors])
            gram = (flat @ flat.T).double()
        if self.peak is not None and not self._pass:
            assert base is not None
            peak = torch.stack([(t - base).abs().amax() for t in tensors])

        def add() -> None:
            for kth, counts in counted:
                kth.add(counts)
            if gram is not None and self.gram is not None:
                self.gram += gram
            if peak is not None and self.peak is not None:
                torch.maximum(self.peak, peak, out=self.peak)

        return add

    def close(self) -> None:
        """End a pass."""
        self._pass += 1
        for kth in filter(None, self.kth):
            kth.close()

    def statistics(self) -> dict[str, Any]:
        """By the names that methods use."""
        return {
            "threshold": tuple(0.0 if kth is None else kth.value for kth in self.kth),
            "gram": self.gram,
            "peak": () if self.peak is None else tuple(self.peak.tolist()),
        }


# ---- in memory


def tiles(count: int) -> Iterator[slice]:
    """Places of consecutive tiles of so many elements."""
    return (slice(start, min(start + TILE, count)) for start in range(0, count, TILE))


def merged(piece: Piece, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
    """A tensor merged in memory, in fp32: what the stream computes, to the bit.

    Raises:
        UserError: a parent holds NaN or infinity.
    """
    if piece.method is None:
        return (tensors[0] if base is None else base).clone()
    inputs = [t.float() for t in tensors]
    origin = None if base is None else base.float()
    for parent, tensor in zip(piece.parents, inputs, strict=True):
        check_finite(tensor, piece.name, parent)
    if origin is not None:
        check_finite(origin, piece.name, "the base")
    survey = Survey(piece)
    flat, root = [t.reshape(-1) for t in inputs], None if origin is None else origin.reshape(-1)
    places = list(tiles(prod(piece.shape)))
    for _ in range(survey.passes):
        for at in places:
            survey.look([t[at] for t in flat], None if root is None else root[at])()
        survey.close()
    statistics = survey.statistics()
    if not piece.method.tiled:
        return piece.method.merge(inputs, origin, **piece.given(statistics, 0))
    parts = [
        piece.method.merge([t[at] for t in flat], None if root is None else root[at], **piece.given(statistics, i))
        for i, at in enumerate(places)
    ]
    return torch.cat(parts).reshape(piece.shape) if parts else torch.empty(piece.shape)


def check_finite(tensor: Tensor, name: str, parent: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: names the tensor and the parent.
    """
    if not tensor.numel() or bool(tensor.sum().isfinite()):
        return  # what is not finite makes the sum so
    if not bool(tensor.isfinite().all()):
        count = int((~tensor.isfinite()).sum())
        raise UserError(
            f"{parent}: tensor {name} holds NaN or infinity ({count} in the part that was read); a merge would spread "
            "it: use a checkpoint with finite weights"
        )
