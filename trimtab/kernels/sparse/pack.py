"""Sparse weights for the kernels: a bit a weight, or places within groups."""

from __future__ import annotations

from math import ceil, log2
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.level import NM, rows_cols
from trimtab.formats.bitstream import unpack_bits
from trimtab.formats.packed import Packed


def sparse(module: Any, packed: Packed) -> Any:
    """The kernels' weight of a packed `Sparse` or `NM`."""
    rows, cols = rows_cols(packed.shape)
    if isinstance(packed.level, NM) and module.nm_fits(packed.level.n, packed.level.m):
        values, places = _groups(packed)
        halves = values.reshape(rows, -1).numpy().view(np.uint16)
        return module.nm(halves, places.reshape(rows, -1).numpy(), cols, packed.level.n, packed.level.m)
    mask, values = kept_of(packed)
    bits = np.packbits(mask.numpy(), axis=1, bitorder="little")
    return module.masked(bits, values.numpy().view(np.uint16), cols)


def kept_of(packed: Packed) -> tuple[Tensor, Tensor]:
    """The mask `[rows, cols]` of the kept weights, and their values in halves, row by row."""
    rows, cols = rows_cols(packed.shape)
    if not isinstance(packed.level, NM):
        mask = unpack_bits(packed.tensors["mask"], 1, rows * cols).reshape(rows, cols).bool()
        return mask, packed.tensors["values"].contiguous()
    values, places = _groups(packed)
    shape = (*values.shape[:2], packed.level.m)
    mask = torch.zeros(shape, dtype=torch.bool).scatter_(2, places.long(), True).reshape(rows, -1)[:, :cols]
    dense = torch.zeros(shape, dtype=torch.float16).scatter_(2, places.long(), values).reshape(rows, -1)[:, :cols]
    return mask, dense[mask]


def _groups(packed: Packed) -> tuple[Tensor, Tensor]:
    """Values in halves and places in bytes, both `[rows, groups, n]`."""
    level: NM = packed.level  # type: ignore[assignment]
    rows, cols = rows_cols(packed.shape)
    shape = (rows, ceil(cols / level.m), level.n)
    values = packed.tensors["values"].reshape(shape)
    places = unpack_bits(packed.tensors["places"], max(1, ceil(log2(level.m))), values.numel())
    return values.contiguous(), places.reshape(shape).to(torch.uint8)
