"""What allocators share: the table as arrays, limits and refusals, hulls, the fill, the exact programme, ladders.

A plan is an integer array `[units]`: the index of the chosen row of each unit. Costs are arrays `[units, rows]`, padded
with infinity where a unit has fewer rows than the widest. Sums are exact (`math.fsum`), so "within the limit" means
within it, to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, inf, isnan
from time import monotonic
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import BudgetError, UserError
from trimtab.core.table import Row

Plan = NDArray[np.intp]
COSTS = ("bytes", "seconds", "damage")
_EXTREME = {
    "bytes": "the smallest plan is",
    "seconds": "the fastest plan takes",
    "damage": "the least damaging plan does",
}
_UNITS = {
    "bytes": ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "seconds": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")),
    "damage": ((1.0, "nats"),),
}


class Measure(Protocol):
    """End-to-end damage of a plan, in the unit of `Row.damage`, on the search data.

    `samples` is the number of calibration tokens to use, at most; None means all of them. Equal arguments must give
    equal results.
    """

    def __call__(self, choice: Mapping[str, Row], samples: int | None = None) -> float: ...


@dataclass(frozen=True)
class Menu:
    """The table, grouped by unit in order of first appearance.

    Fields:
        units: names of the units.
        rows: the rows of each unit; rows of infinite damage are left out, since no plan may take them.
    """

    units: tuple[str, ...]
    rows: tuple[tuple[Row, ...], ...]

    @cached_property
    def _costs(self) -> dict[str, NDArray[np.float64]]:
        width = max(map(len, self.rows))
        return {
            name: np.array(
                [[float(getattr(row, name)) for row in rows] + [inf] * (width - len(rows)) for rows in self.rows]
            )
            for name in COSTS
        }

    @cached_property
    def index(self) -> Plan:
        """`0 .. units - 1`, to pick one row of each unit."""
        return np.arange(len(self.units))

    def cost(self, name: str) -> NDArray[np.float64]:
        """Costs of that name, `[units, rows]`."""
        return self._costs[name]

    def total(self, plan: Plan, name: str) -> float:
        """Exact sum of that cost over the rows of a plan."""
        return fsum(self.cost(name)[self.index, plan].tolist())

    def least(self, name: str) -> float:
        """Least sum of that cost over all plans."""
        return fsum(self.cost(name).min(axis=1).tolist())

    def fits(self, plan: Plan, limits: Mapping[str, float]) -> bool:
        """Whether every limited cost of the plan is within its limit."""
        return all(self.total(plan, name) <= limit for name, limit in limits.items())

    def chosen(self, plan: Plan) -> dict[str, Row]:
        """The rows of a plan by unit."""
        return {unit: rows[at] for unit, rows, at in zip(self.units, self.rows, plan.tolist(), strict=True)}


def open_menu(
    rows: Sequence[Row], limits: Mapping[str, float], most: int = len(COSTS), who: str = ""
) -> tuple[Menu, dict[str, float]]:
    """The table as a menu and the limits that can bind, after every check that needs no search.

    Args:
        rows: the table.
        limits: largest allowed sum by cost name; an infinite limit is none.
        most: how many limits the method `who` can keep at once.

    Raises:
        UserError: an empty table, a cost that is not a number, an unknown cost name, or more limits than the method can
            keep.
        BudgetError: a limit that no plan meets even when it stands alone.
    """
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        bad = [name for name in COSTS if isnan(getattr(row, name)) or (name != "damage" and getattr(row, name) == inf)]
        if bad:
            costs = ", ".join(f"{name} = {getattr(row, name)}" for name in bad)
            raise UserError(f"{row.unit}: the row {row.choice!r} has {costs}; measure it again or leave it out")
        offers = grouped.setdefault(row.unit, [])
        if row.damage < inf:
            offers.append(row)
    if not grouped:
        raise UserError("the table of choices is empty, so there is nothing to allocate; give a row for each unit")
    for unit, offers in grouped.items():
        if not offers:
            raise UserError(f"{unit}: every row has infinite damage; offer a choice that leaves the model usable")
    for name, limit in limits.items():
        if name not in COSTS or isnan(limit):
            raise UserError(f"a limit of {limit} on {name!r} was asked; limits are numbers on {', '.join(COSTS)}")
    binding = {name: float(limit) for name, limit in limits.items() if limit < inf}
    if len(binding) > most:
        known = f"{most} limit{'s' * (most > 1)}"
        raise UserError(f"{who} keeps at most {known}, {len(binding)} were asked ({', '.join(binding)}); use milp")
    menu = Menu(tuple(grouped), tuple(map(tuple, grouped.values())))
    for name, limit in binding.items():
        if menu.least(name) > limit:
            raise refusal(name, limit, menu.least(name))
    return menu, binding


def objective(limits: Mapping[str, float]) -> str:
    """What to minimise: damage, or bytes where damage is limited and bytes are not."""
    return "bytes" if "damage" in limits and "bytes" not in limits else "damage"


def human(name: str, *values: float) -> list[str]:
    """Costs in units that people read, with just enough digits that different values look different.

    >>> human("bytes", 1_000_000, 2_340_000), human("bytes", 1_000_000, 1_000_001), human("seconds", 0.0021)
    (['1.0 MB', '2.3 MB'], ['1.000000 MB', '1.000001 MB'], ['2.1 ms'])
    """

    def one(value: float, digits: int) -> str:
        if name == "damage":
            return f"{value:.{digits + 2}g} nats"
        scale, unit = next((pair for pair in _UNITS[name] if abs(value) >= pair[0]), _UNITS[name][-1])
        return f"{value / scale:.{digits - (unit == 'B')}f} {unit}"

    texts: list[str] = []
    for digits in range(1, 16):
        texts = [one(value, digits) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def refusal(name: str, asked: float, least: float, within: str = "") -> BudgetError:
    """The error for a limit that cannot be met: which, what was asked, and the least that is possible."""
    ask, floor = human(name, asked, least)
    return BudgetError(
        f"no plan meets the limit on {name}: asked {ask}; {within}{_EXTREME[name]} {floor}. "
        "Raise the limit or offer lower levels"
    )


def joint_refusal(menu: Menu, limits: Mapping[str, float]) -> BudgetError:
    """The error for limits that can each be met, but not together: the first that clashes with those before it."""
    kept: dict[str, float] = {}
    for name, limit in limits.items():
        plan, _ = exact(menu, name, kept)
        if plan is not None and menu.total(plan, name) > limit:
            within = f"within {' and '.join(human(other, value)[0] for other, value in kept.items())} "
            return refusal(name, limit, menu.total(plan, name), within)
        kept[name] = limit
    asked = " and ".join(human(name, value)[0] for name, value in limits.items())
    return BudgetError(f"no plan within {asked} together was found in the time given; raise a limit or the time")


@dataclass(frozen=True)
class Hull:
    """Lower convex hulls of all units, each walked from its cheapest row to its best.

    Fields:
        start: `[units]`: the cheapest row of each unit (the better one at equal cost).
        rows: `[units, steps]`: the row that a step leads to.
        slope: `[units, steps]`: value bought for one unit of cost; falls along a unit; 0 past the hull's end.
    """

    start: Plan
    rows: NDArray[np.intp]
    slope: NDArray[np.float64]


def hull(cost: NDArray[np.float64], value: NDArray[np.float64]) -> Hull:
    """Lower convex hulls of the points (cost, value), all units at once: each step takes the steepest fall in value.

    Args:
        cost: `[units, rows]`, infinity where there is no row.
        value: `[units, rows]`, what is to be made small.

    >>> import numpy as np
    >>> found = hull(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[9.0, 8.0, 3.0, 2.0]]))
    >>> found.start, found.rows, found.slope
    (array([0]), array([[2, 3]]), array([[3., 1.]]))
    """
    index = np.arange(len(cost))
    here = np.where(cost == cost.min(axis=1, keepdims=True), value, inf).argmin(axis=1)
    start, rows, slopes, last = here, [], [], np.full(len(cost), inf)
    while True:
        extra, fall = cost - cost[index, here][:, None], value[index, here][:, None] - value
        better = (extra > 0) & (fall > 0)
        if not better.any():
            break
        slope = np.where(better, fall / np.where(better, extra, 1.0), 0.0)
        top = slope.max(axis=1)
        there = np.where(better & (slope == top[:, None]), extra, -inf).argmax(axis=1)
        here = np.where(top > 0, there, here)
        last = np.minimum(last, top)
        rows.append(here)
        slopes.append(last)
    shape = (-1, len(cost))
    return Hull(start, np.array(rows, np.intp).reshape(shape).T, np.array(slopes, float).reshape(shape).T)


def fill(menu: Menu, plan: Plan, goal: str, limits: Mapping[str, float]) -> Plan:
    """Spend what is left of the limits: each time the change of one unit that fits and buys most for its share.

    Args:
        plan: a plan within the limits; the result is within them too and never worse.
        goal: name of the cost to make small.
    """
    value, plan = menu.cost(goal), plan.copy()
    units, rows = np.nonzero(np.isfinite(value))
    barred = np.zeros(len(units), dtype=bool)
    while True:
        gain = (value[menu.index, plan])[units] - value[units, rows]
        allowed, share = (gain > 0) & ~barred, np.zeros(len(units))
        for name, limit in limits.items():
            cost, left = menu.cost(name), limit - menu.total(plan, name)
            extra = cost[units, rows] - (cost[menu.index, plan])[units]
            allowed &= extra <= left
            share += np.where(extra <= left, np.maximum(extra, 0.0), 0.0) / (left if left > 0 else 1.0)
        if not allowed.any():
            return plan
        free = allowed & (share == 0)
        rate = gain if free.any() else gain / np.where(share > 0, share, 1.0)
        rate = np.where(free if free.any() else allowed, rate, -inf)
        trial, best = plan.copy(), int(rate.argmax())
        trial[units[best]] = rows[best]
        if menu.fits(trial, limits):
            plan = trial
        else:  # the differences above are rounded, the sums are not
            barred[best] = True


def exact(
    menu: Menu, goal: str, limits: Mapping[str, float], gap: float = 0.0, time_limit: float = 60.0
) -> tuple[Plan | None, bool]:
    """The plan of least goal within the limits, by branch and bound (HiGHS), and whether the answer is proven.

    minimise sum_ur v_ur x_ur  such that  sum_r x_ur = 1 for each unit u,  sum_ur c_ur x_ur <= limit for each limited
    cost,  x binary

    HiGHS keeps its rows only to a tolerance. A plan that is over a limit by less than that is cut off (no plan whose
    every row costs at least as much can fit either), and the programme is solved again, so the answer is exact in the
    sums that `Menu.total` gives.

    Args:
        gap: relative gap at which to stop, as a share of the goal in excess of every unit's least.
        time_limit: seconds in all.

    Returns:
        The plan, or None; and True if it is proven best to within the gap (with None: proven that there is no plan).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    offered = np.isfinite(menu.cost("bytes"))
    units, rows = np.nonzero(offered)
    count, size = len(menu.units), len(units)
    ones = csr_array((np.ones(size), (units, np.arange(size))), shape=(count, size))

    def excess(name: str) -> tuple[NDArray[np.float64], float, float]:
        cost = menu.cost(name)
        over = (cost - cost.min(axis=1, keepdims=True))[units, rows]
        largest = float(over.max())
        return over, menu.least(name), 1e4 / largest if largest > 0 else 1.0

    value, _, scale = excess(goal)
    constraints: list[Any] = [LinearConstraint(ones, 1, 1)]
    for name, limit in limits.items():
        over, least, factor = excess(name)
        constraints.append(LinearConstraint(over[None] * factor, -inf, (limit - least) * factor))
    end = monotonic() + time_limit
    while (left := end - monotonic()) > 0:
        found: Any = milp(
            value * scale,
            integrality=np.ones(size),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": gap, "time_limit": left},
        )
        if found.x is None:
            return None, found.status == 2
        weight = np.full(offered.shape, -inf)
        weight[units, rows] = found.x
        plan = weight.argmax(axis=1)
        broken = [name for name, limit in limits.items() if menu.total(plan, name) > limit]
        if not broken:
            return plan, found.status == 0
        for name in broken:
            cost = menu.cost(name)
            dearer = (cost >= cost[menu.index, plan][:, None])[units, rows]
            constraints.append(LinearConstraint(dearer.astype(float)[None], -inf, count - 1))
    return None, False


