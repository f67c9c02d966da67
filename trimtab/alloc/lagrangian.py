"""The baseline allocator: convex hulls and one multiplier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.core.method import Allocator, Card
from trimtab.core.table import Row
from trimtab.parts.budgeting import Menu, Plan, exact, fill, hull, joint_refusal, objective, open_menu


@dataclass(frozen=True)
class Lagrangian(Allocator):
    """Take in each unit the row of least damage + lambda * cost, with the least lambda that keeps the limit; then fill.

    min_x max_lambda>=0  sum_u D_u(x_u) + lambda (sum_u C_u(x_u) - limit)
    As lambda falls, each unit walks its own lower convex hull of (C, D) from the cheapest row to the best. The places
    where something changes are the slopes of the hulls' steps, so the steps of all units are sorted by slope and the
    bisection on lambda becomes a search in their running cost. What is left of the limit is then filled greedily. With
    two limits, C is a mixture w C1 / s1 + (1 - w) C2 / s2 of the two (s = limit less the least possible), tried for
    several w.

    With one limit the result is within the largest single hull step of the optimum: D <= D_optimal + max over steps of
        (D_from - D_to),
    since the relaxed optimum takes at most one step in part. Never over a limit.

    Fields:
        mixes: number of mixtures w, evenly spaced from 0 to 1, that are tried where there are two limits.

    Args of `allocate`:
        rows: the table; limits: largest sum by cost name ("bytes", "seconds", "damage"), at most two.

    Raises:
        BudgetError: no plan meets the limits. UserError: more than two limits, or a table that is not one.

    Reference: Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Trans. ASSP
        36(9); Everett 1963, Operations Research 11(3), for the multiplier; Sinha and Zoltners 1979, Operations Research
        27(3), for the hulls.
    Departures: the greedy fill at the end, and mixtures for a second limit. Where no mixture meets both limits, the
        exact programme decides whether a plan exists.

    >>> a = [Row("a", "8b", 8, 0.0, 0.1), Row("a", "4b", 4, 0.0, 0.5)]
    >>> b = [Row("b", "8b", 8, 0.0, 0.1), Row("b", "4b", 4, 0.0, 0.9)]
    >>> {unit: row.choice for unit, row in Lagrangian().allocate(a + b, {"bytes": 13}).items()}
    {'a': '4b', 'b': '8b'}
    """

    mixes: int = 17

    card = Card(
        "lagrangian",
        paper="Shoham and Gersho 1988",
        claim="Within one hull step of the exact optimum, in milliseconds.",
        keeps=frozenset({"deterministic"}),
    )

    def allocate(self, rows: list[Row], limits: Mapping[str, float]) -> dict[str, Row]:
        menu, limits = open_menu(rows, limits, most=2, who="lagrangian")
        goal = objective(limits)
        swept = [_sweep(menu, cost, goal, limits) for cost in self._mixtures(menu, limits)]
        found = [plan for plan in swept if plan is not None]
        if not found:
            plan, _ = exact(menu, goal, limits)
            if plan is None:
                raise joint_refusal(menu, limits)
            found = [plan]
        filled = [fill(menu, plan, goal, limits) for plan in found]
        return menu.chosen(min(filled, key=lambda plan: menu.total(plan, goal)))

    def _mixtures(self, menu: Menu, limits: Mapping[str, float]) -> list[NDArray[np.float64]]:
        if len(limits) < 2:
            return [menu.cost(next(iter(limits)))] if limits else [np.zeros_like(menu.cost("bytes"))]
        scaled = []
        for name, limit in limits.items():
            cost = menu.cost(name)
            excess = cost - cost.min(axis=1, keepdims=True)
            widest = excess[np.isfinite(excess)].max()
            scaled.append(excess / max(limit - menu.least(name), 1e-9 * widest, np.finfo(float).tiny))
        return [_blend(w, *scaled) for w in np.linspace(0, 1, self.mixes)]


def _blend(w: float, first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    return first if w == 1 else second if w == 0 else w * first + (1 - w) * second


def _sweep(menu: Menu, cost: NDArray[np.float64], goal: str, limits: Mapping[str, float]) -> Plan | None:
    """The longest run of hull steps, steepest first, that ends within the limits; None where no run does."""
    if not limits:
        return menu.cost(goal).argmin(axis=1)
    hulls = hull(cost, menu.cost(goal))
    units, steps = np.nonzero(hulls.slope > 0)
    order = np.argsort(-hulls.slope[units, steps], kind="stable")
    units, steps = units[order], steps[order]
    rows = hulls.rows[units, steps]
    path = np.concatenate([hulls.start[:, None], hulls.rows], axis=1)
    origin = path[units, steps]
    fits = np.ones(len(units) + 1, dtype=bool)
    for name, limit in limits.items():
        change = menu.cost(name)[units, rows] - menu.cost(name)[units, origin]
        running = menu.total(hulls.start, name) + np.concatenate([[0.0], np.cumsum(change)])
        fits &= running <= limit
    for taken in np.nonzero(fits)[0][::-1]:
        plan = hulls.start.copy()
        plan[units[:taken]] = rows[:taken]
        if menu.fits(plan, limits):
            return plan
    return None
