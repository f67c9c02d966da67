"""Search an architecture: one elastic network, trained once, and the best of its sub-networks for a budget.

    space, data -> elastic network -> train -> price and score sub-networks -> the one that fits -> plain torch

Scores during the search are those of the search items; the chosen network, the largest and the best uniform one are
measured on items that neither the training nor the search saw. What is handed over is written as a plain network,
loaded again in a process without Trimtab, and compared.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from trimtab.core.budget import Budget
from trimtab.core.errors import BudgetError, UserError
from trimtab.core.journal import Journal
from trimtab.core.knob import Domain, Genome
from trimtab.core.level import parse_level
from trimtab.core.method import Elastic, Searcher, Solver, Trial, method
from trimtab.core.plan import parse_method
from trimtab.delivering import Delivery, Found
from trimtab.report.say import say_cost

if TYPE_CHECKING:
    from trimtab.engine.costing import Costs
    from trimtab.engine.cuts import Cuts
    from trimtab.engine.elastic import Maker, Supernet
    from trimtab.engine.jury import Jury
    from trimtab.engine.pressing import Pressed
    from trimtab.models.source import Source
    from trimtab.tasks.base import Task

Progress = Callable[[str, int, int], None]
COSTS = {"size": "bytes", "latency": "seconds", "flops": "flops", "parameters": "parameters"}
DRAWS = 200_000  # random networks that are priced to see what a budget leaves
PROFILED = 20  # whole networks that a profile is compared with
ROUNDS = 12  # times that the searcher is asked
UNIFORM = 12  # uniform networks that are scored first
LINES = 18  # groups of choices that a description shows
LOOKED = 4  # items that a trained model's blocks are looked at with
GATHERED, SEARCHED = 5, 40  # times `task.multiple` items: for statistics, and for the search


@dataclass(frozen=True)
class Request:
    """What is asked of a search.

    Fields:
        space: a named space, `file.py`, `file.py:function` or `module:function`, see `trimtab.space`.
        model: in place of a space, a trained model that is made elastic, see `models.source`.
        data: labelled images or text, see `tasks.build`; None: what Trimtab or Python brings along.
        budget: limits on `size` (bytes of weights) and `latency` (seconds of a forward of `batch_latency` items here);
            with `quality`, a share of the largest network's, the cheapest network that keeps it.
        flops, parameters: further limits; None: none.
        method: how the elastic network is trained, see `trimtab methods --family nas`.
        searcher: what proposes sub-networks.
        evaluations: how many sub-networks are scored.
        steps, batch, rate, decay: of the training, see `engine.train.Recipe`.
        length: tokens of a window of text.
        size: height and width that images of a folder are resized to.
        items: of the forward that costs are for.
        threads: that time is measured with; 0: as torch has them.
        levels: of compression that each block's matrices may have beside fp32, rounded to nearest; with a model alone.
        device: `here`, or a file of a device profile of this machine.
        seed: of everything random.
    """

    space: str | None = None
    model: str | None = None
    data: str | None = None
    budget: Budget = field(default_factory=Budget)
    flops: float | None = None
    parameters: float | None = None
    method: str = "uniform-sampling"
    searcher: str = "linas"
    evaluations: int = 100
    steps: int = 1000
    batch: int = 64
    rate: float = 3e-3
    decay: float = 0.01
    length: int = 128
    size: int = 32
    items: int = 1
    threads: int = 0
    levels: tuple[str, ...] = ()
    device: str = "here"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind, lacks in (
            ("method", Elastic, "trains no elastic network"),
            ("searcher", Searcher, "proposes no networks"),
        ):
            if not isinstance(parse_method(getattr(self, name)), kind):
                raise UserError(f"{getattr(self, name)} {lacks}; `trimtab methods --family nas` lists what does")
        if (self.space is None) is (self.model is None):
            raise UserError("a search is of a space or from a model: name one, and not both")
        if self.evaluations < 1:
            raise UserError(f"{self.evaluations} evaluations were asked for; at least 1 is needed")
        if self.budget.memory is not None:
            raise UserError(
                "a search knows the limits size, latency, flops, parameters and quality; leave --memory out"
            )
        if self.levels and (self.model is None or self.budget.latency is not None):
            raise UserError(
                "levels are offered for the blocks of a model (--from), and not with --latency: what is measured here "
                "computes in fp32 at every level; limit the size, or fit the network that a search finds"
            )
        self.recipe()

    def recipe(self) -> Any:
        """How the elastic network is trained."""
        from trimtab.engine.teaching import Course

        told = {"steps": self.steps, "batch": self.batch, "rate": self.rate, "decay": self.decay, "seed": self.seed}
        return Course(every=max(50, self.steps // 10), method=parse_method(self.method), **told)  # type: ignore[arg-type]

    @property
    def limits(self) -> dict[str, float]:
        """Name of a cost -> its upper bound."""
        asked = {**self.budget.limits(), "flops": self.flops, "parameters": self.parameters}
        return {cost: float(limit) for name, cost in COSTS.items() if (limit := asked.get(name)) is not None}


def search(
    space: str | None = None,
    data: str | None = None,
    *,
    model: str | None = None,
    budget: Budget | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Found:
    """Train an elastic network, and find the best of its sub-networks for a budget.

    Args:
        space, model, data, budget: see `Request`.
        out: folder of the run: journals, checkpoints, the network, the report.
        resume: go on with the run in `out`.
        options: further fields of `Request`.

    Returns:
        The evidence, the plain network, and its folder.

    Raises:
        UserError: bad input, or a loss that is no number. BudgetError: no sub-network meets the budget.
    """
    from trimtab.fitting import default_folder

    request = _request(space, data, model=model, budget=budget, **options)
    named = Path(str(space or model).split(":")[0])
    folder = Path(out) if out is not None else default_folder(f"{named.stem}-search")
    return Search(request, folder, resume, progress or (lambda what, done, total: None)).go()


def _request(space: str | None, data: str | None, budget: Budget | None = None, **options: Any) -> Request:
    if not options.get("method"):  # what came off best here for each
        options["method"] = "uniform-sampling" if options.get("model") is None else "instatune"
    return Request(space=space, data=data, budget=budget or Budget(), **options)


class Search:
    """One run of a search: a folder with journals, and what is worked out in it."""

    def __init__(self, request: Request, out: Path, resume: bool, progress: Progress) -> None:
        self.request, self.out, self.resume, self.progress = request, out, resume, progress
        self.started = time.perf_counter()
        self.timings: dict[str, float] = {}

    # ---- what everything is worked out from

    @cached_property
    def source(self) -> Source | None:
        """The trained model, where there is one."""
        from trimtab.models.source import open_source

        return None if self.request.model is None else open_source(self.request.model)

    @cached_property
    def ground(self) -> tuple[Maker, Task]:
        """What makes networks, and what they are for."""
        from trimtab.space import Space, open_function
        from trimtab.tasks.fresh import task_of

        if self.source is not None:
            return self._cuts()
        assert self.request.space is not None
        function, name = open_function(self.request.space)
        task, known = task_of(function, self.request.data, self.request.length, self.request.size)
        return Space(function, name, **known), task

    def _cuts(self) -> tuple[Cuts | Pressed, Task]:
        """The networks that a trained model can be cut to, and its task."""
        from trimtab.engine.cuts import Cuts
        from trimtab.engine.pressing import Pressed
        from trimtab.engine.stream import traced
        from trimtab.tasks.build import task_for
        from trimtab.tasks.fresh import TRAINED

        source = self.source
        assert source is not None
        task = task_for(source, self.request.data, self.request.length, training=TRAINED)
        some = task.batch("calibration", LOOKED, self.request.seed)
        cuts = Cuts(source.name, source.materialise(), traced(source, some), some.inputs, task.options)
        if not self.request.levels:
            return cuts, task
        levels = {str(level): level for level in map(parse_level, self.request.levels)}
        rounding = method("rtn")
        assert isinstance(rounding, Solver)
        return Pressed(cuts, levels, rounding), task

    @property
    def maker(self) -> Maker:
        """What makes networks."""
        return self.ground[0]

    @property
    def task(self) -> Task:
        """What they are for."""
        return self.ground[1]

    @property
    def domain(self) -> Domain:
        """All knobs."""
        return self.maker.domain

    @cached_property
    def uniform(self) -> list[Genome]:
        """Genomes in what is offered whose knobs of a kind all stand alike."""
        domain = self.offered
        kinds = sorted({k.kind for k in domain.knobs if len(k.options) > 1})
        places = [
            sorted(
                {p / (len(k.options) - 1) for k in domain.knobs if k.kind == kind for p in range(len(k.options)) if p}
            )
            for kind in kinds
        ]
        found = set()
        for drawn in product(*([0.0, *shares] for shares in places)):
            at = {**dict(zip(kinds, drawn, strict=True))}
            found.add(domain.canonical(round(at.get(k.kind, 0) * (len(k.options) - 1)) for k in domain.knobs))
        return sorted(found)

    @cached_property
    def offered(self) -> Domain:
        """What the method makes elastic."""
        return self.domain.within(parse_method(self.request.method).offer(self.domain))  # type: ignore[attr-defined]

    def said(self, genome: Genome) -> str:
        """A genome as its choices."""
        return ", ".join(f"{name}={option}" for name, option in self.domain.setting(genome).items())

    def whole(self, genome: Genome) -> Genome:
        """The genome in all knobs of one in what is offered."""
        return self.domain.genome(self.offered.setting(genome))

    def batch(self, split: str, items: int) -> Any:
        """Items of a split."""
        return self.task.batch(split, items, self.request.seed)

    @cached_property
    def supernet(self) -> Supernet:
        """The elastic network, trained."""
        from trimtab.engine.elastic import Supernet

        transforms = parse_method(self.request.method).transforms  # type: ignore[attr-defined]
        found = Supernet(self.maker, self.request.seed, transforms)
        if self.source is not None:
            found.sort(dict(self.batch("calibration", 1).inputs))
        return found

    @cached_property
    def jury(self) -> Jury:
        """Scores networks on the search items."""
        from trimtab.engine.jury import Jury

        many = self.task.multiple
        return Jury(self.task, self.batch("calibration", GATHERED * many), self.batch("search", SEARCHED * many))

    @cached_property
    def costs(self) -> Costs:
        """What every network costs."""
        from trimtab.engine.costing import Costs

        inputs = {k: v[: self.request.items] for k, v in self.batch("search", self.request.items).inputs.items()}
        limits = self.request.limits
        timed = "seconds" in limits or not limits
        threads = self.request.threads or None
        device = None if self.request.device == "here" else Path(self.request.device)
        told = self.progress, device, self.offered
        return Costs(self.maker, inputs, self.task.options, timed, threads, *told)

    def price(self, genomes: Any) -> dict[str, Any]:
        """Costs of genomes in what is offered."""
        return self.costs.price(genomes)

    @property
    def main(self) -> str:
        """The cost that the front is drawn over."""
        limits = self.request.limits
        return next(iter(limits), "seconds" if self.costs.timed else "flops")

    def described(self) -> str:
        """What there is to choose, and what it costs, in some twenty lines."""
        groups: dict[tuple[str, Any, str], list[int]] = {}
        for i, knob in enumerate(self.offered.knobs):
            like = re.sub(r"\d+", "*", knob.name)
            groups.setdefault((like, knob.options, knob.kind), []).append(i)
        count = self.offered.count()
        networks = f"{count:,}" if count < 10**12 else f"about 10^{self.offered.log10():.0f}"
        lines = [f"{self.maker.name}: {networks} networks, {len(self.offered.knobs)} choices"]
        wide = max(len(like) for like, _, _ in groups)
        for (like, options, kind), places in list(groups.items())[:LINES]:
            knobs = [self.offered.knobs[i] for i in places]
            hangs = sum(bool(k.when) for k in knobs)
            layers = sum(len(self.costs.hangs.get(i, ())) for i in places)
            said = [f"{len(knobs)} of them"] if len(knobs) > 1 else []
            said += [f"{hangs} hang on others"] if hangs else []
            said += [f"ties {layers} layers" if len(knobs) == 1 else f"tie {layers} layers in all"] if layers else []
            lines.append(f"  {like:{wide}}  {kind:10}  {' '.join(map(str, options))}  ({', '.join(said)})")
        if len(groups) > LINES:
            lines.append(f"  and {len(groups) - LINES} more")
        lines.append(f"  {'':10}  {'smallest':>10}  {'median':>10}  {'largest':>10}")
        for name, ends in self.costs.ranges.items():
            lines.append(f"  {name:10}  " + "  ".join(f"{say_cost(name, v):>10}" for v in ends))
        return "\n".join(lines)

    # ---- the steps

    def go(self) -> Found:
        """Do what is left of the run."""
        request = self.request
        asked = {k: v for k, v in asdict(request).items() if k != "budget"} | {"budget": request.budget.limits()}
        space = {k.name: [str(o) for o in k.options] for k in self.domain.knobs}
        header = {**asked, "knobs": space, "data_hash": self.task.data_hash()}
        journal = Journal(self.out, self.resume, header)
        self.check_feasible()
        self.check_searcher()
        journal.begin()
        self._timed("train", self._train)
        trials = self._timed("search", self._hunt)
        chosen, verdicts = self._chosen(trials)
        return self._timed("judge", lambda: Delivery(self).judged(trials, chosen, verdicts))

    def _timed(self, what: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return work()
        finally:
            self.timings[what] = time.perf_counter() - start

    def check_feasible(self) -> None:
        """Raise where no sub-network is within the limits.

        Raises:
            BudgetError: the message names the limit and the nearest sub-network.
        """
        limits = self.request.limits
        if not limits:
            return
        rng = Random(self.request.seed)
        count = DRAWS if self.costs.exact else 200
        genomes = [self.offered.smallest(), *(self.offered.random(rng) for _ in range(min(count, 20_000)))]
        prices = self.price(genomes)
        excess = sum((prices[name] / limit - 1).clip(0) for name, limit in limits.items())
        nearest = int(excess.argmin())
        if excess[nearest] > 0:
            said = ", ".join(f"{say_cost(name, prices[name][nearest])} of {name}" for name in limits)
            asked = ", ".join(f"{say_cost(name, limit)} of {name}" for name, limit in limits.items())
            raise BudgetError(
                f"{asked} were asked for, and no sub-network of {self.maker.name} is within; the nearest takes {said}: "
                f"{self.said(self.whole(genomes[nearest]))}"
            )

    def check_searcher(self) -> None:
        """Ask the searcher for no network, so that what it lacks is said before anything is trained.

        Raises:
            UserError: a field makes no sense, or what the searcher needs is not there.
        """
        from trimtab.engine.hunting import Chase

        searcher: Any = parse_method(self.request.searcher)
        Chase(self.offered, searcher, limits=self.request.limits, price=self.price).ask((), (), 0)

    def _train(self) -> None:
        import torch

        from trimtab.engine.teaching import Teaching
        from trimtab.engine.train import train

        request, items = self.request, self.batch("calibration", sys.maxsize >> 1)
        recipe, folder = request.recipe(), self.out / "training"
        method = parse_method(request.method)
        teaching = Teaching(
            *(self.supernet, method, items.inputs, items.labels, recipe.steps),  # type: ignore[arg-type]
            *(request.seed, self.task.options, folder),
        )
        optimiser = torch.optim.AdamW(self.supernet.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
        resume = self.resume and (folder / "journal.jsonl").is_file()
        identity = {"method": request.method, "space": self.maker.name}
        train(
            *(self.supernet, None, len(items), recipe, optimiser, folder),  # type: ignore[arg-type]
            backward=teaching,
            resume=resume,
            identity=identity,
            progress=self.progress,
        )

    @cached_property
    def first(self) -> tuple[Genome, ...]:
        """Uniform networks that are scored before all others: the largest within the limits, or spread over all."""
        limits, uniform = self.request.limits, self.uniform
        prices = self.price(uniform)
        order = sorted(range(len(uniform)), key=lambda i: -prices[self.main][i])
        order = [i for i in order if all(prices[n][i] <= limit for n, limit in limits.items())]
        count = max(1, min(UNIFORM, self.request.evaluations // 4))
        step = 1 if limits else max(1, len(order) // count)
        return tuple(uniform[i] for i in order[::step][:count])

    def _hunt(self) -> tuple[Trial, ...]:
        from trimtab.engine.hunting import Chase, hunt

        self.supernet.requires_grad_(False)
        request = self.request

        def evaluate(genome: Genome) -> dict[str, float]:
            costs = {name: float(v[0]) for name, v in self.price([genome]).items()}
            return {"error": self.jury.of(self.supernet, self.whole(genome)), **costs}

        chase = Chase(
            self.offered,
            parse_method(request.searcher),  # type: ignore[arg-type]
            ("error", self.main),
            request.limits,
            request.evaluations,
            max(1, request.evaluations // ROUNDS),
            request.seed,
            price=self.price,
            first=self.first,
        )
        done = 0

        def watch(trial: Trial) -> None:
            nonlocal done
            done += 1
            self.progress("score sub-networks", done, request.evaluations)

        return tuple(hunt(chase, evaluate, self.out / "trials", watch))

    # ---- the verdict

    def _chosen(self, trials: tuple[Trial, ...]) -> tuple[Genome, dict[str, Genome]]:
        """The chosen genome, and those that it is held against: the largest and the best uniform one."""
        request, limits = self.request, self.request.limits
        largest = self.offered.largest()
        fits = [t for t in trials if all(t.values[name] <= limit for name, limit in limits.items())]
        if not fits:
            raise BudgetError(
                f"none of the {len(trials)} sub-networks that were scored is within the limits; raise --evaluations"
            )
        if request.budget.quality is not None:
            whole = self.jury.of(self.supernet, self.whole(largest))
            keeps = [t for t in fits if self._kept(t.values["error"], whole) >= request.budget.quality]
            if not keeps:
                best = min(fits, key=lambda t: t.values["error"])
                raise BudgetError(
                    f"{request.budget.quality:.4g} of the largest network's quality was asked for; of {len(fits)} "
                    f"sub-networks within the limits the best keeps {self._kept(best.values['error'], whole):.4g}"
                )
            best = min(keeps, key=lambda t: t.values[self.main])
        else:
            best = min(fits, key=lambda t: (t.values["error"], t.values[self.main]))
        limit = {self.main: best.values[self.main]} if request.budget.quality is not None or not limits else limits
        uniform = self._uniform(trials, limit)
        return best.genome, {"largest": largest} | ({"uniform": uniform} if uniform is not None else {})

    def _kept(self, error: float, whole: float) -> float:
        if self.task.higher:
            return self.task.retained(1 - error, 1 - whole)
        return self.task.retained(error, whole)

    def _uniform(self, trials: tuple[Trial, ...], limits: Mapping[str, float]) -> Genome | None:
        """The best uniform network within limits, on the search items."""
        uniform = set(self.uniform)
        fits = [t for t in trials if t.genome in uniform and all(t.values[n] <= v for n, v in limits.items())]
        return min(fits, key=lambda t: t.values["error"]).genome if fits else None


def profiled(space: str, threads: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Measure the operations of a space's networks on this machine, keep them, and see how far off whole networks are.

    Returns:
        `operations`, `seconds` that it took, `threads`, `networks` that were measured, the `mean` and the `most` of
        |priced / measured - 1|, and `kept`, the file.

    Raises:
        UserError: there is no such space.
    """
    from trimtab.engine.costing import table_path

    start = time.perf_counter()
    told = progress or (lambda what, done, total: None)
    costs = Search(Request(space=space, threads=threads), Path("."), False, told).costs
    spent = time.perf_counter() - start
    rng = Random(3)  # other networks than those that calls were fitted to
    genomes = [costs.domain.random(rng) for _ in range(PROFILED)]
    priced, off = costs.price(genomes)["seconds"], []
    for i, genome in enumerate(genomes):
        off.append(abs(float(priced[i]) / costs.measure(genome) - 1))
        told("measure whole networks", i + 1, len(genomes))
    return {
        **{"operations": len(costs.measured), "seconds": spent, "threads": costs.threads, "networks": len(off)},
        **{"mean": sum(off) / len(off), "most": max(off), "kept": str(table_path(costs.threads))},
    }


def describe(
    space: str | None = None, data: str | None = None, progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """What there is to choose in a space or a trained model, and what it costs.

    Returns:
        `text`, `networks`, `knobs` (name, kind, options, when), and `ranges`: three points of each cost.

    Raises:
        UserError: see `search`.
    """
    run = Search(_request(space, data, **options), Path("."), False, progress or (lambda what, done, total: None))
    knobs = [
        {"name": k.name, "kind": k.kind, "options": list(k.options), "when": [[n, sorted(p)] for n, p in k.when]}
        for k in run.offered.knobs
    ]
    return {"text": run.described(), "networks": run.offered.count(), "knobs": knobs, "ranges": run.costs.ranges}
