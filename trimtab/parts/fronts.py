"""Fronts of several objectives, all to be small: ranks under limits, crowding, hypervolume, and what is still free.

Points are arrays `[points, objectives]`. A point dominates another where it is nowhere larger and somewhere smaller.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import UserError
from trimtab.core.method import Trial

Array = NDArray[np.float64]


def table(trials: Sequence[Trial], names: Sequence[str]) -> Array:
    """Values of trials by name, `[trials, names]`.

    Raises:
        UserError: a trial lacks a value, or it is no number.
    """
    for trial in trials:
        for name in names:
            if name not in trial.values:
                raise UserError(f"trial {trial.genome} has no value {name!r}; it has {', '.join(trial.values)}")
    found = np.array([[trial.values[name] for name in names] for trial in trials], dtype=float)
    if np.isnan(found).any():
        raise UserError(f"a value of {', '.join(names)} is no number; an evaluation that failed is to raise instead")
    return found.reshape(len(trials), len(names))


def excess(values: Mapping[str, Array], limits: Mapping[str, float]) -> Array:
    """By how much limits are broken, summed as shares of each limit; 0 where all are met.

    >>> excess({"ms": np.array([4.0, 6.0])}, {"ms": 5.0}).tolist()
    [0.0, 0.2]
    """
    over = [
        np.maximum(np.asarray(values[name]) - limit, 0.0) / max(abs(limit), 1e-12) for name, limit in limits.items()
    ]
    return np.sum(over, axis=0) if over else np.zeros(0)


def dominates(points: Array, others: Array) -> NDArray[np.bool_]:
    """Whether each point dominates each of the others, `[points, others]`."""
    a, b = points[:, None, :], others[None, :, :]
    return np.asarray((a <= b).all(2) & (a < b).any(2))


def ranks(points: Array, over: Array | None = None) -> NDArray[np.intp]:
    """Place of each point's front, from 0; among points that break limits the one that breaks them less comes first,
    and all of them behind those that break none (Deb et al. 2002, constraint domination).

    >>> ranks(np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), np.array([0.0, 0.0, 0.0, 0.5])).tolist()
    [0, 0, 1, 2]
    """
    over = np.zeros(len(points)) if over is None or not len(over) else over
    beats = dominates(points, points) & (over == 0)[:, None] & (over == 0)[None]
    beats |= over[:, None] < over[None]
    left, place, found = beats.sum(0), 0, np.full(len(points), -1)
    while (found < 0).any():
        front = (left == 0) & (found < 0)
        found[front] = place
        left = left - beats[front].sum(0)
        place += 1
    return found


def front(points: Array) -> NDArray[np.intp]:
    """Indices of the points that no other dominates; of equal points the first.

    >>> front(np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])).tolist()
    [0, 1]
    """
    _, first = np.unique(points, axis=0, return_index=True)
    first = np.sort(first)
    return np.asarray(first[~dominates(points[first], points[first]).any(0)])


def crowding(points: Array) -> Array:
    """Distance of each point's neighbours along each objective, in shares of the range, summed; infinite at ends."""
    found = np.zeros(len(points))
    for column in points.T:
        order = np.argsort(column, kind="stable")
        spread = column[order[-1]] - column[order[0]]
        found[order[[0, -1]]] = np.inf
        if spread > 0:
            found[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
    return found


def hypervolume(points: Array, reference: Array | Sequence[float]) -> float:
    """Volume that the points dominate below a reference point, exactly, by slices of the last objective.

    >>> hypervolume(np.array([[0.0, 0.5], [0.5, 0.0]]), [1.0, 1.0])
    0.75
    """
    corner = np.asarray(reference, dtype=float)
    inside = points[(points < corner).all(1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(corner[0] - inside.min())
    if inside.shape[1] == 2:
        inside = inside[np.lexsort((inside[:, 1], inside[:, 0]))]
        height = np.minimum.accumulate(inside[:, 1])
        above = np.concatenate([corner[1:], height[:-1]])
        return float(((corner[0] - inside[:, 0]) * (above - height)).sum())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    ends = np.append(inside[1:, -1], corner[-1])
    slices = [(end - low, i + 1) for i, (low, end) in enumerate(zip(inside[:, -1], ends, strict=True)) if end > low]
    return float(sum(thick * hypervolume(inside[:n, :-1], corner[:-1]) for thick, n in slices))


class Free:
    """The space below a reference point that a front does not dominate, cut into cells along the front's coordinates.

    The gain of a point whose objectives are independent is a sum over free cells of products of one number an objective
    and edge, E[max(edge - value, 0)], so that what a predictor is unsure of is counted in exactly:

        E[gain] = sum over free cells of prod_j (E[(upper_j - y_j)+] - E[(lower_j - y_j)+])
    """

    def __init__(self, points: Array, reference: Array) -> None:
        points = points[(points < reference).all(1)]
        self.points, self.reference = points[front(points)] if len(points) else points, reference
        self.edges = [np.unique(np.append(self.points[:, j], reference[j])) for j in range(len(reference))]
        lower = [np.append(-np.inf, edge[:-1]) for edge in self.edges]
        taken = np.zeros([len(edge) for edge in self.edges], dtype=bool)
        for point in self.points:
            below = [point[j] <= low for j, low in enumerate(lower)]
            taken |= functools.reduce(np.logical_and.outer, below)
        self.free = (~taken).astype(float)

    def gain(self, samples: Sequence[Array]) -> Array:
        """Expected gain of candidates, given for each objective equally likely values `[candidates, values]`."""
        widths = []
        for edge, drawn in zip(self.edges, samples, strict=True):
            room = np.maximum(edge[None, :, None] - drawn[:, None, :], 0).mean(2)
            widths.append(np.diff(room, axis=1, prepend=0.0))
        left = np.einsum("ci,i...->c...", widths[0], self.free)
        for width in widths[1:]:
            left = np.einsum("ci,ci...->c...", width, left)
        return np.asarray(left)

    def with_point(self, point: Array) -> Free:
        """The space once another point is there."""
        return Free(np.vstack([self.points, point]), self.reference)
