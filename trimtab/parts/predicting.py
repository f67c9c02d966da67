"""Predictors of what a genome scores, from few evaluations, and how well an order is predicted.

A genome becomes a row of zeros and ones: an unordered knob one place an option, an ordered one a thermometer, so that
the weighted distance of two genomes is a sum over knobs of what their options differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtri

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome

Array = NDArray[np.float64]
NODES = ndtri((np.arange(7) + 0.5) / 7)
"""Middles of seven equally likely parts of a normal distribution."""
TAIL = 0.15
"""Share of the smallest values that say how far it goes on below them."""


class Encoding:
    """Genomes of a domain as rows of zeros and ones, and their distances by knob.

    >>> from trimtab.core.knob import Knob
    >>> both = Encoding(Domain((Knob("width", (8, 16, 32)), Knob("op", ("conv", "pool")))))
    >>> both.rows([(2, 1)]).tolist(), both.distances(both.rows([(0, 0)]), both.rows([(2, 1)])).tolist()
    ([[1.0, 1.0, 0.0, 1.0]], [[[1.0, 1.0]]])
    """

    def __init__(self, domain: Domain) -> None:
        self.tables: list[Array] = []
        self.owner: list[int] = []
        for i, knob in enumerate(domain.knobs):
            n = len(knob.options)
            places = np.arange(n)
            table = (places[:, None] > places[None, :-1]) if knob.ordered else np.eye(n)
            self.tables.append(np.asarray(table, dtype=float))
            self.owner += [i] * table.shape[1]
        self.knobs = len(domain.knobs)
        # what a place counts for, so that the farthest options of a knob are at distance one
        self.share = np.array(
            [
                1 / (len(k.options) - 1) if k.ordered else 0.5
                for k, t in zip(domain.knobs, self.tables, strict=True)
                for _ in range(t.shape[1])
            ]
        )

    def rows(self, genomes: Iterable[Genome]) -> Array:
        """Rows of genomes, `[genomes, places]`."""
        places = np.array(list(genomes), dtype=int).reshape(-1, self.knobs)
        return np.concatenate([table[places[:, i]] for i, table in enumerate(self.tables)], axis=1)

    def distances(self, one: Array, other: Array) -> Array:
        """Distances from 0 to 1 of each knob's options, `[one, other, knobs]`."""
        found = np.zeros((len(one), len(other), self.knobs))
        for place, owner in enumerate(self.owner):
            found[:, :, owner] += self.share[place] * (one[:, None, place] != other[None, :, place])
        return found

    def weighted(self, one: Array, other: Array, weights: Array) -> Array:
        """Distances summed over knobs with weights, `[one, other]`, as one product of matrices."""
        each = self.share * weights[self.owner]
        cross = (one * each) @ other.T
        return np.asarray((one @ each)[:, None] + (other @ each)[None] - 2 * cross)


class Scores:
    """Values turned into normal scores by their order, equals alike, and back; below the smallest it goes on as the
    tail does.
    """

    def __init__(self, values: Array) -> None:
        self._values, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        self._scores = ndtri((counts.cumsum() - counts / 2) / len(values))
        self.scores = self._scores[place]
        last = min(max(1, int(len(counts) * TAIL)), len(counts) - 1)
        run = self._scores[last] - self._scores[0]
        self._slope = (self._values[last] - self._values[0]) / run if run > 0 else 0.0

    def back(self, scores: Array) -> Array:
        """Values of scores."""
        below = np.minimum(scores - self._scores[0], 0.0) * self._slope
        return np.asarray(np.interp(scores, self._scores, self._values) + below)


