"""A product with a weight that is not packed.

`y[i, r] = sum_c W[r, c] x[i, c]`, with `W [out, in]` as stored, `x [m, in]` and `y [m, out]`, all widened to fp32.
"""

from __future__ import annotations

from torch import Tensor


def apply(weight: Tensor, x: Tensor) -> Tensor:
    """`x [m, in]` to `y [m, out]`."""
    return x.float() @ weight.float().T
