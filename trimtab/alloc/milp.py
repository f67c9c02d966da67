"""The exact allocator: a multiple-choice knapsack as a mixed-integer linear programme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.alloc.lagrangian import Lagrangian
from trimtab.core.errors import BudgetError
from trimtab.core.method import Allocator, Card
from trimtab.core.table import Row
from trimtab.parts.budgeting import exact, joint_refusal, objective, open_menu


@dataclass(frozen=True)
class MILP(Allocator):
    """Choose one row a unit at least total damage within any number of limits, proven best.

    minimise sum_ur D_ur x_ur  such that  sum_r x_ur = 1 for each unit u,  sum_ur C_ur x_ur <= limit for each limited
    cost,  x binary With "damage" limited and "bytes" not, bytes are minimised instead.

    Fields:
        gap: relative gap to the bound at which to stop, as a share of the damage in excess of every unit's least; 0:
            proven best.
        time_limit: seconds for the solver; when they are over, the better of its best plan and the Lagrangian one is
            returned.

    Raises:
        BudgetError: no plan meets the limits, with the one that clashes, what was asked and the least possible.

    Reference: Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", chapter 11; Huangfu and Hall 2018, Math. Prog.
        Comp. 10(1) (HiGHS).
    Departures: plans that are over a limit by less than the solver's tolerance are cut off and the programme is solved
        again.

    >>> a = [Row("a", "8b", 8, 0.0, 0.1), Row("a", "4b", 4, 0.0, 0.5)]
    >>> b = [Row("b", "8b", 8, 0.0, 0.1), Row("b", "4b", 4, 0.0, 0.9)]
    >>> {unit: row.choice for unit, row in MILP().allocate(a + b, {"damage": 0.7}).items()}
    {'a': '4b', 'b': '8b'}
    """

    gap: float = 0.0
    time_limit: float = 60.0

    card = Card(
        "milp",
        paper="Kellerer, Pferschy and Pisinger 2004",
        claim="The least total damage of any plan within the limits.",
        keeps=frozenset({"deterministic"}),
    )

    def allocate(self, rows: list[Row], limits: Mapping[str, float]) -> dict[str, Row]:
        menu, limits = open_menu(rows, limits)
        goal = objective(limits)
        plan, proven = exact(menu, goal, limits, self.gap, self.time_limit)
        if proven and plan is not None:
            return menu.chosen(plan)
        if proven:
            raise joint_refusal(menu, limits)
        found = [] if plan is None else [menu.chosen(plan)]
        if len(limits) <= 2:
            found.append(Lagrangian().allocate(rows, limits))
        if not found:
            raise BudgetError(
                f"no plan was found in {self.time_limit:g} s; give milp a larger time_limit or raise a limit"
            )
        return min(found, key=lambda choice: sum(getattr(row, goal) for row in choice.values()))
