"""Codes of any width from 1 to 16 bits, end to end in bytes, least significant bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 20  # codes at a time: a multiple of 8, so that every chunk ends on a byte


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack non-negative codes below 2**bits into `ceil(count * bits / 8)` bytes (uint8, 1-D).

    >>> pack_bits(torch.tensor([1, 2, 3, 0]), 2)
    tensor([57], dtype=torch.uint8)
    """
    flat = codes.reshape(-1).numpy().astype(np.uint16)
    assert flat.size == 0 or int(flat.max()) < 1 << bits, "a code is too wide"
    if bits == 8:
        return torch.from_numpy(flat.astype(np.uint8))
    if 8 % bits == 0:
        each = 8 // bits
        found = np.zeros(-(-flat.size // each), np.uint8)
        for i in range(each):
            found[: len(flat[i::each])] |= flat[i::each].astype(np.uint8) << (i * bits)
        return torch.from_numpy(found)
    places = np.arange(bits, dtype=np.uint16)
    parts = [
        np.packbits(((flat[i : i + _CHUNK, None] >> places) & 1).astype(np.uint8).ravel(), bitorder="little")
        for i in range(0, flat.size, _CHUNK)
    ]
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.uint8))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes that `pack_bits` packed: int32, 1-D.

    >>> unpack_bits(torch.tensor([57], dtype=torch.uint8), 2, 4)
    tensor([1, 2, 3, 0], dtype=torch.int32)
    """
    data = packed.numpy()
    if bits == 8:
        return torch.from_numpy(data[:count].astype(np.int32))
    if 8 % bits == 0:
        each = 8 // bits
        codes = np.empty(each * data.size, np.int32)
        for i in range(each):
            codes[i::each] = data >> (i * bits) & ((1 << bits) - 1)
        return torch.from_numpy(codes[:count])
    codes = np.empty(count, np.int32)
    weights = (1 << np.arange(bits)).astype(np.int32)
    for i in range(0, count, _CHUNK):
        n = min(_CHUNK, count - i)
        chunk = data[i * bits // 8 : (i * bits + n * bits + 7) // 8]
        codes[i : i + n] = np.unpackbits(chunk, bitorder="little")[: n * bits].reshape(n, bits) @ weights
    return torch.from_numpy(codes)
