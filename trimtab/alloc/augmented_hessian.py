"""Bisection over a sensitivity ranking that knows of interactions between layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from trimtab.core.errors import BudgetError, UserError
from trimtab.core.method import Allocator, Card
from trimtab.core.table import Row
from trimtab.parts.budgeting import Measure, Plan, enclosing, ladder, lowered, objective, open_menu, refusal


@dataclass(frozen=True)
class AugmentedHessian(Allocator):
    """Rank units by second-order damage plus a share of pairwise damage, then bisect for the most low-bit units.

    s_u = trace_u + coupling * sum over v of pairs_uv. With coupling 1/2 the sum of s over a set of units is, to second
    order and with only pairs inside the set counted, what the model loses when the whole set is low: sum_u d_u' H_uu
    d_u / 2 + sum_(u<v) d_u' H_uv d_v. The least sensitive units are lowered first. For each level from the dearest to
    the cheapest, bisection finds the largest number k of units (of those lowered at the level before) that can go to
    this level within the limit on damage: ceil(log2(n + 1)) measurements a level, plus one for the undamaged plan.

    Fields:
        coupling: weight of the pairwise terms; 0: the plain Hessian ranking.
        levels: texts of the levels, in any order; (): every level that all units offer and that no smaller one beats.

    Args of `allocate`:
        rows: the table.
        limits: "damage": the most that `measure` may say; the result is the most lowered plan found. "bytes" or
            "seconds": the least lowered plan along the ranking that is within them, and no measurement is needed; with
            "damage" beside "bytes", that plan is measured.
        trace: {unit or enclosing path: tr(H_uu) / n_u * ||Q(w_u) - w_u||^2 / 2}: the Hessian's mean diagonal
            (Hutchinson's estimate) times half the squared change of the weights at the low level, in nats. A unit
            without a value is lowered last.
        pairs: {(unit, unit): damage with both low - damage with the first low - damage with the second low}, in nats,
            each pair once in either order; absent pairs count 0; None: none.
        measure: callable `measure({unit: Row}) -> damage` of the whole model, all data. None: the sum of the rows'
            damages.

    Raises:
        BudgetError: a limit is broken even by the highest levels (damage) or the lowest ones (bytes, seconds).
        UserError: no trace, a pair of unknown units, or a level that no unit offers.

    Reference: Schaefer et al. 2023, arXiv:2306.04879.
    Departures: the paper's text beyond its abstract was not at hand, so the form of the pairwise term (half of each
        pair's measured interaction to either side, in the unit of the trace term) is ours, derived from the
        second-order expansion above. Measured damage is taken to rise with the number of lowered units; where it does
        not, the result still meets the limit but may not be the last that does.

    >>> table = [Row(unit, level, size, 0.0, 0.1) for unit in "abc" for level, size in (("8b", 8), ("4b", 4))]
    >>> table = [Row(r.unit, r.choice, r.bytes, 0.0, 0.0 if r.choice == "8b" else 0.1) for r in table]
    >>> method = AugmentedHessian()
    >>> found = method.allocate(table, {"damage": 0.15}, trace={"a": 0.1, "b": 0.2, "c": 0.3}, pairs={("a", "b"): 0.9})
    >>> {unit: row.choice for unit, row in found.items()}
    {'a': '8b', 'b': '8b', 'c': '4b'}
    """

    coupling: float = 0.5
    levels: tuple[str, ...] = ()

    card = Card(
        "augmented-hessian",
        catalogue=(200,),
        paper="arXiv:2306.04879",
        claim="At equal mean bits, at least the accuracy of Hessian-only and random orders, in O(log n) measurements.",
        keeps=frozenset({"deterministic"}),
    )

    def allocate(
        self,
        rows: list[Row],
        limits: Mapping[str, float],
        *,
        trace: Mapping[str, float | Tensor],
        pairs: Mapping[tuple[str, str], float | Tensor] | None = None,
        measure: Measure | None = None,
    ) -> dict[str, Row]:
        costs = {name: limit for name, limit in limits.items() if name != "damage"}
        menu, costs = open_menu(rows, costs)
        cap = float(limits.get("damage", float("inf")))
        rungs = ladder(menu, self.levels)
        sensitivity = self._sensitivity(menu.units, trace, pairs or {})
        order = sorted(range(len(sensitivity)), key=sensitivity.__getitem__)

        def damage(plan: Plan) -> float:
            return menu.total(plan, "damage") if measure is None else float(measure(menu.chosen(plan)))

        if objective(limits) == "bytes":
            plan = self._most_lowered(rungs, order, cap, damage)
            if not menu.fits(plan, costs):
                raise BudgetError(
                    f"augmented-hessian: the most lowered plan within {cap:.4g} nats is still over the limit on "
                    f"{', '.join(costs)}; raise a limit or offer lower levels"
                )
            return menu.chosen(plan)
        depth = range(len(order) * (len(rungs) - 1) + 1)
        fitting = next((plan for steps in depth if menu.fits(plan := lowered(rungs, order, steps), costs)), None)
        if fitting is None:
            name = next(name for name, limit in costs.items() if menu.total(rungs[-1], name) > limit)
            raise refusal(name, costs[name], menu.total(rungs[-1], name), within="with these levels ")
        if cap < float("inf") and not (found := damage(fitting)) <= cap:
            raise refusal("damage", cap, found, within=f"within the limit on {' and '.join(costs)} ")
        return menu.chosen(fitting)

    def _sensitivity(
        self,
        units: tuple[str, ...],
        trace: Mapping[str, float | Tensor],
        pairs: Mapping[tuple[str, str], float | Tensor],
    ) -> list[float]:
        if not trace:
            raise UserError("augmented-hessian ranks by Hessian traces and was given none; give `trace` for the units")
        total = {unit: enclosing(trace, unit) for unit in units}
        for pair, value in pairs.items():
            for unit in pair:
                if unit not in total:
                    raise UserError(f"augmented-hessian: the pair {pair} names {unit!r}, which is not in the table")
                total[unit] += self.coupling * float(value)
        return list(total.values())

    def _most_lowered(self, rungs: list[Plan], order: list[int], cap: float, damage: Callable[[Plan], float]) -> Plan:
        best = rungs[0]
        if not (least := damage(best)) <= cap:
            raise refusal("damage", cap, least, within="with these levels ")
        movable = order
        for rung in rungs[1:]:
            fits, over = 0, len(movable) + 1
            base = best
            while over - fits > 1:
                middle = (fits + over) // 2
                plan = base.copy()
                plan[movable[:middle]] = rung[movable[:middle]]
                if damage(plan) <= cap:
                    fits, best = middle, plan
                else:
                    over = middle
            movable = movable[:fits]
        return best