def ladder(menu: Menu, levels: Sequence[str] = ()) -> list[Plan]:
    """Uniform plans, one a level, from the dearest in bytes to the cheapest.

    Args:
        levels: texts of the choices to use; () for every choice that all units offer and that is not beaten by a
            smaller one. A unit that does not offer a named level takes its own row nearest to it in bytes a weight.

    Raises:
        UserError: a level that no unit offers, or no choice that all units offer.
    """
    offers = [{row.choice: at for at, row in reversed(list(enumerate(rows)))} for rows in menu.rows]
    if not levels:
        common = [choice for choice in offers[0] if all(choice in offer for offer in offers)]
        if not common:
            raise UserError("no choice is offered by every unit; name the levels to use")
        plans = [np.array([offer[choice] for offer in offers]) for choice in common]
        plans.sort(key=lambda plan: (menu.total(plan, "bytes"), menu.total(plan, "damage")))
        kept: list[Plan] = []
        for plan in plans:
            if not kept or menu.total(plan, "damage") < menu.total(kept[-1], "damage"):
                kept.append(plan)
        return kept[::-1]
    plans = []
    for level in levels:
        holders = [rows[offer[level]] for rows, offer in zip(menu.rows, offers, strict=True) if level in offer]
        if not holders:
            known = sorted({choice for offer in offers for choice in offer})
            raise UserError(f"no unit offers the level {level!r}; the table has {', '.join(known)}")
        rate = sum(row.bytes for row in holders) / max(1, sum(row.weights for row in holders))
        distance = [[abs(row.bytes / max(1, row.weights) - rate) for row in rows] for rows in menu.rows]
        nearest = [far.index(min(far)) for far in distance]
        plans.append(np.array([offer.get(level, near) for offer, near in zip(offers, nearest, strict=True)]))
    return sorted(plans, key=lambda plan: -menu.total(plan, "bytes"))


