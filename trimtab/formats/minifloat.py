"""Minifloat grids: every non-negative value that `e` exponent and `m` mantissa bits can say, in the order of its
code.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def magnitudes(e: int, m: int) -> Tensor:
    """The 2**(e+m) non-negative values of a minifloat without infinities, ascending, fp32; subnormals included.

    The bias is 2**(e-1) - 1, as in the OCP formats. E4M3 gives up its largest code, which OCP keeps for NaN, and so
    ends at 448; E5M2 gives up its last exponent, as IEEE does, and ends at 57344.

    >>> magnitudes(2, 1)
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])
    >>> float(magnitudes(4, 3)[-1])
    448.0
    """
    code = torch.arange(1 << (e + m), dtype=torch.float64)
    exponent, mantissa = torch.div(code, 1 << m, rounding_mode="floor"), code % (1 << m)
    bias = 2 ** (e - 1) - 1
    normal = 2.0 ** (exponent - bias) * (1 + mantissa / 2**m)
    value = torch.where(exponent == 0, 2.0 ** (1 - bias) * mantissa / 2**m, normal).float()
    if (e, m) == (4, 3):
        return value[:-1]
    return value[: -(1 << m)] if (e, m) == (5, 2) else value


def encode_magnitude(value: Tensor, e: int, m: int) -> Tensor:
    """Codes of the nearest magnitudes (ties to the even code); values beyond the largest saturate."""
    grid = magnitudes(e, m)
    middle = (grid[1:] + grid[:-1]) / 2
    value = value.abs().contiguous()
    low, high = torch.bucketize(value, middle), torch.bucketize(value, middle, right=True)
    return torch.where(low % 2 == 0, low, high)
