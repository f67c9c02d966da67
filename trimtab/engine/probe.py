"""Probe: what each choice for each unit does to the model's outputs, with everything else as it was.

One pass of the original gives each block's input. At a block, each choice of each of its units is solved, put in place
for a moment, and the block
run: the results are variants of the hidden states, which then go on through the remaining blocks side by side, each
block's weights being
loaded once for all of them. Damage is the mean KL divergence to the original's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from trimtab.core.level import Dense, Level
from trimtab.core.method import Method, Solver
from trimtab.core.plan import Plan, Step
from trimtab.core.site import Site
from trimtab.core.table import Row
from trimtab.engine.apply import drain, outside_sites, solve
from trimtab.engine.measure import scores
from trimtab.engine.stats import INPUT_STATS, collect, gathers
from trimtab.engine.stream import Stream
from trimtab.formats.packed import Packed
from trimtab.formats.structure import sublayer_path

Steps = list[tuple[Method, dict[str, Level]]]


@dataclass(frozen=True)
class Choice:
    """A method at a level, as menus and rows name it: `gptq@4b/g64`."""

    method: Method
    level: Level

    def __str__(self) -> str:
        return str(Step(self.method, (("*", self.level),))).replace(" @ ", "@")

    @staticmethod
    @cache
    def parse(text: str) -> Choice:
        """The choice that `name@level` or `name(field=value)@level` says."""
        step = Plan.parse(text.replace("@", " @ ", 1)).steps[0]
        return Choice(step.method, step.levels[0][1])


@dataclass(frozen=True)
class Unit:
    """Sites that take one choice together, and the choices open to them.

    Fields:
        name: the first site's path, with the number of the others: `model.layers.0.self_attn.q_proj+2`.
        sites: the sites.
        choices: texts of the choices, coarse to fine.
    """

    name: str
    sites: tuple[Site, ...]
    choices: tuple[str, ...]

    @property
    def weights(self) -> int:
        """Scalars in all its sites."""
        return sum(s.weights for s in self.sites)


def units_of(
    stream: Stream, menu: Mapping[str, Iterable[str]], couple: bool, legal: Callable[[Level, Site], bool]
) -> list[Unit]:
    """The units of a model: sites that read one tensor share a choice where `couple` says so, as fused kernels need it.

    Args:
        menu: kind of site -> choices.
        legal: whether what the target can load allows a level at a site.
    """
    group_of = {p: g for g in stream.map.siblings for p in g} if couple else {}
    seen: set[str] = set()
    units = []
    for site in stream.sites.values():
        if site.path in seen or site.kind not in menu:
            continue
        members = tuple(stream.sites[p] for p in group_of.get(site.path, (site.path,)) if p in stream.sites)
        members = tuple(m for m in members if m.kind == site.kind) or (site,)
        seen |= {m.path for m in members}
        choices = tuple(
            c
            for c in menu[site.kind]
            if all(_fits(Choice.parse(c), m) and legal(Choice.parse(c).level, m) for m in members)
        )
        name = members[0].path + (f"+{len(members) - 1}" if len(members) > 1 else "")
        units.append(Unit(name, members, choices))
    return units


def _fits(choice: Choice, site: Site) -> bool:
    """Whether a method can touch a site at all: its kind, and the statistics that the site can have."""
    asks = set(choice.method.needs()) & INPUT_STATS
    return isinstance(choice.method, Solver) and site.kind in choice.method.card.kinds and (not asks or gathers(site))


def original_row(unit: Unit, dtype: str) -> Row:
    """The row of leaving a unit as it is."""
    return Row(unit.name, dtype, sum(Dense(dtype).bytes(s.shape) for s in unit.sites), 0.0, 0.0, unit.weights)


def probe(
    stream: Stream,
    units: list[Unit],
    calibration: Any,
    search: Any,
    task: Any,
    chunk: int,
    *,
    seed: int = 0,
    reference: list[Any],
    step: Callable[[str, Callable[[], Any]], Any],
    drops: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Row], dict[str, float]]:
    """Rows for every choice of every unit (bytes and damage), and the damage of dropping each sublayer.

    Args:
        reference: of the original's outputs on `search`, as `measure.references` gives them.
        step: commits what one place gave and gives it back on a resumed run (`Journal.step`).
        drops: probe dropping every attention and MLP sublayer as well.
    """
    before, behind = outside_sites(stream, search)
    by_place: dict[int | str, list[Unit]] = {}
    for unit in units:
        first = unit.sites[0]
        place = "before" if first.path in before else "behind" if first.path in behind else (first.block or 0)
        by_place.setdefault(place, []).append(unit)
    measured: list[list[Any]] = []
    dropped: dict[str, float] = {}
    total, done = sum(len(u.choices) for u in units), 0

    def tell(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, total)

    def rows_at(place: int | str, work: Callable[[], Any]) -> None:
        result = step(f"probe/{place}", work)
        measured.extend(result["rows"])
        dropped.update(result["drops"])
        tell(sum(len(u.choices) for u in by_place.get(place, [])))

    def outside(place: str) -> dict[str, Any]:
        rows = []
        wanted = {s.path: INPUT_STATS for u in by_place[place] for s in u.sites}
        first = partial(stream.begin, calibration.inputs, chunk)
        stats = collect(stream, wanted, first if place == "before" else lambda: drain(stream.finish(calib)))
        for unit in by_place[place]:
            for text in unit.choices:
                packed = solve_unit(stream, unit, text, stats, seed)
                with stream.swapped(packed):
                    flow = stream.begin(search.inputs, chunk)
                    for i in range(len(stream.paths)) if place == "before" else ():
                        with stream.loaded(i):
                            flow.hidden = stream.forward(i, flow)
                    hidden = flow.hidden if place == "before" else look.hidden
                    value = scores(
                        stream, flow if place == "before" else look, search, task, reference, hidden
                    ).damage()
                rows.append([unit.name, text, sum(p.nbytes for p in packed.values()), value])
        return {"rows": rows, "drops": {}}

    def inside(index: int) -> dict[str, Any]:
        rows, gone = [], {}
        mine = by_place.get(index, [])
        variants: list[tuple[list[Any], list[Any]]] = []
        with stream.loaded(index):
            asked = {u.name: {n for c in u.choices for n in Choice.parse(c).method.needs()} for u in mine}
            wanted = {s.path: asked[u.name] for u in mine for s in u.sites}
            stats = collect(stream, wanted, partial(stream.forward, index, calib))
            for unit in mine:
                for text in unit.choices:
                    packed = solve_unit(stream, unit, text, stats, seed)
                    with stream.swapped(packed):
                        variants.append(
                            ([unit.name, text, sum(p.nbytes for p in packed.values())], stream.forward(index, look))
                        )
            for sub in stream.map.sublayers if drops else ():
                if sub.block == index and sub.kind != "block":
                    path = sublayer_path(stream.map, sub)
                    with stream.swapped({path: None}):
                        variants.append(([path], stream.forward(index, look)))
        for later in range(index + 1, len(stream.paths)):
            with stream.loaded(later):
                variants = [(label, stream.forward(later, look, hidden)) for label, hidden in variants]
        for label, hidden in variants:
            damage = scores(stream, look, search, task, reference, hidden).damage()
            if len(label) == 1:
                gone[label[0]] = damage
            else:
                rows.append([*label, damage])
        return {"rows": rows, "drops": gone}

    calib, look = stream.begin(calibration.inputs, chunk), stream.begin(search.inputs, chunk)
    if "before" in by_place:
        rows_at("before", lambda: outside("before"))
    for i in range(len(stream.paths)):
        rows_at(i, partial(inside, i))
        with stream.loaded(i):
            calib.hidden, look.hidden = stream.forward(i, calib), stream.forward(i, look)
    if "behind" in by_place:
        rows_at("behind", lambda: outside("behind"))
    weights = {u.name: u.weights for u in units}
    return [Row(u, text, size, 0.0, damage, weights[u]) for u, text, size, damage in measured], dropped


def solve_unit(
    stream: Stream, unit: Unit, text: str, stats: Mapping[str, Mapping[str, torch.Tensor]], seed: int
) -> dict[str, Packed]:
    """A unit's sites solved at a choice: path -> packed weight."""
    choice = Choice.parse(text)
    assert isinstance(choice.method, Solver)
    return {
        s.path: solve(choice.method, s, stream.weight(s), choice.level, stats.get(s.path, {}), seed) for s in unit.sites
    }


def plan_of(
    choice: Mapping[str, Row], units: Iterable[Unit], dropper: Choice | None = None, dropped: Iterable[str] = ()
) -> Steps:
    """The steps that a choice of rows means: solvers of one method and configuration share a step; sublayers are
    dropped first.
    """
    steps: dict[str, tuple[Method, dict[str, Level]]] = {}
    if dropper and (gone := list(dropped)):
        steps["drop"] = (dropper.method, dict.fromkeys(gone, dropper.level))
    for unit in units:
        row = choice[unit.name]
        if "@" not in row.choice:
            continue
        picked = Choice.parse(row.choice)
        _, levels = steps.setdefault(repr(picked.method), (picked.method, {}))
        levels.update({s.path: picked.level for s in unit.sites})
    return list(steps.values())
