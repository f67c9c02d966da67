"""A hash of what a candidate computes: of its outputs on canonical inputs, rounded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike


def fingerprint(outputs: Iterable[ArrayLike], digits: int = 6) -> str:
    """A text that is equal for outputs that agree to so many digits of the largest, whatever computed them.

    >>> x = np.linspace(-1, 1, 50)
    >>> fingerprint([x * 2]) == fingerprint([x + x]), fingerprint([x * 2]) == fingerprint([x * 2.01])
    (True, False)
    """
    found = hashlib.sha256()
    for output in outputs:
        values = np.asarray(output, dtype=float)
        largest = float(np.abs(values).max(initial=0.0))
        step = 10.0 ** (np.floor(np.log10(largest)) - digits + 1) if largest > 0 and np.isfinite(largest) else 1.0
        # half a step off the round numbers that results like to be near to, where rounding would go either way
        found.update(np.floor(np.nan_to_num(values) / step + 0.37).astype(np.int64).tobytes())
        found.update(repr(values.shape).encode())
    return found.hexdigest()[:24]