def lowered(rungs: Sequence[Plan], order: Sequence[int], steps: int) -> Plan:
    """The plan so many steps down a ladder: from all units at the top, one unit a step, in that order, rung by rung."""
    rung, part = divmod(steps, len(order))
    plan = rungs[rung].copy()
    if part:
        plan[list(order[:part])] = rungs[rung + 1][list(order[:part])]
    return plan


def enclosing(values: Mapping[str, Any], unit: str, missing: float = inf) -> float:
    """The value of a unit, or of the nearest path that encloses it, or `missing`.

    >>> enclosing({"blocks.1": 0.5}, "blocks.1.mlp.up"), enclosing({"blocks.1": 0.5}, "blocks.11")
    (0.5, inf)
    """
    path = unit
    while path not in values and "." in path:
        path = path.rpartition(".")[0]
    return float(values.get(path, missing))


def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether a point is no worse in every cost; of equal points the one with the smaller last entry, its index, is.

    >>> beats((1.0, 2.0, 0), (1.0, 3.0, 1)), beats((1.0, 2.0, 1), (1.0, 2.0, 0))
    (True, False)
    """
    if one[:-1] == other[:-1]:
        return one[-1] < other[-1]
    return all(a <= b for a, b in zip(one[:-1], other[:-1], strict=True))
