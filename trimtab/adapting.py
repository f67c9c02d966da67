"""Adapt a model to data within a memory budget: a small trained delta, with quality before and after.

    data -> windows, some kept apart -> statistics, where the method asks for any -> wrap -> memory plan -> train
    -> measure on what was kept apart -> adapter

The base may be a model or an artifact of a fit, whose linears then stay packed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.budget import parse_bytes, say_bytes
from trimtab.core.errors import BudgetError, UserError
from trimtab.core.journal import write_atomic
from trimtab.core.level import Level, parse_level
from trimtab.core.method import Method, Wrapper, did_you_mean
from trimtab.core.plan import parse_method
from trimtab.core.site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trimtab.core.level import Shape
    from trimtab.engine.train import Recipe
    from trimtab.parts.saving import Codec
    from trimtab.tasks.base import Batch, Scores, Task
    from trimtab.tasks.training import Prediction

Progress = Callable[[str, int, int], None]
STATISTICS_ITEMS = 16  # that gram, absmean and gradient are collected on
AUTO = ("lora(scaling='root')", "paca", "lora-ga", "dora")
AUTO_SHARE = 0.1  # of the steps, for each method that is tried
OUTPUTS = 1 << 24  # of a model that are there at once when it is measured, 64 MB
LADDER: tuple[tuple[Codec, float], ...] = (("exact", 0.22), ("exact", 1.0), ("int8", 1.0), ("int4", 1.0))


class Asked:
    """What every request for a training says of its data, and the recipe that it gives."""

    data: str | None
    length: int
    pack: bool
    skip_bad: bool
    fresh_head: bool
    tensorboard: bool
    seed: int

    def recipe(self) -> Recipe:
        """The training's recipe, before a memory budget changes it."""
        from trimtab.engine.train import Recipe

        return Recipe(
            **{k: getattr(self, k) for k in ("steps", "batch", "rate", "decay", "every", "seed")}  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Request(Asked):
    """What is asked of an adaptation.

    Fields:
        model: name of a model, see `models.source`, or folder of an artifact or of a fit's run.
        data: JSON lines or text; labelled images for a classifier; None: what the model's task brings along.
        method: name of a wrapper with its fields, or `auto`.
        level: its level, like `r16`.
        targets: roles, names or globs of the linears to adapt; empty: those of the method, else all of the blocks.
        memory: most memory of the process; None: no limit.
        length: tokens of a window.
        pack, skip_bad: see `tasks.examples`.
        fresh_head: of a classifier: forget the classes that it knows, and train a head for the data's.
        tensorboard: write the curves for TensorBoard too, into the run's folder `tensorboard`.
        dtype: what the frozen weights are held and computed in: `fp32` or `bf16`; what is trained is fp32.
        steps, batch, rate, decay, every, seed: see `engine.train.Recipe`.
    """

    model: str
    data: str | None = None
    method: str = "lora"
    level: str = "r16"
    targets: tuple[str, ...] = ()
    memory: str | int | None = None
    length: int = 256
    pack: bool = True
    skip_bad: bool = False
    fresh_head: bool = False
    tensorboard: bool = False
    dtype: str = "fp32"
    steps: int = 100
    batch: int = 4
    rate: float = 1e-3
    decay: float = 0.0
    every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16"):
            raise UserError(f"weights of type {self.dtype!r} were asked for; a model is adapted in fp32 or bf16")
        parse_level(self.level)
        if self.method != "auto" and not isinstance(parse_method(self.method), Wrapper):
            raise UserError(f"{self.method} adapts nothing; `trimtab methods --family adapt` lists what does")
        if self.memory is not None:
            parse_bytes(self.memory, "memory")
        self.recipe()


@dataclass
class Adapted:
    """What an adaptation gives: the evidence, the adapted module, and the folder of the adapter."""

    report: dict[str, Any]
    model: nn.Module
    folder: Path


@dataclass
class Base:
    """A model to adapt: its weights in memory or packed, its sites and blocks, tokenizer and task; an artifact's
    folder; path and classes of a fresh head.
    """

    name: str
    model: nn.Module
    hash: str
    task: str
    sites: list[Site]
    siblings: tuple[tuple[str, ...], ...]
    tokenizer: Any
    source: Any
    context: int | None = None
    blocks: tuple[str, ...] = ()
    folder: Path | None = None
    head: str | None = None
    classes: tuple[str, ...] = ()


@dataclass
class Material:
    """Items to train on and items kept apart, and what is to be said of the data."""

    train: Prediction
    apart: Batch
    task: Task
    hash: str
    notes: list[str] = field(default_factory=list)


def adapt(
    model: str,
    data: str | None = None,
    *,
    method: str | Method = "lora",
    level: str | Level = "r16",
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Adapted:
    """Train a small delta on a frozen model, and measure it on data that the training never saw.

    Args:
        model, data, method, level: see `Request`; the method may be given as an object too.
        out: folder of the run: journal, log, checkpoints, adapter, report.
        resume: go on with the run in `out`.
        options: further fields of `Request`.

    Returns:
        The evidence, the adapted module and the adapter's folder.

    Raises:
        UserError: bad input, or a loss that is no number. BudgetError: no setting fits the memory.
    """
    from trimtab.fitting import default_folder

    name = method if isinstance(method, str) else _text(method)
    request = Request(model, data, name, str(level), **options)
    folder = Path(out) if out is not None else default_folder(f"{Path(model).name}-adapted")
    return _Job(request, folder, resume, progress or (lambda what, done, total: None)).go()


def _text(chosen: Method) -> str:
    config = ", ".join(f"{k}={v!r}" for k, v in chosen.config().items())
    return f"{chosen.card.name}({config})" if config else chosen.card.name


# ---- the base


def open_base(name: str, dtype: str = "fp32", length: int = 256) -> Base:
    """A model, or an artifact whose linears stay packed.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    import torch

    from trimtab.core.modelmap import trace
    from trimtab.models.artifact import is_artifact
    from trimtab.models.source import fill, open_source

    folder = Path(name).expanduser()
    folder = folder / "artifact" if is_artifact(folder / "artifact") else folder
    if is_artifact(folder):
        return _open_artifact(name, folder)
    source = open_source(name)
    model = source.skeleton()
    fill(model, source.names, source.read, torch.bfloat16 if dtype == "bf16" else None)
    one = _one(source.config, source.task)
    mapped = trace(source.skeleton(), one if source.config.get("architectures") else tuple(one.values()))
    tokenizer = source.tokenizer() if source.task != "classification" else None
    context = source.config.get("max_position_embeddings") or source.config.get("n_positions")
    return Base(
        name,
        model,
        source.hash,
        source.task,
        list(mapped.sites),
        mapped.siblings,
        tokenizer,
        source,
        context,
        mapped.blocks,
    )


def _open_artifact(name: str, folder: Path) -> Base:
    from transformers import AutoTokenizer

    from trimtab.core.modelmap import trace
    from trimtab.formats.checkpoint import Checkpoint
    from trimtab.formats.structure import replay
    from trimtab.models.artifact import build, make_skeleton, open_artifact
    from trimtab.models.source import read_config

    contents = open_artifact(folder)
    skeleton = make_skeleton(contents)
    replay(skeleton, contents.manifest["edits"])
    task, config = contents.manifest["task"], read_config(folder)
    one = _one(config, task)
    mapped = trace(skeleton, one if config.get("architectures") else tuple(one.values()))
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = build(contents, packed=True, tables=True)
    hashed = Checkpoint(folder).hash()[:16]
    context = config.get("max_position_embeddings") or config.get("n_positions")
    return Base(
        name, model, hashed, task, list(mapped.sites), mapped.siblings, tokenizer, None, context, mapped.blocks, folder
    )


def _one(config: Mapping[str, Any], task: str) -> dict[str, Tensor]:
    import torch

    if task != "classification":
        return {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    size = config.get("image_size", 16)
    names = ("num_channels", "channels", "image_channels")
    channels = next((config[name] for name in names if name in config), 3)
    return {"pixel_values": torch.zeros(1, channels, size, size)}


def chosen_sites(base: Base, targets: Sequence[str], chosen: Wrapper) -> list[Site]:
    """The linears to adapt, or the blocks, for a method that is put on these.

    Raises:
        UserError: a target names none of the model's linears, or the method takes no targets.
    """
    if "block" in chosen.card.kinds:
        if targets or not base.blocks:
            raise UserError(
                f"{chosen.card.name} is put on all blocks of a model, and takes no targets; {base.name} has "
                f"{len(base.blocks)} blocks"
            )
        return [Site(path, "block", (), i, "block") for i, path in enumerate(base.blocks)]
    fit = [s for s in base.sites if s.kind in chosen.card.kinds and s.kind == "linear"]
    if not targets:
        roles = getattr(chosen, "roles", ())
        inside = [s for s in fit if s.block is not None] or fit
        found = [s for s in inside if not roles or s.role in roles]
        if not found:
            raise UserError(f"{base.name} has no linear that {chosen.card.name} adapts; name some with --targets")
        return found
    names = {
        t: [s for s in fit if t in (s.role, s.path, s.path.rpartition(".")[2]) or fnmatchcase(s.path, t)]
        for t in targets
    }
    for target, sites in names.items():
        if not sites:
            known = sorted({s.role for s in fit} | {s.path.rpartition(".")[2] for s in fit})
            raise UserError(
                f"no linear of {base.name} is called {target!r}{did_you_mean(target, known)}; there are "
                f"{', '.join(known)}"
            )
    picked = {s.path for sites in names.values() for s in sites}
    return [s for s in fit if s.path in picked]


# ---- the data


def material(base: Base, request: Asked) -> Material:
    """The data as items to train on and items kept apart.

    Raises:
        UserError: they are missing, empty, damaged, or of another kind than the model takes.
    """
    from trimtab.tasks.base import Batch
    from trimtab.tasks.causal_lm import CausalLM
    from trimtab.tasks.training import Prediction

    if base.task == "classification":
        return _labelled(base, request)
    if request.fresh_head:
        raise UserError(f"a fresh head was asked for, and {base.name} is for {base.task}; classifiers can be given one")
    if base.task != "causal-lm":
        raise UserError(f"{base.name} is for {base.task}; causal language models and classifiers can be trained")
    if request.data is None:
        raise UserError("there is nothing to train on; give JSON lines or a text file with --data")
    from trimtab.tasks.examples import read_examples, split_examples, windows

    length = min(request.length, base.context or request.length)
    if length < 8:
        raise UserError(f"windows of {length} tokens were asked for; 8 or more are needed")
    examples, bad = read_examples(Path(request.data).expanduser(), request.skip_bad)
    ours, apart = split_examples(examples)
    train, held = (windows(part, base.tokenizer, length, request.pack) for part in (ours, apart))
    _known_tokens(base, train.tokens)
    notes = [f"{bad} bad lines were left out"] if bad else []
    if count := train.truncated + held.truncated:
        notes.append(f"{count} examples were longer than {length} tokens and lost their end")
    if length < request.length:
        notes.append(f"windows are of {length} tokens, the model's context, and not of {request.length}")
    task = CausalLM({"test": held.tokens}, {"test": held.bytes})
    digest = hashlib.sha256(train.tokens.numpy().tobytes() + held.labels.numpy().tobytes()).hexdigest()[:16]
    return Material(
        Prediction({"input_ids": train.tokens}, train.labels, {"use_cache": False}),
        Batch({"input_ids": held.tokens}, held.labels, held.bytes),
        *(task, digest, notes),
    )


def _known_tokens(base: Base, tokens: Tensor) -> None:
    vocabulary = base.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if int(tokens.max()) >= vocabulary:
        raise UserError(
            f"the tokenizer gives token {int(tokens.max())}, and the model knows {vocabulary}: this tokenizer belongs "
            "to another model; put the model's own tokenizer files into its folder"
        )


def _labelled(base: Base, request: Asked) -> Material:
    from trimtab.models.head import give_head
    from trimtab.tasks.build import task_for
    from trimtab.tasks.training import Prediction

    if base.source is None:
        raise UserError(f"{base.name} is an artifact of a classifier; adapt the original, then fit it")
    task = task_for(base.source, request.data, fresh_head=request.fresh_head)
    notes = []
    if request.fresh_head:
        base.classes = task.names  # type: ignore[attr-defined]
        base.head = give_head(base.model, base.sites, base.classes, request.seed)
        notes.append(f"the head is fresh, of {len(base.classes)} classes: before it was trained it knew none of them")
    train, apart = task.batch("calibration", 1 << 30, 0), task.batch("test", 1 << 30, 0)
    digest = task.data_hash()
    return Material(Prediction(train.inputs, train.labels), apart, task, digest, notes)


# ---- statistics


def collect(
    base: Base, data: Material, sites: Iterable[Site], wanted: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    """What a method asks for by site: input statistics and the loss's gradient, on a few items of the training data."""
    import torch

    from trimtab.engine.stats import INPUT_STATS, Collector
    from trimtab.engine.train import order
    from trimtab.parts.shared import Shared

    sites = list(sites)
    places = order(len(data.train), min(STATISTICS_ITEMS, len(data.train)), 0, seed + 1)
    found: dict[str, dict[str, Any]] = {s.path: {} for s in sites}
    base.model.eval()
    if asked := INPUT_STATS & set(wanted):
        collector = Collector(sites, base.siblings, {s.path: asked for s in sites})
        with collector.attached(base.model), torch.no_grad():
            for part in places.split(4):
                data.train(base.model, part)
        for path, stats in collector.result().items():
            found[path] |= stats
    if "grad" in wanted:
        for path, grad in _gradients(base, data, sites, places).items():
            found[path]["grad"] = grad
    shared = Shared(_widths(base, data, sites) if sites[0].kind == "block" else tuple(s.shape for s in sites))
    for i, site in enumerate(sites):
        found[site.path]["shared"] = shared.at(i)
        found[site.path]["rng"] = torch.Generator().manual_seed(seed * 100_003 + i)
    return found


def _widths(base: Base, data: Material, sites: list[Site]) -> tuple[Shape, ...]:
    """The residual's width at each block."""
    import torch

    found: dict[str, int] = {}
    handles = []

    def see(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            found[path] = (out[0] if isinstance(out, tuple) else out).shape[-1]

        return hook

    try:
        handles = [base.model.get_submodule(s.path).register_forward_hook(see(s.path)) for s in sites]
        with torch.no_grad():
            data.train(base.model, torch.zeros(1, dtype=torch.int64))
    finally:
        for handle in handles:
            handle.remove()
    return tuple((found[s.path], found[s.path]) for s in sites)


def _gradients(base: Base, data: Material, sites: list[Site], places: Tensor) -> dict[str, Tensor]:
    """dL/dW of each site, from what goes in and what comes back: the matrices themselves stay frozen."""
    import torch

    sums: dict[str, Tensor] = {}
    handles = []

    def watch(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            out = out if out.requires_grad else out.detach().requires_grad_()

            def back(grad: Tensor) -> None:
                part = grad.reshape(-1, grad.shape[-1]).float().T @ rows.float()
                sums[path] = sums[path].add_(part) if path in sums else part

            out.register_hook(back)
            return out

        return hook

    try:
        for site in sites:
            handles.append(base.model.get_submodule(site.path).register_forward_hook(watch(site.path)))
        count = 0
        for part in places.split(2):
            with torch.enable_grad():
                value, n = data.train(base.model, part)
            value.backward()
            count += n
    finally:
        for handle in handles:
            handle.remove()
    return {path: total.div_(max(1, count)) for path, total in sums.items()}


# ---- the job


class _Job:
    def __init__(self, request: Request, out: Path, resume: bool, progress: Progress) -> None:
        self.request, self.out, self.resume, self.progress = request, out, resume, progress
        self.started = time.perf_counter()

    def go(self) -> Adapted:
        import torch

        from trimtab.engine.measure import peak_bytes
        from trimtab.engine.memory import FRUGAL, keep_freed_memory
        from trimtab.engine.train import train
        from trimtab.report.events import Events

        request = self.request
        events = Events(self.out / "tensorboard") if request.tensorboard else None
        if request.memory is not None:
            keep_freed_memory(FRUGAL)
        base = open_base(request.model, request.dtype, request.length)
        data = material(base, request)
        name = self._tried(base, data) if request.method == "auto" else request.method
        chosen: Wrapper = parse_method(name)  # type: ignore[assignment]
        sites = chosen_sites(base, request.targets, chosen)
        level = parse_level(request.level)
        recipe, plan = request.recipe(), None
        before = scored(base.model, data)
        wrap_all(base, data, sites, chosen, level, request.seed)
        trained = [p for p in base.model.parameters() if p.requires_grad]
        if request.memory is not None:
            state = 3 * sum(p.nbytes for p in trained)  # gradients and both moments
            recipe, plan = within(parse_bytes(request.memory, "memory"), base.model, data, recipe, trained, state)
        optimiser = torch.optim.AdamW(trained, lr=request.rate, weight_decay=request.decay, fused=True)
        identity: dict[str, Any] = {
            **{"model": request.model, "hash": base.hash, "data": data.hash, "method": name, "level": request.level},
            **{"sites": [s.path for s in sites], "length": request.length, "dtype": request.dtype},
            **({"classes": list(base.classes)} if base.head else {}),
        }
        done = train(
            *(base.model, data.train, len(data.train), recipe, optimiser, self.out),
            resume=self.resume,
            identity=identity,
            progress=self.progress,
            log=events.row if events else None,
        )
        after = scored(base.model, data)
        about: dict[str, Any] = {
            "method": name,
            "level": request.level,
            "hash": base.hash,
            "base": request.model,
            "data": data.hash,
        }
        if base.head:
            about |= {"head": base.head, "classes": list(base.classes)}
        from trimtab.models.adapter import frames, write_adapter, write_merged
        from trimtab.parts.trained_grid import OnGrid

        folder, artifact = self.out / "adapter", None
        size = write_adapter(folder, base.model, about, request.model, base.task)
        if base.folder is not None and all(isinstance(f, OnGrid) for f in frames(base.model).values()):
            artifact = str(self.out / "artifact")
            write_merged(base.folder, base.model, self.out / "artifact")
        numbers = sum(p.numel() for p in trained)
        report = {
            **{"model": request.model, "task": data.task.name, "method": name, "level": request.level},
            **{"sites": [s.path for s in sites], "trained": numbers, "trained_bytes": 4 * numbers},
            **{"items": len(data.train), "held_out": len(data.apart), "steps": recipe.steps},
            **{"recipe": asdict(recipe), "memory": plan, "notes": data.notes, "classes": list(base.classes) or None},
            **compared(data, before, after),
            **{"adapter": str(folder), "adapter_bytes": size, "artifact": artifact, "saved_bytes": done.saved_bytes},
            **{"peak_bytes": peak_bytes(), "loss": done.log[-1]["loss"] if done.log else None},
            **{"seconds": time.perf_counter() - self.started},
        }
        if events:
            events.close(report)
        write_atomic(self.out / "report.json", lambda p: p.write_text(json.dumps(report, indent=1), "utf-8"))
        return Adapted(report, base.model.eval(), folder)

    def _tried(self, base: Base, data: Material) -> str:
        """The method whose loss falls lowest in a tenth of the steps, on training items that the trial leaves out."""
        import torch

        from trimtab.engine.train import train
        from trimtab.tasks.base import Batch
        from trimtab.tasks.training import Prediction

        n = len(data.train)
        cut = max(1, n - max(1, n // 8))
        ours = Prediction(
            {k: v[:cut] for k, v in data.train.inputs.items()}, data.train.labels[:cut], data.train.options
        )
        rest = {k: v[cut:][:64] for k, v in data.train.inputs.items()}
        labels = data.train.labels[cut:][:64]
        judged = replace(data, train=ours, apart=Batch(rest, labels, torch.ones(len(labels))))
        if not len(labels):
            return AUTO[0]
        losses: dict[str, float] = {}
        recipe = replace(self.request.recipe(), steps=max(8, round(AUTO_SHARE * self.request.steps)), every=0)
        originals = {}
        for i, name in enumerate(AUTO):
            chosen: Wrapper = parse_method(name)  # type: ignore[assignment]
            sites = chosen_sites(base, self.request.targets, chosen)
            originals = {s.path: base.model.get_submodule(s.path) for s in sites}
            if base.head:
                originals[base.head] = copy.deepcopy(base.model.get_submodule(base.head))
            try:
                wrap_all(base, judged, sites, chosen, parse_level(self.request.level), self.request.seed)
                trained = [p for p in base.model.parameters() if p.requires_grad]
                optimiser = torch.optim.AdamW(trained, lr=self.request.rate, fused=True)
                train(base.model, ours, len(ours), recipe, optimiser)
                scores = scored(base.model, judged)
                losses[name] = float(scores.nll.sum() / scores.count.sum())
            except UserError:  # one that cannot be had at this level is not chosen
                losses[name] = float("inf")
            finally:
                for path, module in originals.items():
                    base.model.set_submodule(path, module)
            self.progress("try methods", i + 1, len(AUTO))
        best = min(losses, key=lambda k: losses[k])
        data.notes.append(
            "auto: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()) + f" nats after {recipe.steps} steps"
        )
        return best


def wrap_all(base: Base, data: Material, sites: Sequence[Site], chosen: Wrapper, level: Level, seed: int) -> None:
    """Put a method onto the sites of a model, in place; a fresh head is trained beside it.

    Raises:
        UserError: the level does not fit a site, which the message names.
    """
    for p in base.model.parameters():
        p.requires_grad_(False)
    stats = collect(base, data, sites, chosen.needs(), seed)
    made = {}
    for site in sites:
        module = base.model.get_submodule(site.path)
        try:
            made[site.path] = chosen.wrap(module, level, **{k: stats[site.path][k] for k in chosen.needs()})
        except UserError as error:
            raise UserError(f"{site.path}: {error}") from error
    for path, module in made.items():
        base.model.set_submodule(path, module)
    if base.head:
        base.model.get_submodule(base.head).requires_grad_(True)


def scored(model: nn.Module, data: Material) -> Scores:
    """Scores of the items kept apart."""
    import torch

    task, parts = data.task, []
    outputs = data.apart.labels[:1].numel() * getattr(getattr(model, "config", None), "vocab_size", 1)  # of an item
    step = max(1, min(task.chunk, OUTPUTS // outputs))
    model.eval()
    with torch.no_grad():
        for i in range(0, len(data.apart), step):
            part = data.apart.take(i, i + step)
            output = model(**part.inputs, **task.options) if hasattr(model, "config") else model(*part.inputs.values())
            parts.append(task.score(output, part.labels, None))
    return parts[0].join(parts)


def compared(data: Material, before: Scores, after: Scores) -> dict[str, Any]:
    """A report's entries on the items kept apart: both values with intervals, their paired difference, the verdict."""
    from trimtab.tasks.base import bootstrap

    task, amounts = data.task, data.apart.amounts
    ours, theirs, difference = bootstrap(task, after, before, amounts)
    values = {"before": (before, theirs), "after": (after, ours)}
    found: dict[str, Any] = {"metric": task.metric, "difference": list(difference)}
    for name, (scores, span) in values.items():
        found[name] = {"value": task.overall(scores, amounts), "low": span[0], "high": span[1]}
    better = difference[0] > 0 if task.higher else difference[1] < 0
    worse = difference[1] < 0 if task.higher else difference[0] > 0
    found["verdict"] = "better" if better else "worse" if worse else "no difference that these items show"
    return found


# ---- memory


def within(
    limit: int, model: nn.Module, data: Material, recipe: Recipe, trained: Sequence[nn.Parameter], state: int
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe changed so that the process stays within a limit: first by what costs time alone, then by codecs.
    Freed memory is given back at once, unless there is twice what is needed.

    One item is passed through once with each setting; what a step needs is what is held now, gradients and the
    optimiser's state, and the measured bytes of each item that is in flight.

    Args:
        state: bytes of the gradients and the optimiser's state.

    Raises:
        BudgetError: nothing fits; the message says what would.
    """
    sizes = [recipe.batch]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    exact = [s for s in LADDER if s[0] == "exact"]
    tries = [(sizes[0], s) for s in exact] + [(m, exact[-1]) for m in sizes[1:]]
    tries += [(m, s) for s in LADDER if s[0] != "exact" for m in sizes[-1:]]
    found: tuple[Recipe, dict[str, Any]] | None = None
    for frugal in (True, False):  # what a process keeps for itself it does not give back later
        fixed, items = _passed(model, data, trained, frugal)
        for micro, (codec, share) in tries:
            needs = _around(fixed + state + micro * items[codec, share])
            if needs <= limit:
                plan = {"limit": limit, "expected": needs, "held": fixed, "state": state}
                found = replace(recipe, micro=micro, codec=codec, recompute=share, frugal=frugal), plan
                break
        if found is None or 2 * found[1]["expected"] > limit:
            break
    if found is not None:
        return found
    raise BudgetError(
        f"{say_bytes(limit)} of memory were asked for, and the least that fits is "
        f"{say_bytes(_around(fixed + state + items[LADDER[-1]]))}: {say_bytes(fixed)} for the process with its "
        f"weights, {say_bytes(state)} for gradients and the optimiser, {say_bytes(items[LADDER[-1]])} for one item in "
        "flight, and a twentieth for what is done around the steps; raise --memory, shorten --length, lower --rank, "
        "hold weights in bf16, or adapt a fitted artifact"
    )


def _around(needs: int) -> int:
    """With what is evaluated and written around the steps."""
    return needs + needs // 20


def _passed(
    model: nn.Module, data: Material, trained: Sequence[nn.Parameter], frugal: bool
) -> tuple[int, dict[tuple[Codec, float], int]]:
    """Bytes that the process holds, and that one item takes in flight with each setting of the ladder."""
    import torch

    from trimtab.engine.measure import forget_peak, held_bytes, peak_bytes
    from trimtab.engine.memory import FRUGAL, give_back_freed_memory, keep_freed_memory
    from trimtab.engine.train import training_mode
    from trimtab.parts.saving import Saver

    def saver(setting: tuple[Codec, float]) -> Saver:
        return Saver([*model.parameters(), *model.buffers()], *setting)

    keep_freed_memory(FRUGAL if frugal else None)
    training_mode(model)
    one = torch.zeros(1, dtype=torch.int64)
    with saver(LADDER[-1]):
        data.train(model, one)  # what is made once is there
    give_back_freed_memory()
    fixed = held_bytes()
    forget_peak()
    with (lean := saver(LADDER[-1])):  # before the others: what they leave behind does not count
        value, _ = data.train(model, one)
    value.backward()
    del value
    rest = max(0, peak_bytes() - fixed - lean.held)
    for p in trained:
        p.grad = None
    kept = {}
    for setting in LADDER:
        with (passing := saver(setting)):
            value, _ = data.train(model, one)
        kept[setting] = passing.held + rest  # while the graph is there
        del value
    return fixed, kept
