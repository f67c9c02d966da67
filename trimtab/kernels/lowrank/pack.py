"""Low-rank weights, and weights with a low-rank correction, for the kernels; the caller adds a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from trimtab.formats.packed import Packed


def halves(values: Tensor) -> np.ndarray[Any, Any]:
    """The bits of halves, as the kernels take them."""
    return values.contiguous().numpy().view(np.uint16)


def make(module: Any, packed: Packed) -> Any:
    """The kernels' weight of a packed `Rank`."""
    return module.low_rank(halves(packed.tensors["left"]), halves(packed.tensors["right"]))


def make_plus(module: Any, packed: Packed, maker: Callable[[Packed], Any]) -> Any | None:
    """The kernels' weight of a packed `Plus`; `maker` makes that of its base, or None where no kernel runs it."""
    own = {name: t for name, t in packed.tensors.items() if not name.startswith("extra_") and name != "bias"}
    base = maker(Packed(packed.level.base, packed.shape, own))  # type: ignore[attr-defined]
    if base is None:
        return None
    left, right = packed.tensors["extra_left"], packed.tensors["extra_right"]
    return module.plus(base, module.low_rank(halves(left), halves(right)))
