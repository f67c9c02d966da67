"""Low-rank weights for the kernels; the caller adds a bias."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from trimtab.formats.packed import Packed


def low_rank(module: Any, packed: Packed) -> Any:
    """The kernels' weight of a packed `Rank`."""
    return module.low_rank(_bits(packed.tensors["left"]), _bits(packed.tensors["right"]))


def _bits(halves: Tensor) -> np.ndarray[Any, Any]:
    return halves.contiguous().numpy().view(np.uint16)
