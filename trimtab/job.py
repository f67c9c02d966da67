"""A fit's job: from a request to the finished evidence, step by committed step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.budget import say_bytes
from trimtab.core.errors import BudgetError, UserError
from trimtab.core.journal import Journal
from trimtab.core.level import Level, rows_cols
from trimtab.core.method import Allocator
from trimtab.core.plan import Plan, check, exact_plan, grouping, parse_method
from trimtab.core.table import Row
from trimtab.fitting import SOLVED, menu

Progress = Callable[[str, int, int], None]

if TYPE_CHECKING:
    from trimtab.engine.apply import Applied
    from trimtab.engine.database import Database
    from trimtab.engine.probe import Choice, Unit
    from trimtab.engine.stream import Stream
    from trimtab.fitting import Request
    from trimtab.models.source import Source
    from trimtab.pace import Pace
    from trimtab.tasks.base import Scores, Task


@dataclass
class Candidate:
    """A plan on its way to being the result.

    Fields:
        name: what it is (`fitted`, `uniform gptq@4b/g64`).
        steps: resolved steps by exact site.
        rows: the chosen row of each unit.
        dropped: sublayers that are left out.
    """

    name: str
    steps: Any
    rows: dict[str, Row]
    dropped: tuple[str, ...] = ()

    @property
    def plan(self) -> str:
        """The plan's text, sites by their paths."""
        return str(exact_plan(self.steps))

    def predicted(self) -> float:
        """Damage if damages added up."""
        return sum(r.damage for r in self.rows.values())


