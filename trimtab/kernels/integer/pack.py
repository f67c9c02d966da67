"""From a packed weight to the matrix that the compiled kernels stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.level import Float, Int, rows_cols
from trimtab.formats.minifloat import magnitudes
from trimtab.formats.packed import Packed
from trimtab.kernels.integer.reference import exact_step


def grouped(module: Any, parts: Sequence[Packed]) -> Any | None:
    """Packed matrices of one `Int` or `Float` level, one below the other, as one weight; None where none runs them.

    The parts need not end on a byte, nor share a matrix scale.

    Args:
        module: the compiled kernels.
        parts: matrices `[out, in]` of the same level and columns.
    """
    level, cols = parts[0].level, rows_cols(parts[0].shape)[1]
    if any(p.level != level or rows_cols(p.shape)[1] != cols for p in parts):
        return None
    assert isinstance(level, Int | Float)
    group = level.group or cols
    zero, step, table = 0, 1.0, []
    if isinstance(level, Int):
        bits = level.bits
        zero = 1 << (bits - 1) if level.symmetric else 0
    else:
        bits, found = 1 + level.e + level.m, exact_step(level.e, level.m)
        if found is None:
            return None
        step = found
        steps = [int(v) for v in (magnitudes(level.e, level.m) / step).tolist()]
        zero = steps[-1]
        table = [zero + v for v in steps] + [zero - v for v in steps]
    has_zeros = isinstance(level, Int) and not level.symmetric
    return module.grouped(
        cols=cols,
        bits=bits,
        group=group,
        scale=level.scale,
        hadamard=level.hadamard and group <= cols,
        zero=zero,
        shift=step,
        table=table,
        codes=[_bytes(p.tensors["codes"]) for p in parts],
        scales=[_bytes(p.tensors["scale"]) for p in parts],
        zeros=[_bytes(p.tensors["zero"]) for p in parts] if has_zeros else [],
        factors=[float(p.tensors["matrix_scale"]) if level.scale == "e4m3" else 1.0 for p in parts],
    )


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.contiguous().view(torch.uint8).reshape(-1).numpy()
