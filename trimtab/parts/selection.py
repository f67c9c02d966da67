"""The k-th largest of numbers that come in pieces, in time linear in their number and without keeping them.

A magnitude in fp32 is ordered as its 31 bits are: the upper 16 are counted in a first pass, which says in which bin the
k-th largest lies; the lower 15 of those in that bin in a second, which says which it is.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LOW = 15
_LOWS = 1 << LOW
_HIGHS = 1 << (31 - LOW)
PASSES = 2


def magnitude_bits(x: Tensor) -> Tensor:
    """Magnitudes of fp32 numbers as whole numbers that are ordered as they are; a copy."""
    return x.abs().view(torch.int32).reshape(-1)


class KthLargest:
    """The `k`-th largest magnitude, exact: count pieces in two passes, with `close` after each.

    >>> kth = KthLargest(2)
    >>> for _ in range(PASSES):
    ...     kth.add(kth.count(torch.tensor([0.5, -3.0]))); kth.add(kth.count(torch.tensor([1.0, -2.0])))
    ...     kth.close()
    >>> kth.value
    2.0
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.bin: int | None = None
        self.value = 0.0
        self._counts = torch.zeros(_HIGHS, dtype=torch.int64)

    def count(self, x: Tensor) -> Tensor:
        """Counts of one piece, for `add`; pieces may be counted side by side."""
        bits = magnitude_bits(x)
        if self.bin is None:
            return torch.bincount(bits >> LOW, minlength=_HIGHS)
        inside = np.flatnonzero(torch.eq(bits >> LOW, self.bin).numpy())  # few, and numpy skips the rest fastest
        return torch.bincount(torch.from_numpy(bits.numpy()[inside]) - (self.bin << LOW), minlength=_LOWS)

    def add(self, counts: Tensor) -> None:
        """Add the counts of a piece to those of the pass."""
        self._counts += counts

    def close(self) -> None:
        """End a pass."""
        above = self._counts.flip(0).cumsum(0)
        place = len(above) - 1 - int(torch.searchsorted(above, self.k))
        self.k -= int(above[-1] - self._counts[: place + 1].sum())  # those above the bin come before it
        if self.bin is None:
            self.bin = place
            self._counts = torch.zeros(_LOWS, dtype=torch.int64)
        else:
            self.value = float(torch.tensor((self.bin << LOW) + place, dtype=torch.int32).view(torch.float32))


def kth_largest(x: Tensor, k: int) -> float:
    """The k-th largest magnitude of a tensor.

    >>> kth_largest(torch.tensor([1.0, -4.0, 2.0, 3.0]), 3)
    2.0
    """
    kth = KthLargest(k)
    for _ in range(PASSES):
        kth.add(kth.count(x.float()))
        kth.close()
    return kth.value


def count_for(density: float, numbers: int) -> int:
    """How many of some numbers a density keeps: rounded down, at least one."""
    return max(1, int(density * numbers))
