"""A token drawn from logits. In numpy, because torch's threads go on spinning after an operation, on the cores that the
kernels need next.
"""

from __future__ import annotations

import numpy as np


def draw(logits: np.ndarray, rng: np.random.Generator, temperature: float = 0.0, top_p: float = 1.0) -> int:
    """A token by its logits `[vocabulary]`: the likeliest at temperature 0, else from `softmax(logits / temperature)`.

    Args:
        top_p: only from the likeliest tokens that together have so much of the probability.

    >>> draw(np.array([0.0, 2.0, 1.0]), np.random.default_rng(0))
    1
    """
    if temperature <= 0:
        return int(logits.argmax())
    kept, shares = _shares(logits, temperature, top_p)
    token = drawn(shares, rng)
    return token if kept is None else int(kept[token])


def probabilities(logits: np.ndarray, temperature: float, top_p: float = 1.0) -> np.ndarray:
    """What `draw` gives each token, `[vocabulary]`, for a temperature above 0.

    >>> probabilities(np.log(np.array([0.5, 0.3, 0.2])), 1.0, 0.6).round(3).tolist()
    [0.625, 0.375, 0.0]
    """
    kept, shares = _shares(logits, temperature, top_p)
    if kept is None:
        return shares / shares.sum()
    whole = np.zeros(len(logits))
    whole[kept] = shares / shares.sum()
    return whole


def drawn(shares: np.ndarray, rng: np.random.Generator) -> int:
    """A place, in proportion to its share."""
    sums = shares.cumsum()
    return int(sums.searchsorted(rng.random() * sums[-1], side="right"))


def _shares(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray | None, np.ndarray]:
    """Shares in proportion to the probabilities, and of which tokens; None: of all."""
    shares = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    if top_p >= 1:
        return None, shares
    order = np.argsort(-shares, kind="stable")
    sums = shares[order].cumsum()
    kept = order[: int(sums.searchsorted(top_p * sums[-1])) + 1]
    return kept, shares[kept]


def log_probability(logits: np.ndarray, token: int, most: int) -> tuple[float, list[tuple[int, float]]]:
    """Of a token by the logits `[vocabulary]` at temperature 1, and of the `most` likeliest, likeliest first.

    >>> log_probability(np.log(np.array([0.5, 0.3, 0.2])), 1, 1)
    (-1.2039728043259361, [(0, -0.6931471805599453)])
    """
    x = logits.astype(np.float64)
    total = float(x.max() + np.log(np.exp(x - x.max()).sum()))
    few = np.argpartition(-x, min(most, len(x) - 1))[:most] if most else np.empty(0, np.int64)
    top = sorted(((int(i), float(x[i] - total)) for i in few), key=lambda pair: (-pair[1], pair[0]))
    return float(x[token] - total), top
