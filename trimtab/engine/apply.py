"""Apply a plan block by block: collect what its steps ask for, take each site to its level, pass the changed outputs
on.

Within a block the steps run in the plan's order; a step that changes weights ends the statistics of the block, and a
later step collects them again. Inputs of a block come from the blocks before it as they are then, already changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Level
from trimtab.core.method import Method, Rewriter, Scene, Solver
from trimtab.core.site import Site
from trimtab.engine.experts import ROUTING, routing
from trimtab.engine.stats import INPUT_STATS, Collector, collect, gathers
from trimtab.engine.stream import Flow, Stream
from trimtab.formats.packed import Packed, join_rows, row_separable

Resolved = list[tuple[Method, dict[str, Level]]]
TILE = 1 << 17  # weights in a tile of rows: what a solver holds besides is small, and in the cache
LARGE = 1 << 24  # weights above which tiles are made where each must factor the same statistics


@dataclass
class Applied:
    """What a plan has made of a model.

    Fields:
        stream: the stream that holds the changed model.
        edits: changes of structure, for `formats.structure.replay`.
        methods, levels: path -> name of the method that solved it, and its level.
        rewrote: a rewrite changed other tensors as well.
    """

    stream: Stream
    edits: list[dict[str, Any]] = field(default_factory=list)
    methods: dict[str, str] = field(default_factory=dict)
    levels: dict[str, Level] = field(default_factory=dict)
    rewrote: bool = False

    @property
    def packed(self) -> Mapping[str, Packed]:
        """Path -> stored weight of every solved site."""
        return self.stream.packed


def seed_for(path: str, seed: int) -> torch.Generator:
    """The generator of a site: it depends on the run's seed and the site alone, so that order and resumption change
    nothing.
    """
    import zlib

    return torch.Generator().manual_seed((zlib.crc32(path.encode()) << 16) + seed)


def solve(method: Solver, site: Site, weight: Tensor, level: Level, stats: Mapping[str, Tensor], seed: int) -> Packed:
    """One site taken to its level, with the statistics that the method asks for.

    A weight whose rows are stored apart is done in tiles of rows; with statistics of n inputs, which most methods begin
    to factor, only a large one, in tiles of n rows at least. A method that gives tiles different levels has looked at
    the weight as a whole, and is given it as a whole.

    Raises:
        UserError: the method asks for a statistic that this site cannot have.
    """
    wanted: dict[str, Any] = {}
    for name in method.needs():
        if name == "rng":
            wanted[name] = seed_for(site.path, seed)
        elif name in stats:
            wanted[name] = stats[name]
        else:
            raise UserError(
                f"{method.card.name} needs the statistic {name}, which {site.path} ({site.kind}) does not have; use "
                "`rtn` there"
            )
    tiles = weight.split(_tile(weight, level, wanted))
    packed = join_rows((method.solve(tile, level, **wanted) for tile in tiles), tuple(weight.shape))
    packed = packed or method.solve(weight, level, **wanted)
    if flaw := packed.flaw():
        raise UserError(f"{method.card.name} at {level} left {flaw} of {site.path}; more calibration data may help")
    return packed


def _tile(weight: Tensor, level: Level, wanted: Mapping[str, Any]) -> int:
    """Rows that are solved together; of more than one tile a multiple of 8, so that the codes of each fill bytes."""
    rows, cols = weight.shape
    if not row_separable(level) or "rng" in wanted:
        return rows
    if not wanted:
        return max(8, TILE // cols // 8 * 8)
    return rows if weight.numel() <= LARGE else -(-max(LARGE // 2 // cols, cols) // 8) * 8


def apply(
    stream: Stream,
    resolved: Resolved,
    batch: Any,
    chunk: int,
    *,
    seed: int = 0,
    keep: Callable[[str, Callable[[], dict[str, Packed]]], dict[str, Packed]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Applied:
    """Carry out a resolved plan on a stream's model; the stream is changed.

    Args:
        batch: calibration items.
        chunk: items in one forward.
        keep: commits what was solved in one place (`before`, a block's index, `behind`) and gives it back on a resumed
            run.
        progress: called with (places done, places in all).
    """
    keep = keep or (lambda place, work: work())
    done = Applied(stream)
    if any(isinstance(m, Rewriter) for m, _ in resolved):
        stream.whole_model()  # a rewrite changes tensors that no step stores, so the model stays in memory
    for part in _segments(resolved):
        if isinstance(part[0][0], Rewriter) and part[0][0].scope == "model":
            stream = _rewrite_model(stream, part[0], batch, chunk, done)
        else:
            _pass(stream, part, batch, chunk, seed, keep, progress, done)
    done.stream = stream
    return done


def _segments(resolved: Resolved) -> Iterable[Resolved]:
    """Runs of steps that one pass over the blocks can carry out; a rewrite of the whole model stands alone."""
    run: Resolved = []
    for step in resolved:
        if isinstance(step[0], Rewriter) and step[0].scope == "model":
            if run:
                yield run
            yield [step]
            run = []
        else:
            run.append(step)
    if run:
        yield run


def _pass(
    stream: Stream, steps: Resolved, batch: Any, chunk: int, seed: int, keep: Any, progress: Any, done: Applied
) -> None:
    before, behind = outside_sites(stream, batch)
    flow = stream.begin(batch.inputs, chunk)
    total = len(stream.paths) + 2

    def tell(place: int) -> None:
        if progress:
            progress(place, total)

    if any(p in levels for _, levels in steps for p in before):
        stats = collect(stream, _wanted(steps, before), lambda: stream.begin(batch.inputs, chunk))
        _place(stream, steps, before, "before", keep, seed, done, first=stats)
        flow = stream.begin(batch.inputs, chunk)
    tell(1)
    for i in range(len(stream.paths)):
        inside = [s.path for s in stream.sites.values() if s.block == i or stream.whole]
        with stream.loaded(i):
            _place(stream, steps, inside, i, keep, seed, done, gather=_collector(stream, i, flow))
            flow.hidden = stream.forward(i, flow)
        tell(i + 2)
    if any(p in levels for _, levels in steps for p in behind):
        stats = collect(stream, _wanted(steps, behind), lambda: drain(stream.finish(flow)))
        _place(stream, steps, behind, "behind", keep, seed, done, first=stats)
    tell(total)


def _wanted(steps: Resolved, paths: Iterable[str]) -> dict[str, set[str]]:
    """The statistics that the steps ask for at those of the paths that they touch."""
    wanted: dict[str, set[str]] = {}
    for path in paths:
        for method, levels in steps:
            if path in levels:
                wanted.setdefault(path, set()).update(method.needs())
    return wanted


def _collector(stream: Stream, index: int, flow: Flow) -> Callable[[dict[str, set[str]]], dict[str, dict[str, Tensor]]]:
    return lambda wanted: collect(stream, wanted, lambda: stream.forward(index, flow))


def drain(items: Iterable[Any]) -> None:
    """Go through items for what happens on the way."""
    for _ in items:
        pass


def _place(
    stream: Stream,
    steps: Resolved,
    paths: list[str],
    place: int | str,
    keep: Any,
    seed: int,
    done: Applied,
    first: dict[str, dict[str, Tensor]] | None = None,
    gather: Callable[[dict[str, set[str]]], dict[str, dict[str, Tensor]]] | None = None,
) -> None:
    """Carry out the steps at the sites of one place: a block, or what lies before or behind the blocks."""
    here = set(paths)
    solves = [(m, {p: lv for p, lv in levels.items() if p in here}) for m, levels in steps]
    for i, (method, levels) in enumerate(solves):
        if not levels:
            continue
        asks = _wanted([(method, levels)], levels)
        if isinstance(method, Rewriter):
            if not isinstance(place, int):
                continue
            _rewrite_block(
                stream, method, levels, place, gather(_rewriter_wants(method, stream, place)) if gather else {}, done
            )
            continue

        later = {p for _, others in solves[i + 1 :] for p in others}

        def work(
            method: Any = method, levels: Any = levels, asks: Any = asks, later: set[str] = later
        ) -> dict[str, Packed]:
            needs_input = any(a & INPUT_STATS for a in asks.values())
            stats = first if first is not None else gather(asks) if gather and needs_input else {}
            solved = {}
            for p, level in levels.items():
                mine = stats.get(p, {}) if p in later else stats.pop(p, {})  # a gram goes with its last reader
                solved[p] = solve(method, stream.sites[p], stream.weight(stream.sites[p]), level, mine, seed)
            return solved

        for path, packed in keep(f"{place}-{method.card.name}", work).items():
            stream.put(stream.sites[path], packed)
            done.methods[path], done.levels[path] = method.card.name, packed.level


def _rewriter_wants(method: Rewriter, stream: Stream, place: int) -> dict[str, set[str]]:
    return {
        s.path: set(method.needs()) for s in stream.sites.values() if (s.block == place or stream.whole) and gathers(s)
    }


def _by_statistic(stats: Mapping[str, Mapping[str, Tensor]], names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    return {name: {p: s[name] for p, s in stats.items() if name in s} for name in names}


def _rewrite_block(
    stream: Stream, method: Rewriter, levels: dict[str, Level], index: int, stats: Any, done: Applied
) -> None:
    scene = Scene(stream.model, stream.map, (index,), levels, stats)
    method.rewrite(scene, **_by_statistic(stats, method.needs()))
    assert not scene.edits, "a rewriter with scope block does not change structure"
    done.rewrote = True


def outside_sites(stream: Stream, batch: Any) -> tuple[list[str], list[str]]:
    """Paths of the sites before the blocks and behind them, by running one item up to the last block."""
    outside = [s for s in stream.sites.values() if s.block is None and not stream.whole]
    called: set[str] = set()
    handles = [
        stream.model.get_submodule(s.path).register_forward_pre_hook(lambda m, a, p=s.path: called.add(p))
        for s in outside
    ]
    try:
        stream.begin({k: v[:1] for k, v in batch.inputs.items()}, 1)
    finally:
        for handle in handles:
            handle.remove()
    return [s.path for s in outside if s.path in called], [s.path for s in outside if s.path not in called]


def sublayer_cosines(stream: Stream, batch: Any, chunk: int) -> dict[str, Tensor]:
    """Mean cosine similarity of the residual stream before and after each sublayer and block, as LLM-Drop scores
    them.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def add(path: str, before: Tensor, after: Tensor) -> None:
        value = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        total, n = sums.get(path, (torch.zeros((), dtype=torch.float64), 0))
        sums[path] = (total + value.double().sum(), n + value.numel())

    flow = stream.begin(batch.inputs, chunk)
    for i, block_path in enumerate(stream.paths):
        with stream.loaded(i):
            subs = [s for s in stream.map.sublayers if s.block == i and s.kind != "block"]
            handles = []
            for sub in subs:
                state: dict[str, Tensor] = {}
                norm = stream.model.get_submodule(sub.norm) if sub.norm else stream.model.get_submodule(sub.path)
                handles.append(
                    norm.register_forward_pre_hook(
                        lambda m, a, k, st=state: st.__setitem__("x", a[0] if a else k["hidden_states"]),
                        with_kwargs=True,
                    )
                )

                def hook(m: nn.Module, a: Any, out: Any, st: dict[str, Tensor] = state, p: str = sub.path) -> None:
                    add(p, st["x"], st["x"] + (out[0] if isinstance(out, tuple) else out).reshape(st["x"].shape))

                handles.append(stream.model.get_submodule(sub.path).register_forward_hook(hook))
            try:
                after = stream.forward(i, flow)
            finally:
                for handle in handles:
                    handle.remove()
            for x, y in zip(flow.hidden, after, strict=True):
                if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
                    add(block_path, x, y)
            flow.hidden = after
    return {path: (total / n).float() for path, (total, n) in sums.items()}


def _rewrite_model(
    stream: Stream, step: tuple[Method, dict[str, Level]], batch: Any, chunk: int, done: Applied
) -> Stream:
    """A rewrite of the whole model: statistics in one pass over the blocks, then the model in memory, changed, is the
    new source.
    """
    method, levels = step
    assert isinstance(method, Rewriter)
    needs = set(method.needs())
    if absent := needs - INPUT_STATS - ROUTING - {"cosine"}:
        raise UserError(f"{method.card.name} needs {', '.join(sorted(absent))}, which no plan collects; call its "
                        f"{method.verb} with it")  # fmt: skip
    stats: dict[str, dict[str, Tensor]] = {}
    if needs & INPUT_STATS:
        _, behind = outside_sites(stream, batch)
        flow = stream.begin(batch.inputs, chunk)
        for i in range(len(stream.paths)):
            with stream.loaded(i):
                collector = Collector(stream.sites.values(), stream.map.siblings, _rewriter_wants(method, stream, i))
                with collector.attached(stream.model):
                    flow.hidden = stream.forward(i, flow)
                stats |= collector.result()
        stats |= collect(stream, dict.fromkeys(behind, needs), lambda: drain(stream.finish(flow)))
    extra: dict[str, Any] = _by_statistic(stats, needs & INPUT_STATS)
    if "cosine" in needs:
        extra["cosine"] = sublayer_cosines(stream, batch, chunk)
    model = stream.whole_model()
    if needs & ROUTING:
        parts = [batch.take(i, i + chunk).inputs for i in range(0, len(batch), chunk)]
        extra |= {name: found for name, found in routing(model, stream.map, parts).items() if name in needs}
    scene = Scene(model, stream.map, tuple(range(len(stream.map.blocks))), levels, stats)
    method.rewrite(scene, **extra)
    done.edits += scene.edits
    done.rewrote = True
    return stream.over(model, batch)
