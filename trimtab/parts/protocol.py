"""How searchers of different spaces are compared: by what they add to the mean network of their own space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.core.claim import Check
from trimtab.core.errors import UserError


def beside(of: str = "", random: str = "random_", say: str = "") -> tuple[Check, Check]:
    """What stands beside every claim of a search: checks of `improvement`, the percent by which what it found is above
    the mean random network, and of `random_improvement`, what drawing finds with as many evaluations.

    Args:
        of, random: what the two names begin with.
        say: what the checks' words begin with.

    >>> [check.say for check in beside(say="macro: ")]
    ['macro: above the mean random network', 'macro: not below what random search finds']
    """
    found = f"{of}improvement"
    return (
        Check(f"{say}above the mean random network", found, ">", 0.0),
        Check(f"{say}not below what random search finds", found, ">=", f"{random}improvement"),
    )


def improvement(found: float, random: Sequence[float] | NDArray[np.float64]) -> float:
    """Percent by which an accuracy is above the mean of random networks, RI = 100 (acc - acc_random) / acc_random.

    >>> improvement(93.0, [92.0, 94.0, 90.0, 91.0, 93.0])
    1.0869565217391304
    """
    base = float(np.mean(random))
    return 100 * (found - base) / base


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
