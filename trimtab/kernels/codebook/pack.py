"""Codebook weights for the kernels."""

from __future__ import annotations

from math import ceil, log2
from typing import Any

import numpy as np

from trimtab.core.level import Codebook, rows_cols
from trimtab.formats.bitstream import unpack_bits
from trimtab.formats.packed import Packed


def codebook(module: Any, packed: Packed) -> Any:
    """The kernels' weight of a packed `Codebook`."""
    level: Codebook = packed.level  # type: ignore[assignment]
    rows, cols = rows_cols(packed.shape)
    vectors = ceil(cols / level.dim)
    indices, words = [], []
    for name, size in (("", level.size), ("residual_", level.residual)):
        if size:
            index = unpack_bits(packed.tensors[f"{name}codes"], int(log2(size)), rows * vectors)
            indices.append(index.numpy().astype(np.uint16).reshape(rows, vectors))
            words.append(packed.tensors[f"{name}book"].contiguous().numpy().view(np.uint16))
    return module.codebook(indices, words, cols)