class Job:
    """One run of a fit: a folder with a journal, and what is worked out in it."""

    def __init__(self, request: Request, out: Path, resume: bool, progress: Progress | None = None) -> None:
        from trimtab.models.source import open_source

        self.request, self.out, self.progress = request, out, progress or (lambda what, done, total: None)
        self.started = time.perf_counter()
        self.timings: dict[str, float] = {}
        self.source: Source = open_source(request.model)
        self.menu: dict[str, Any] = menu(request.effort, request.methods)
        header = {
            **{"model": request.model, "hash": self.source.hash, "budget": request.budget.limits()},
            **{k: v for k, v in request.__dict__.items() if k not in ("model", "budget")},
        }
        self.header = json.loads(json.dumps(header))
        self.resume = resume

    # ---- what everything is worked out from

    @cached_property
    def task(self) -> Task:
        from trimtab.tasks.build import task_for

        return task_for(self.source, self.request.data, self.request.length)

    @cached_property
    def journal(self) -> Journal:
        return Journal(self.out, self.resume, self.header)

    @cached_property
    def modelmap(self) -> Any:
        from trimtab.engine.stream import traced

        return traced(self.source, self.task.batch("search", 1, self.request.seed))

    def stream(self) -> Stream:
        """A fresh stream over the original."""
        from trimtab.engine.stream import Stream

        return Stream(self.source, self.modelmap, self.task.options)

    def batch(self, split: str) -> Any:
        """The split's items at this effort."""
        return self.task.batch(split, self.task.multiple * self.menu[split], self.request.seed)

    def fixed_bytes(self, units: Iterable[Unit]) -> int:
        """Bytes of an artifact beside its units: other tensors in their own type, headers, configuration, tokenizer."""
        units = list(units)
        mine = {f"{s.path}.weight" for u in units for s in u.sites}
        width = 0
        for name in self.source.names:
            if name not in mine:
                tensor = self.source.read(name)
                width += tensor.numel() * tensor.element_size()
        header = 110 * len(self.source.names) + 330 * sum(len(u.sites) for u in units) + 1500
        return width + header + sum(p.stat().st_size for p in self.source.sidecars())

    # ---- the steps

    def legal(self, level: Level, site: Any) -> bool:
        """Whether what the target loads allows a level at a site."""
        group = grouping(level)
        divides = not group or rows_cols(site.shape)[1] % group == 0
        if self.request.target == "native":
            return divides or self.request.padding
        from trimtab.formats.huggingface import expressible

        quantised = site.kind in ("linear", "head") or self.request.target == "gguf"
        return divides and quantised and expressible(self.request.target, level, site.shape)

    @cached_property
    def offered(self) -> list[Unit]:
        """Units with the choices that the target can load; a site for which there is none stays as it is."""
        from trimtab.engine.probe import units_of

        choices = {kind: self.menu[kind] for kind in SOLVED}
        return [u for u in units_of(self._probe_stream, choices, self.request.couple, self.legal) if u.choices]

    @cached_property
    def units(self) -> list[Unit]:
        """Units with the choices to search over: where the latency is limited, none that is slower here than the
        original.
        """
        if self.request.budget.latency is None:
            return self.offered
        from trimtab.engine.pricing import slower_here

        slower = slower_here(self.prices, [r for r in self.prices if r.choice == self.source.dtype])
        kept = [replace(u, choices=tuple(c for c in u.choices if (u.name, c) not in slower)) for u in self.offered]
        return [u for u in kept if u.choices]

    @cached_property
    def pace(self) -> Pace:
        """How long an item takes on this machine."""
        from trimtab.engine.probe import Choice
        from trimtab.pace import pace_of

        return pace_of(self, {str(Choice.parse(c).level) for u in self.offered for c in u.choices})

    @cached_property
    def prices(self) -> list[Row]:
        """Bytes and seconds of every choice on offer and of the original, before any is tried."""
        rows = [Row(u.name, c, self.bytes_of(u, c), 0.0, 0.0, u.weights) for u in self.offered for c in u.choices]
        return self.pace.priced(self.offered, rows + self._originals)

    @property
    def _originals(self) -> list[Row]:
        from trimtab.engine.probe import original_row

        return [original_row(u, self.source.dtype) for u in self.offered]

    @cached_property
    def _probe_stream(self) -> Stream:
        return self.stream()

    @cached_property
    def database(self) -> Database:
        """Solved choices, for allocators that measure combinations."""
        from trimtab.engine.database import Database

        batches = self.batch("calibration"), self.batch("search")
        return Database(
            self._probe_stream, self.units, *batches, self.task, self.task.chunk, self.reference, self.request.seed
        )

    @cached_property
    def dropper(self) -> Choice | None:
        """The choice that leaves a sublayer out, where the menu and the target have one."""
        from trimtab.engine.probe import Choice

        names = self.menu["sublayer"]
        usable = (
            names and self.request.target == "native" and self.modelmap.sublayers and self.source.task == "causal-lm"
        )
        return Choice.parse(names[0]) if usable else None

    def timed(self, what: str, work: Callable[[], Any]) -> Any:
        """Do a piece of work, and keep how long it took."""
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.timings[what] = self.timings.get(what, 0.0) + time.perf_counter() - start

    def tell(self, what: str) -> Callable[[int, int], None]:
        """A progress function for one piece of work."""
        return lambda done, total: self.progress(what, done, total)

    @cached_property
    def reference(self) -> list[Any]:
        """The original's outputs on the search data, that damage is measured against."""
        return self._outputs("search")

    def _outputs(self, split: str) -> list[Any]:
        """What the task keeps of the original's outputs on a split."""
        from trimtab.engine.measure import references, through

        batch, stream = self.batch(split), self._probe_stream
        return references(stream, through(stream, batch, self.task.chunk), batch, self.task)

    def table(self) -> tuple[list[Row], dict[str, float]]:
        """Probed rows of every unit, with the original among them, and the damage of each drop."""
        from trimtab.engine.probe import probe

        rows, drops = probe(
            self._probe_stream,
            self.units,
            self.batch("calibration"),
            self.batch("search"),
            self.task,
            self.task.chunk,
            seed=self.request.seed,
            reference=self.reference,
            step=self.journal.step,
            drops=self.dropper is not None,
            progress=self.tell("probing"),
        )
        names = {u.name for u in self.units}
        rows += [r for r in self._originals if r.unit in names]
        return rows if self.request.budget.latency is None else self.pace.priced(self.offered, rows), drops

    def allocate(
        self, rows: list[Row], limit: float, drops: Mapping[str, float], dropped: tuple[str, ...], haste: float
    ) -> Candidate:
        """The allocator's choice for a limit on the units' bytes, with these sublayers left out."""
        from trimtab.pace import inside, without

        open_rows, gone = without(self.modelmap, rows, dropped), inside(self.modelmap, dropped)
        limits = {"bytes": limit}
        if self.request.budget.latency is not None:
            limits["seconds"] = self.pace.left(rows, dropped, haste)
        chooser = parse_method(self.request.allocator)
        assert isinstance(chooser, Allocator)
        extra = self._wants(chooser, open_rows)
        picked = chooser.allocate(open_rows, limits, **extra)
        picked = {u: r for u, r in picked.items() if u.partition("+")[0] not in gone}
        return Candidate("fitted", self._steps(picked, dropped), picked, dropped)

    def _steps(self, picked: Mapping[str, Row], dropped: tuple[str, ...]) -> Any:
        from trimtab.engine.probe import plan_of

        return plan_of(picked, [u for u in self.units if u.name in picked], self.dropper, dropped)

    def _wants(self, chooser: Allocator, rows: list[Row]) -> dict[str, Any]:
        """What an allocator's verb asks for by name."""
        import torch

        needs = chooser.needs()
        extra: dict[str, Any] = {}
        if "rng" in needs:
            extra["rng"] = torch.Generator().manual_seed(self.request.seed)
        rest = [n for n in needs if n not in extra]
        from trimtab.evidence import for_allocator

        return extra | (for_allocator(self, rows, rest) if rest else {})

    def apply(self, candidate: Candidate, shelf_name: str, split: str = "calibration") -> Applied:
        """Carry a candidate's plan out on a fresh stream."""
        from trimtab.engine.apply import apply
        from trimtab.engine.shelf import Shelf

        stream = self.stream()
        shelf = Shelf(self.journal, shelf_name)
        stream.packed = shelf
        what = f"applying {candidate.name}"
        return apply(
            stream,
            candidate.steps,
            self.batch(split),
            self.task.chunk,
            seed=self.request.seed,
            keep=shelf.keep,
            progress=self.tell(what),
        )

    def scores(self, stream: Stream, split: str) -> Scores:
        """Scores on a split, damage against the original where the split is the search's."""
        from trimtab.engine.measure import measure

        reference = self.reference if split == "search" else None
        if split == "test" and self.task.name == "embedding":
            reference = self._test_reference
        return measure(stream, self.batch(split), self.task, self.task.chunk, reference)

    @cached_property
    def _test_reference(self) -> list[Any]:
        return self._outputs("test")

    def original_meets(self) -> bool:
        """Whether the original is within the size that is asked for, so that nothing need be done."""
        budget = self.request.budget
        return (
            self.request.plan is None
            and budget.size is not None
            and self.source.bytes <= budget.size
            and budget.quality is None
            and budget.latency is None
        )

    def check_feasible(self) -> None:
        """Refuse a size or a memory below the smallest plan before any work is done.

        Raises:
            UserError: names what was asked, and the smallest size.
        """
        budget = self.request.budget
        least = self.fixed_bytes(self.offered) + sum(min(self.bytes_of(u, c) for c in u.choices) for u in self.offered)
        needs = {"size": (budget.size, least), "memory": (budget.memory, least + self.workspace_bytes())}
        for what, (asked, needed) in needs.items():
            if asked is not None and asked < needed:
                raise UserError(
                    f"{what} {say_bytes(asked)} was asked for, and the smallest plan for {self.source.name} takes "
                    f"{say_bytes(needed)} "
                    f"(the original: {say_bytes(self.source.bytes)} on disk); ask for at least "
                    f"{say_bytes(1.01 * needed)}"
                )

    def bytes_of(self, unit: Unit, text: str) -> int:
        """Exact bytes of a choice for a unit."""
        from trimtab.engine.probe import Choice

        level = Choice.parse(text).level
        return sum(level.bytes(s.shape) for s in unit.sites)

    def planned(self) -> Candidate:
        """The candidate that the request's own plan means.

        Raises:
            UserError: the plan is illegal here.
        """
        from trimtab.engine.stream import plan_sites

        assert self.request.plan is not None
        sites = plan_sites(self.modelmap)
        steps = Plan.parse(self.request.plan).resolve(sites)
        check(steps, sites, self.request.padding)
        return Candidate("plan", steps, {})

    def uniform(self, rows: list[Row], limit: float) -> list[Candidate]:
        """Plans that take every linear and convolution to one level, every head to one and every embedding to one,
        within the limit, best predicted first.

        Heads and embeddings have levels of their own here as they have in practice: held to the body's level, the
        baseline would be weaker than what one gets by hand.
        """
        by_unit: dict[str, dict[str, Row]] = {}
        for row in rows:
            by_unit.setdefault(row.unit, {})[row.choice] = row
        kinds: dict[str, list[Unit]] = {"body": [], "heads": [], "embeddings": []}
        for unit in self.units:
            kinds[{"head": "heads", "embedding": "embeddings"}.get(unit.sites[0].kind, "body")].append(unit)
        kinds = {kind: units for kind, units in kinds.items() if units}
        left = inf if self.request.budget.latency is None else self.pace.left(rows)
        found = []
        for chosen in product(*(self._common(units, by_unit) for units in kinds.values())):
            picked = {
                u.name: by_unit[u.name][c] for c, units in zip(chosen, kinds.values(), strict=True) for u in units
            }
            if sum(r.bytes for r in picked.values()) <= limit and sum(r.seconds for r in picked.values()) <= left:
                named = ", ".join(c if kind == "body" else f"{kind} {c}" for kind, c in zip(kinds, chosen, strict=True))
                found.append(Candidate(f"uniform {named}", self._steps(picked, ()), picked))
        return sorted(found, key=Candidate.predicted)

    @staticmethod
    def _common(units: list[Unit], by_unit: Mapping[str, Mapping[str, Row]]) -> list[str]:
        """Choices that every one of these units has; a unit without a grouped choice takes none, so the shortest menu
        decides.
        """
        shared = set.intersection(*(set(by_unit[u.name]) for u in units))
        return [c for c in by_unit[units[0].name] if c in shared]

    def byte_limit(self, fixed: int, rows: list[Row]) -> float:
        """The limit on the units' bytes that the budget's size and memory set; without either the originals' bytes.

        Of the memory the cache of keys and values, the largest site unpacked and what a forward holds are left for the
        run.
        """
        budget = self.request.budget
        limits = [float(sum(max(r.bytes for r in rows if r.unit == u.name) for u in self.units))]
        if budget.size is not None:
            limits.append(float(budget.size - fixed))
        if budget.memory is not None:
            limits.append(float(budget.memory - fixed - self.workspace_bytes()))
        return min(limits)

    def workspace_bytes(self) -> int:
        """Bytes that a run holds beside the stored weights, by shape: cache, the largest site unpacked, and the
        states of a forward.
        """
        tokens = self.request.context * self.request.batch if self.source.task == "causal-lm" else self.request.batch
        cache = sum(
            2 * a.kv_heads * a.head_size * 4 * tokens
            for a in self.modelmap.attentions
            if self.source.task == "causal-lm"
        )
        inner = (s for s in self.modelmap.sites if s.shape and s.kind not in ("head", "embedding"))
        widest = max((rows_cols(s.shape)[0] for s in inner), default=0)
        largest = max((4 * s.weights for s in self.modelmap.sites), default=0)
        return cache + 2 * largest + 4 * 4 * tokens * widest

    def best_for(
        self,
        rows: list[Row],
        drops: Mapping[str, float],
        limit: float,
        must: tuple[str, ...] = (),
        haste: float = 1.0,
    ) -> Candidate:
        """The allocator's choice for a limit, over every number of dropped sublayers that predicts less damage.

        Args:
            must: sublayers that are dropped anyhow.
            haste: share of the latency to plan for, where an earlier plan took longer than it was to.

        Raises:
            BudgetError: no plan is within the limits.
        """
        if self.request.budget.latency is not None:
            must = max(must, self.pace.fewest(rows, drops, haste), key=len)
        best = self.allocate(rows, limit, drops, must, haste)
        cost = sum(drops.get(p, 0.0) for p in must) + best.predicted()
        order = [*must, *sorted((p for p in drops if p not in must), key=lambda p: drops[p])]
        for count in range(len(must) + 1, len(order)):
            dropped = tuple(order[:count])
            lost = sum(drops[p] for p in dropped)
            if lost >= cost:
                break
            try:
                candidate = self.allocate(rows, limit, drops, dropped, haste)
            except BudgetError:
                continue
            if lost + candidate.predicted() < cost:
                best, cost = candidate, lost + candidate.predicted()
        return best

    def go(self) -> dict[str, Any]:
        """The whole run: the evidence."""
        from trimtab.evidence import Evidence

        return Evidence(self).gather()
