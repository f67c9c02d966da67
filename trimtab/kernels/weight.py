"""Packed weights as the compiled kernels hold them: one table from the kind of level to the operation that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.level import NM, Codebook, Dense, Float, Int, Level, Plus, Rank, Sparse
from trimtab.formats.packed import Packed, summands
from trimtab.kernels.codebook.pack import codebook
from trimtab.kernels.dense.make import dense_weight
from trimtab.kernels.integer.pack import grouped
from trimtab.kernels.lowrank.pack import low_rank
from trimtab.kernels.native import native
from trimtab.kernels.sparse.pack import sparse

Part = Packed | Tensor


def kernel_weight(*parts: Part) -> Any | None:
    """The matrix `[out, in]` interleaved for the kernels; None where there are no kernels here.

    Several matrices that read the same inputs (q, k, v; gate, up) become one, with their rows one below the other. What
    is not packed, or what no kernel runs packed, is held in the narrowest of bf16, fp16 and fp32 that holds it exactly.
    """
    module = native()
    return None if module is None else weight_of(module, parts)


def weight_of(module: Any, parts: Sequence[Part]) -> Any:
    """The same for the compiled kernels that are named."""
    kinds = {type(part.level) if isinstance(part, Packed) else Dense for part in parts}
    weight = MAKERS[kinds.pop()](module, parts) if len(kinds) == 1 else None
    if weight is not None:
        return weight
    return _dense(module, parts) if len(parts) == 1 else module.stack([weight_of(module, [part]) for part in parts])


def _dense(module: Any, parts: Sequence[Part]) -> Any:
    return dense_weight(module, torch.cat([p.dense() if isinstance(p, Packed) else p for p in parts]))


def _plus(module: Any, packed: Packed) -> Any:
    base, extra = summands(packed)
    return module.plus(weight_of(module, [base]), low_rank(module, extra))


def _alone(make: Callable[[Any, Packed], Any]) -> Callable[[Any, Sequence[Any]], Any | None]:
    return lambda module, parts: make(module, parts[0]) if len(parts) == 1 else None


# A maker takes the compiled kernels and matrices of one kind of level and equal columns, to be stacked one below the
# other; it returns None where it cannot run them, or several of them.
MAKERS: dict[type[Level], Callable[[Any, Sequence[Any]], Any | None]] = {
    **{Int: grouped, Float: grouped, Dense: _dense, Sparse: _alone(sparse), NM: _alone(sparse)},
    **{Codebook: _alone(codebook), Rank: _alone(low_rank), Plus: _alone(_plus)},
}