class Predictor:
    """A Gaussian process over genomes that learns which knobs matter, alone and together.

        k(g, h) = exp(-sum_i w_i d_i(g, h)) + sum_i v_i (1 - d_i(g, h)) + noise [g = h]

    d_i is the distance of the options of knob i; w, v and the noise are those of the largest likelihood under a weak
    prior, the scale is worked out. Values are fitted as normal scores, so that only their order and the spacing near
    a prediction count.

    >>> from trimtab.core.knob import Knob
    >>> line = Domain(tuple(Knob(f"k{i}", (0, 1, 2)) for i in range(3)))
    >>> some = [(0, 0, 0), (2, 2, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (1, 1, 1), (0, 1, 2), (2, 1, 0)]
    >>> fitted = Predictor(line, some, [float(sum(g)) for g in some])
    >>> low, high = fitted.mean([(1, 0, 0), (2, 2, 1)])
    >>> bool(low < high)
    True
    """

    STEPS = 25

    def __init__(self, domain: Domain, genomes: Sequence[Genome], values: Sequence[float] | Array) -> None:
        """Fit to genomes and what they scored.

        Raises:
            UserError: fewer than two trials.
        """
        if len(genomes) < 2:
            raise UserError(f"a predictor was asked for with {len(genomes)} trials; it needs at least 2")
        self.encoding, self.scores = Encoding(domain), Scores(np.asarray(values, dtype=float))
        self._rows = self.encoding.rows(genomes)
        far = self.encoding.distances(self._rows, self._rows)
        k, z, eye = self.encoding.knobs, self.scores.scores, np.eye(len(genomes))

        def kernel(theta: Array) -> tuple[Array, Array, Array]:
            w, v = np.exp(theta[:k]), np.exp(theta[k : 2 * k])
            together, alone = np.exp(-far @ w), v.sum() - far @ v
            return together + alone + np.exp(theta[-1]) * eye, together, alone

        def loss(theta: Array) -> tuple[float, Array]:
            full, together, _ = kernel(theta)
            lower = cholesky(full, lower=True)
            inverse = cho_solve((lower, True), eye)
            weights = inverse @ z
            energy = max(float(z @ weights), 1e-12)
            pull = inverse - np.outer(weights, weights) * len(z) / energy
            w, v = np.exp(theta[:k]), np.exp(theta[k : 2 * k])
            slopes = np.concatenate(
                [
                    -0.5 * w * np.einsum("ab,abk->k", pull * together, far),
                    0.5 * v * (pull.sum() - np.einsum("ab,abk->k", pull, far)),
                    [0.5 * np.exp(theta[-1]) * np.trace(pull)],
                ]
            )
            value = 0.5 * len(z) * np.log(energy / len(z)) + np.log(np.diag(lower)).sum()
            return float(value + 0.05 * ((theta + 1) ** 2).sum()), slopes + 0.1 * (theta + 1)

        starts = [np.concatenate([np.full(k, a), np.full(k, b), [c]]) for a, b, c in ((-1.6, -3, -3.5), (-0.2, -1, -2))]
        start = min(starts, key=lambda theta: loss(theta)[0])
        bounds = [(-7.0, 2.0)] * (2 * k) + [(-7.0, 1.0)]
        theta = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": self.STEPS}).x
        self._together, self._alone = np.exp(theta[:k]), np.exp(theta[k : 2 * k])
        self._noise = float(np.exp(theta[-1]))
        self._lower = cholesky(kernel(theta)[0], lower=True)
        self._weights = cho_solve((self._lower, True), z)
        self._scale = float(z @ self._weights) / len(z)

    def _against(self, genomes: Iterable[Genome]) -> Array:
        rows = self.encoding.rows(genomes)
        together = np.exp(-self.encoding.weighted(rows, self._rows, self._together))
        return np.asarray(together + self._alone.sum() - self.encoding.weighted(rows, self._rows, self._alone))

    def mean(self, genomes: Iterable[Genome]) -> Array:
        """The middle of what is expected of genomes, in the values' unit."""
        return self.scores.back(self._against(genomes) @ self._weights)

    def samples(self, genomes: Sequence[Genome]) -> Array:
        """Seven equally likely values of each genome, in order, `[genomes, 7]`."""
        near = self._against(genomes)
        seen = solve_triangular(self._lower, near.T, lower=True)
        spread = np.maximum(1 + self._alone.sum() - (seen**2).sum(0), 1e-9) + self._noise
        deviation = np.sqrt(self._scale * spread)
        return self.scores.back((near @ self._weights)[:, None] + deviation[:, None] * NODES[None])


class Ridge:
    """Straight lines through rows of features, whose weights are held small: the plainest predictor."""

    def __init__(self, rows: Array, values: Array, hold: float = 1.0) -> None:
        self._mean, self._middle = rows.mean(0), float(np.mean(values))
        centred = rows - self._mean
        gram = centred.T @ centred + hold * np.eye(rows.shape[1])
        self._weights = np.linalg.solve(gram, centred.T @ (values - self._middle))

    def mean(self, rows: Array) -> Array:
        """What is expected of rows."""
        return np.asarray((rows - self._mean) @ self._weights + self._middle)


class Concord:
    """How well one order agrees with another: Kendall's tau-b, and the 95 % interval over redrawn items.

    >>> Concord([1, 2, 3, 4], [1, 2, 4, 3]).tau
    0.6666666666666666
    """

    def __init__(self, one: Sequence[float] | Array, other: Sequence[float] | Array) -> None:
        self._signs = [np.sign(np.subtract.outer(np.asarray(x, float), np.asarray(x, float))) for x in (one, other)]
        self.tau = self._tau(np.arange(len(self._signs[0])))

    def _tau(self, chosen: NDArray[np.intp]) -> float:
        a, b = (signs[np.ix_(chosen, chosen)] for signs in self._signs)
        below = np.sqrt((a**2).sum() * (b**2).sum())
        return float((a * b).sum() / below) if below else 0.0

    @cached_property
    def interval(self) -> tuple[float, float]:
        """The middle 95 % of 400 redrawings."""
        rng, n = np.random.default_rng(0), len(self._signs[0])
        drawn = [self._tau(rng.integers(0, n, n)) for _ in range(400)]
        low, high = np.quantile(drawn, (0.025, 0.975))
        return float(low), float(high)
