"""Rate-distortion allocation by dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, gcd, inf

import numpy as np
from numpy.typing import NDArray

from trimtab.core.method import Allocator, Card
from trimtab.core.table import Row
from trimtab.parts.budgeting import Plan, fill, objective, open_menu


@dataclass(frozen=True)
class RDPrune(Allocator):
    """Share out one budget by dynamic programming over units, taking damages as additive; exact up to the bin.

    g_u(b) = min over rows r of unit u with C_ur <= b of  D_ur + g_(u-1)(b - C_ur),   g_0 = 0;   the plan is traced back
    from g_U(limit) b counts bins of cost in excess of every unit's cheapest row, rounded up, so a plan is never over
    the limit. Let s be the limit less the least possible cost. Where costs are whole numbers and their greatest common
    divisor goes into s at most `bins` times, a bin is that divisor and the result is exact. Elsewhere a bin is s /
    bins, and the damage is at most the optimum of the limit less one bin a unit.
    Time: units * rows * bins; memory: one index for each unit and bin.

    Fields:
        bins: largest number of bins; the paper counts single weights.

    Args of `allocate`:
        rows: the table; `damage` is the distortion D of the paper (of the model's output with only that unit changed),
            the limited cost is its rate; limits: one limit. If that is "damage", the roles change: least bytes, with
            damage in bins.

    Raises:
        BudgetError: no plan meets the limit. UserError: more than one limit.

    Reference: Xu et al. 2023, arXiv:2308.10438: the additivity of output distortions, and the recursion over layers.
    Departures: the budget is in bins of any cost, not in single weights; ratios are rows of a table, so any level can
        take part; units may be of any kind and in any order (the paper sorts layers by size); what rounding leaves over
        is filled greedily.

    >>> a = [Row("a", "8b", 8, 0.0, 0.1), Row("a", "4b", 4, 0.0, 0.5)]
    >>> b = [Row("b", "8b", 8, 0.0, 0.1), Row("b", "4b", 4, 0.0, 0.9)]
    >>> {unit: row.choice for unit, row in RDPrune().allocate(a + b, {"bytes": 12}).items()}
    {'a': '4b', 'b': '8b'}
    """

    bins: int = 16384

    card = Card(
        "rd-prune",
        catalogue=(233,),
        paper="arXiv:2308.10438",
        claim="Ratios from the dynamic programme beat uniform and global-magnitude ratios at equal sparsity.",
        keeps=frozenset({"deterministic"}),
    )

    def allocate(self, rows: list[Row], limits: Mapping[str, float]) -> dict[str, Row]:
        menu, limits = open_menu(rows, limits, most=1, who="rd-prune")
        goal = objective(limits)
        if not limits:
            return menu.chosen(menu.cost(goal).argmin(axis=1))
        ((name, limit),) = limits.items()
        steps, capacity = self._discretise(menu.cost(name), limit - menu.least(name))
        plan = trace(steps, menu.cost(goal), capacity)
        while not menu.fits(plan, limits):  # seconds are rounded sums: give back a bin
            capacity -= 1
            plan = trace(steps, menu.cost(goal), capacity)
        return menu.chosen(fill(menu, plan, goal, limits))

    def _discretise(self, cost: NDArray[np.float64], slack: float) -> tuple[NDArray[np.float64], int]:
        excess = cost - cost.min(axis=1, keepdims=True)
        finite = excess[np.isfinite(excess)]
        slack = min(slack, float(np.where(np.isfinite(excess), excess, 0.0).max(axis=1).sum()))
        if slack <= 0:
            return np.where(excess > 0, 1.0, 0.0), 0
        if (finite == np.floor(finite)).all() and floor(slack / (step := gcd(*map(int, finite.tolist())))) <= self.bins:
            return excess / step, floor(slack / step)
        return np.maximum(np.ceil(excess / slack * self.bins), excess > 0), self.bins


def trace(steps: NDArray[np.float64], value: NDArray[np.float64], capacity: int) -> Plan:
    """The plan of least total value whose steps sum to at most the capacity.

    Args:
        steps: `[units, rows]`: whole numbers >= 0, with a 0 in each unit; infinity where there is no row.
        value: `[units, rows]`: what is added up and made small.
        capacity: number of bins.
    """
    units, width = steps.shape
    best = np.zeros(capacity + 1)
    taken = np.zeros((units, capacity + 1), dtype=np.min_scalar_type(width))
    for unit in range(units):
        fresh = np.full(capacity + 1, inf)
        for row in np.nonzero(steps[unit] <= capacity)[0]:
            step = int(steps[unit, row])
            trial = best[: capacity + 1 - step] + value[unit, row]
            wins = trial < fresh[step:]
            fresh[step:][wins] = trial[wins]
            taken[unit, step:][wins] = row
        best = fresh
    plan, left = np.zeros(units, dtype=np.intp), capacity
    for unit in reversed(range(units)):
        plan[unit] = taken[unit, left]
        left -= int(steps[unit, plan[unit]])
    return plan
