"""Evolutionary search over levels, scored by the damage of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import inf, isnan
from typing import Literal

import numpy as np
import torch

from trimtab.alloc.lagrangian import Lagrangian
from trimtab.core.errors import UserError
from trimtab.core.method import Allocator, Card
from trimtab.core.table import Row
from trimtab.parts.budgeting import Measure, Menu, Plan, beats, ladder, objective, open_menu


@dataclass(frozen=True)
class EvoPress(Allocator):
    """A (1 + lambda) evolutionary search: children switch levels within the budget; most data is spent on the best.

    Each generation: make `offspring` distinct children of the parent by level switches. Keep the `survivors[0]` best of
    them on `samples[0]` tokens, of those the `survivors[1]` best on `samples[1]`, and so on. The parent joins the last
    round, and its winner is the next parent. Hence damage on `samples[-1]` tokens never rises, and the result is never
    worse there than the start.

    A level switch: raise k = min(a, b) random units one level each, a and b uniform in 1 .. `flips`, then lower random
    units one level each until the plan is within every limit. A child with more than `changes` level changes is drawn
    again, and so is one that spends less than the share `refund` of what its lowerings free. The levels of a unit are
    its rows that no other row beats in all limited costs and damage.

    Fields:
        generations: number of generations (paper: 150 for bits, 400 for sparsity).
        offspring: lambda, children a generation (paper: 128 for bits, 64 for sparsity).
        survivors: plans left after each round of selection; the last is 1 (paper: 16, 4, 1 for bits; 8, 2, 1 for
            sparsity).
        samples: calibration tokens of each round (paper: 2048, 16384, 131072 for bits; 65536 in the last for sparsity).
        flips: most units raised in one mutation (paper: 3).
        changes: most level changes of one child, counting each raised unit once and each lowering once (paper's code:
            10).
        refund: least share of the cost freed by lowering that raising spent (paper's code: 0.8).
        start: "uniform" (paper: the best uniform plan that fits; the Lagrangian one where none does) or "lagrangian".

    Args of `allocate`:
        rows: the table; limits: largest sums of "bytes" and "seconds" (one or both); a limit on "damage" cannot be
            kept.
        measure: callable `measure({unit: Row}, samples=tokens) -> damage`, end to end, in the unit of `Row.damage`.
            Equal arguments must give equal results; it is called once for each plan and number of tokens. A damage that
            is not a number counts as infinite.
        rng: generator of every random choice.

    Raises:
        BudgetError: no plan meets the limits. UserError: a limit on damage, or rounds of selection that do not match.

    Reference: Sieberling et al. 2024, arXiv:2410.14649, algorithm 1 and section 3; figures from the authors' released
        scripts.
    Departures: any table of rows with any sizes, where the paper switches levels between layers of equal size (this is
        the rule of its code for layers of unequal size); rounds do not draw fresh tokens each time, so that the promise
        above holds; without a fitting uniform plan the start is the Lagrangian plan, not the best of many random ones.

    >>> table = [Row(unit, f"{n}b", n, 0.0, 1 / n) for unit in "ab" for n in (8, 4)]
    >>> def measure(choice, samples=None):
    ...     return sum(row.damage * (9 if row.unit == "b" else 1) for row in choice.values())
    >>> search = EvoPress(generations=3, offspring=4, survivors=(2, 1), samples=(10, 100))
    >>> found = search.allocate(table, {"bytes": 12}, measure=measure, rng=torch.Generator().manual_seed(0))
    >>> {unit: row.choice for unit, row in found.items()}
    {'a': '4b', 'b': '8b'}
    """

    generations: int = 150
    offspring: int = 128
    survivors: tuple[int, ...] = (16, 4, 1)
    samples: tuple[int, ...] = (2048, 16384, 131072)
    flips: int = 3
    changes: int = 10
    refund: float = 0.8
    start: Literal["uniform", "lagrangian"] = "uniform"

    card = Card(
        "evopress",
        catalogue=(205,),
        paper="arXiv:2410.14649",
        claim="At equal budget, lower perplexity than uniform levels and than levels chosen by local error.",
        keeps=frozenset({"deterministic"}),
    )

    def allocate(
        self, rows: list[Row], limits: Mapping[str, float], *, measure: Measure, rng: torch.Generator
    ) -> dict[str, Row]:
        menu, limits = open_menu(rows, limits)
        self._check(limits)
        parent = self._first(menu, rows, limits)
        space = _Space.of(menu, limits)
        known: dict[tuple[tuple[int, ...], int], float] = {}

        def damage(plan: Plan, samples: int) -> float:
            key = (tuple(plan.tolist()), samples)
            if key not in known:
                value = float(measure(menu.chosen(plan), samples=samples))
                known[key] = inf if isnan(value) else value
            return known[key]

        for _ in range(self.generations):
            pool = self._children(parent, space, rng)
            if not pool:
                break
            for number, (keep, samples) in enumerate(zip(self.survivors, self.samples, strict=True), start=1):
                if number == len(self.survivors):
                    pool.append(parent)
                pool = sorted(pool, key=partial(damage, samples=samples))[:keep]
            parent = pool[0]
        return menu.chosen(parent)

    def _check(self, limits: Mapping[str, float]) -> None:
        if "damage" in limits:
            raise UserError("evopress cannot keep a limit on damage, which it makes small; limit bytes or seconds")
        if len(self.survivors) != len(self.samples) or self.survivors[-1:] != (1,) or min(self.survivors) < 1:
            raise UserError(
                f"evopress: survivors={self.survivors} and samples={self.samples} were given; "
                "they need one entry for each round of selection, and one survivor of the last"
            )
        if self.start not in ("uniform", "lagrangian"):
            raise UserError(f"evopress: start={self.start!r} was given; it is 'uniform' or 'lagrangian'")

    def _first(self, menu: Menu, rows: list[Row], limits: Mapping[str, float]) -> Plan:
        if self.start == "uniform" and set.intersection(*({row.choice for row in offers} for offers in menu.rows)):
            fitting = [plan for plan in ladder(menu) if menu.fits(plan, limits)]
            if fitting:
                return min(fitting, key=lambda plan: menu.total(plan, objective(limits)))
        plan = Lagrangian().allocate(rows, limits)
        return np.array([offers.index(plan[unit]) for unit, offers in zip(menu.units, menu.rows, strict=True)])

    def _children(self, parent: Plan, space: _Space, rng: torch.Generator) -> list[Plan]:
        """Distinct children; fewer than `offspring` where a hundred draws for each do not find as many."""
        children: list[Plan] = []
        seen = {tuple(parent.tolist())}
        for _ in range(100 * self.offspring):
            if len(children) == self.offspring:
                break
            changes = 1 + min(_draw(self.flips, rng), _draw(self.flips, rng))
            raised = parent
            for _ in range(changes):
                raised = space.switched(raised, +1, rng)
            child = raised
            while changes <= self.changes and not space.menu.fits(child, space.limits):
                child = space.switched(child, -1, rng)
                changes += 1
            costs = [[space.menu.total(plan, name) for plan in (parent, raised, child)] for name in space.limits]
            thrifty = child is raised or all(top - old >= self.refund * (top - new) for old, top, new in costs)
            if changes <= self.changes and thrifty and tuple(child.tolist()) not in seen:
                seen.add(tuple(child.tolist()))
                children.append(child)
        return children


def _draw(count: int, rng: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=rng))


@dataclass(frozen=True)
class _Space:
    """Where the search walks: plans of a menu, and for each unit its levels.

    Fields:
        levels: for each unit the rows that no row beats, from cheap to dear in shares of the limits.
        places: for each unit and row its place among the levels; a row that is beaten (a uniform start may hold it) has
            the place of a level that beats it.
    """

    menu: Menu
    limits: Mapping[str, float]
    levels: list[list[int]]
    places: list[list[int]]

    @staticmethod
    def of(menu: Menu, limits: Mapping[str, float]) -> _Space:
        """The space of a menu within limits."""
        levels, places = [], []
        for rows in menu.rows:
            # the index comes last, so that of equal rows the first beats the others
            points = [(*(getattr(row, name) for name in limits), row.damage, at) for at, row in enumerate(rows)]
            better = [[at for at, point in enumerate(points) if beats(point, other)] for other in points]
            share = [sum(getattr(row, name) / max(limits[name], 1e-30) for name in limits) for row in rows]
            level = sorted((at for at, winners in enumerate(better) if not winners), key=share.__getitem__)
            levels.append(level)
            places.append([min(level.index(a) for a in (at, *better[at]) if a in level) for at in range(len(rows))])
        return _Space(menu, limits, levels, places)

    def switched(self, plan: Plan, by: int, rng: torch.Generator) -> Plan:
        """The plan with one random unit moved by a level, of those that have one there; the plan itself if none has."""
        target = [place[row] + by for place, row in zip(self.places, plan.tolist(), strict=True)]
        able = [unit for unit, place in enumerate(target) if 0 <= place < len(self.levels[unit])]
        if not able:
            return plan
        unit, moved = able[_draw(len(able), rng)], plan.copy()
        moved[unit] = self.levels[unit][target[unit]]
        return moved
