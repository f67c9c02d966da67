"""How searchers of different spaces are compared: by what they add to the mean network of their own space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trimtab.core.errors import UserError


def relative_improvement(found: Sequence[float], random: Sequence[float]) -> tuple[float, float]:
    """Percent by which accuracies that a search found are above the mean accuracy of random networks of the same space
    and training, RI = 100 (acc - acc_random) / acc_random, and half the width of its 95 % interval.

    Args:
        found: accuracies, one a seed of the search.
        random: accuracies of random networks, trained the same way; at least five.

    Raises:
        UserError: fewer than five random networks, or fewer than two seeds.

    Reference: Yang et al. 2020, arXiv:1912.12522, section 3.

    >>> relative_improvement([92.0, 94.0], [90.0, 91.0, 92.0, 93.0, 94.0])[0]
    1.0869565217391304
    """
    if len(random) < 5 or len(found) < 2:
        raise UserError(
            f"{len(found)} seeds and {len(random)} random networks were given; the protocol takes at least 2 and 5"
        )
    base = float(np.mean(random))
    shares = 100 * (np.asarray(found, dtype=float) - base) / base
    spread = 100 * float(np.std(random, ddof=1)) / base
    half = 1.96 * float(np.hypot(np.std(shares, ddof=1) / len(found) ** 0.5, spread / len(random) ** 0.5))
    return float(shares.mean()), half
