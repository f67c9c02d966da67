"""The main job: the best model that fits a budget, with measured evidence.

    probe -> allocate -> apply -> measure (tighten and repeat) -> verify in a fresh process -> verdict on data that the
    search never saw

Every finished step is committed to the run's journal; a run that was cut off goes on where it stopped and gives the
same bytes.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from trimtab.core.budget import Budget
from trimtab.core.errors import UserError
from trimtab.core.method import Allocator, Solver, did_you_mean, method
from trimtab.core.plan import Plan, parse_method

EFFORTS = ("quick", "standard", "thorough")
SOLVED = ("linear", "head", "embedding", "conv")  # kinds of site whose weights a search solves
TARGETS = ("native", "gguf", "compressed-tensors")
Progress = Callable[[str, int, int], None]


@dataclass
class Fit:
    """What a fit gives: `best` and `uniform` and `original` as points, the `front`, and where the artifact lies."""

    report_: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["report_"][name]
        except KeyError:
            raise AttributeError(name) from None

    def report(self) -> dict[str, Any]:
        """The evidence, as `trimtab fit --json` prints it."""
        return self.report_


@dataclass(frozen=True)
class Request:
    """What is asked of a fit; all of it is part of the run's identity.

    Fields:
        model: name of the model, see `models.source`.
        budget: the limits.
        data: calibration and evaluation data, see `tasks.build`; None: what the model or Python brings along.
        effort: `quick`, `standard` or `thorough`: how much is tried and how much data is used.
        target: what must be able to load the result; excludes levels before the search.
        plan: a plan to carry out in place of the search.
        methods: names of the methods that the search may use, see `menu`; empty: those of the menu.
        allocator: the allocator, with its fields: `milp`, `evopress(generations=5)`.
        length: tokens in a window of text.
        context, batch: the run that a memory budget is for.
        couple: sites that read one tensor share a choice, as fused kernels need it.
        padding: allow groups that do not divide a site's columns.
        heal: steps of training of the result towards the original's outputs, see `healing`; 0: none.
        seed: of everything random.
    """

    model: str
    budget: Budget = field(default_factory=Budget)
    data: str | None = None
    effort: str = "standard"
    target: str = "native"
    plan: str | None = None
    methods: tuple[str, ...] = ()
    allocator: str = "milp"
    length: int = 256
    context: int = 1024
    batch: int = 1
    couple: bool = True
    padding: bool = True
    heal: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for value, known, what in ((self.effort, EFFORTS, "effort"), (self.target, TARGETS, "target")):
            if value not in known:
                raise UserError(f"unknown {what} {value!r}{did_you_mean(value, known)}; choose from {', '.join(known)}")
        if not isinstance(parse_method(self.allocator), Allocator):
            raise UserError(f"{self.allocator} is no allocator; `trimtab methods --family alloc` lists them")
        if self.heal < 0:
            raise UserError(f"healing for {self.heal} steps was asked for; give 0 for none, or more")
        menu(self.effort, self.methods)
        if self.plan is not None:
            Plan.parse(self.plan)


def menu(effort: str, methods: Iterable[str] = ()) -> dict[str, Any]:
    """What a search at that effort tries at each kind of site, and how much data it uses.

    With methods named, these alone are tried, and `rtn`, which is all that some sites can take. A solver that the menu
    lacks is tried at the levels of its card, at the kinds of site of its card.

    Raises:
        UserError: a method is unknown, or the menu lacks it and no search can try it.
    """
    found: dict[str, Any] = tomllib.loads(files("trimtab").joinpath("menus.toml").read_text("utf-8"))[effort]
    named = tuple(methods)
    if not named:
        return found
    kinds = {kind: found[kind] for kind in (*SOLVED, "sublayer")}
    tried = {choice: choice.partition("@")[0].partition("(")[0] for choices in kinds.values() for choice in choices}
    for kind, choices in kinds.items():
        found[kind] = [c for c in choices if tried[c] in (*named, "rtn")]
    for name in dict.fromkeys(named):
        asked = method(name)
        if name in tried.values():
            continue
        if not isinstance(asked, Solver):
            where = "--allocator" if isinstance(asked, Allocator) else "--plan"
            raise UserError(
                f"{name} was named among the methods to search over, and a search tries methods that solve one weight "
                f"at a time, which {name} does not: give it with {where}"
            )
        for kind in asked.card.kinds & set(SOLVED):
            found[kind] += [f"{name}@{level}" for level in asked.card.levels]
    return found


def fit(
    model: str,
    *,
    budget: Budget | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Fit:
    """Give a model a budget, and get the best model that fits, with measured evidence.

    Args:
        model: a pocket model, a local Hugging Face folder, a hub name, or `module:function`.
        budget: the limits, as `Budget.of(size="60MB", quality="98%")`.
        out: folder of the run: journal, artifact, report.
        resume: go on with the run in `out`.
        progress: called with (what is being done, steps done, steps in all).
        options: further fields of `Request`.

    Returns:
        The evidence; `fit.best`, `fit.front`, `fit.report()`.

    Raises:
        UserError: bad input. BudgetError: no plan meets the budget.
    """
    request = Request(model, budget or Budget(), **options)
    if request.plan is None and not request.budget.limits():
        raise UserError(
            "a fit needs a budget: give at least one of --size, --memory, --latency, --quality, or a --plan"
        )
    from trimtab.job import Job

    return Fit(Job(request, Path(out or default_folder(model)), resume, progress).go())


def default_folder(model: str) -> Path:
    """`runs/<model>` with a number behind it if that is taken."""
    base = Path("runs") / Path(model).name.replace(":", "-")
    return next(
        p for i in range(1, 10_000) if not (p := base.with_name(f"{base.name}-{i}" if i > 1 else base.name)).exists()
    )


def read_plan(plan: str | None) -> str | None:
    """A plan's text, from text or from a TOML file.

    Raises:
        UserError: the file is missing or no plan.
    """
    if plan is None or not plan.endswith(".toml"):
        return plan
    path = Path(plan)
    if not path.is_file():
        raise UserError(f"there is no plan file {plan}")
    return str(Plan.from_toml(path.read_text("utf-8")))


def preview(model: str, *, budget: Budget | None = None, **options: Any) -> dict[str, Any]:
    """What a fit would try, and what it would cost, without doing it: units and choices, sizes, and an estimate of the
    time.

    Raises:
        UserError: bad input, or a size below the smallest plan.
    """
    import tempfile
    import time

    import torch

    from trimtab.job import Job
    from trimtab.kernels.profile import kept
    from trimtab.pace import speed_of

    with tempfile.TemporaryDirectory() as folder:
        job = Job(Request(model, budget or Budget(), **options), Path(folder) / "run", False)
        job.check_feasible()
        units, offered = job.units, job.offered
        smallest = job.fixed_bytes(offered) + sum(min(job.bytes_of(u, c) for c in u.choices) for u in offered)
        limited = job.request.budget.latency is not None
        speed = speed_of(job.pace, job.prices) if limited or kept(torch.get_num_threads()) else None
        start = time.perf_counter()
        job.reference  # noqa: B018 - one whole pass over the search data, which a probe costs a part of
        once = time.perf_counter() - start
    probes = sum(len(u.choices) for u in units)
    passes = 0.6 * probes + 4 * (len(job.menu["front"]) + 5)  # a probe starts at its block, half way through on average
    size = job.request.budget.size
    return {
        **{
            "model": model,
            "task": job.task.name,
            "original_bytes": job.source.bytes,
            "smallest_bytes": smallest,
            "probes": probes,
        },
        **{
            "seconds": passes * once,
            "units": [
                {"name": u.name, "role": u.sites[0].role, "weights": u.weights, "choices": list(u.choices)}
                for u in units
            ],
            "speed": speed,
        },
        "feasible": "no size is asked for"
        if size is None
        else "the original fits"
        if size >= job.source.bytes
        else "the size is feasible",
    }
