"""Train a whole model on text or images: pretraining or full fine-tuning, with quality before and after.

    data -> windows, some kept apart -> memory plan -> train -> measure on what was kept apart -> a Hugging Face folder

The loop, the data, the checkpoints and the report are those of `adapting`; all of the model's parameters are trained.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.adapting import Asked, Progress, compared, material, open_base, scored, within
from trimtab.core.budget import parse_bytes
from trimtab.core.errors import UserError
from trimtab.core.journal import commit_folder, write_atomic, writing
from trimtab.core.level import parse_level
from trimtab.core.method import Estimator, Method, Optimiser, Policy, Wrapper
from trimtab.core.plan import parse_method

if TYPE_CHECKING:
    from torch import nn

    from trimtab.adapting import Base

PARTS: dict[str, tuple[type[Method], str]] = {
    "optimizer": (Optimiser, "updates no parameters"),
    "gradient": (Estimator, "estimates no gradient"),
    "freeze": (Policy, "freezes nothing"),
    "form": (Wrapper, "is no form of a matrix"),
}


@dataclass(frozen=True)
class Request(Asked):
    """What is asked of a training.

    Fields:
        model: name of a model, see `models.source`.
        data: JSON lines or text; labelled images for a classifier; None: what the model's task brings along.
        optimizer: name of an update rule with its fields.
        gradient: name of an estimator of gradients; None: the backward pass.
        freeze: name of a policy of frozen layers; None: nothing is frozen.
        form: name of what stands for each matrix of the blocks; None: the matrix itself.
        level: of the form, like `r16`.
        fresh: begin with weights drawn anew from the model's configuration.
        memory: most memory of the process; None: no limit.
        length: tokens of a window.
        pack, skip_bad: see `tasks.examples`.
        fresh_head: of a classifier: forget the classes that it knows, and train a head for the data's.
        tensorboard: write the curves for TensorBoard too, into the run's folder `tensorboard`.
        steps, batch, rate, decay, every, seed: see `engine.train.Recipe`.
    """

    model: str
    data: str | None = None
    optimizer: str = "apollo-mini"
    gradient: str | None = None
    freeze: str | None = None
    form: str | None = None
    level: str = "r16"
    fresh: bool = False
    memory: str | int | None = None
    length: int = 256
    pack: bool = True
    skip_bad: bool = False
    fresh_head: bool = False
    tensorboard: bool = False
    steps: int = 100
    batch: int = 4
    rate: float = 1e-3
    decay: float = 0.0
    every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in PARTS:
            self.part(name)
        parse_level(self.level)
        if self.form and not self.fresh:
            raise UserError(f"{self.form} forgets the weights that it stands for; train from nothing with --fresh")
        if self.memory is not None:
            parse_bytes(self.memory, "memory")
        self.recipe()

    def part(self, name: str) -> Any:
        """The method that a field of this request names, or None.

        Raises:
            UserError: there is no such method, or it is one of another kind.
        """
        text = getattr(self, name)
        if text is None:
            return None
        kind, lacks = PARTS[name]
        made = parse_method(text)
        if not isinstance(made, kind) or made.family() != "optim":
            raise UserError(f"{text} {lacks}; `trimtab methods --family optim` lists what does")
        return made


@dataclass
class TrainedModel:
    """What a training gives: the evidence, the module, and the folder of the model."""

    report: dict[str, Any]
    model: nn.Module
    folder: Path


def train(
    model: str,
    data: str | None = None,
    *,
    optimizer: str = "apollo-mini",
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> TrainedModel:
    """Train all of a model, and measure it on data that the training never saw.

    Args:
        model, data, optimizer: see `Request`.
        out: folder of the run: journal, log, checkpoints, model, report.
        resume: go on with the run in `out`.
        options: further fields of `Request`.

    Returns:
        The evidence, the trained module and the model's folder.

    Raises:
        UserError: bad input, or a loss that is no number. BudgetError: no setting fits the memory.
    """
    from trimtab.fitting import default_folder

    request = Request(model, data, optimizer, **options)
    folder = Path(out) if out is not None else default_folder(f"{Path(model).name}-trained")
    return _trained(request, folder, resume, progress or (lambda what, done, total: None))


def _trained(request: Request, out: Path, resume: bool, progress: Progress) -> TrainedModel:
    from trimtab.engine.freezing import Freezing
    from trimtab.engine.measure import peak_bytes
    from trimtab.engine.memory import FRUGAL, keep_freed_memory
    from trimtab.engine.train import train as loop
    from trimtab.optimising import optimiser_of
    from trimtab.parts.integer_weight import release
    from trimtab.parts.sparse_factors import SparseFactors
    from trimtab.report.events import Events

    events = Events(out / "tensorboard") if request.tensorboard else None
    started = time.perf_counter()
    if request.memory is not None:
        keep_freed_memory(FRUGAL)
    base = opened(request)
    data = material(base, request)
    rule, recipe, plan = request.part("optimizer"), request.recipe(), None
    before = scored(base.model, data)
    if request.form:
        formed(base, request.part("form"), request.level, request.seed)
    base.model.requires_grad_(True)
    optimiser, trained = optimiser_of(base.model, rule, request.rate, request.decay, request.seed)
    state = sum(rule.state_bytes(tuple(p.shape)) for p in trained)
    if request.memory is not None:
        state += sum(p.nbytes for p in trained)  # and the gradients
        recipe, plan = within(parse_bytes(request.memory, "memory"), base.model, data, recipe, trained, state)
        for parameter in trained if optimiser.means else ():
            optimiser.means.take(parameter)  # type: ignore[union-attr]  # of the passes that measured memory
    policy = request.part("freeze")
    freezing = policy and Freezing(base.model, blocks_of(base), policy, optimiser, recipe.steps, request.seed)
    asked = ("model", "optimizer", "gradient", "freeze", "form", "level", "fresh", "fresh_head", "length")
    done = loop(
        *(base.model, data.train, len(data.train), recipe, optimiser, out),
        gradient=request.part("gradient"),
        freezing=freezing,
        resume=resume,
        identity={k: getattr(request, k) for k in asked} | {"hash": base.hash, "data": data.hash},
        progress=progress,
        log=events.row if events else None,
    )
    after = scored(base.model.requires_grad_(True), data)
    folder, weights = out / "model", sum(t.untyped_storage().nbytes() for t in trained)
    weights += sum(h.nbytes for h in optimiser.held.values())
    weights += sum(b.nbytes for m in base.model.modules() if isinstance(m, SparseFactors) for b in m.buffers())
    release(base.model)
    for path, module in list(base.model.named_modules()):
        if isinstance(module, SparseFactors):
            base.model.set_submodule(path, module.merged())
    size = write_model(base, folder)
    report = {
        **{k: getattr(request, k) for k in asked},
        **{"task": data.task.name, "trained": sum(p.numel() for p in trained)},
        **{"state_bytes": optimiser.state_bytes(), "weight_bytes": weights},
        **{"items": len(data.train), "held_out": len(data.apart), "steps": recipe.steps},
        **{"recipe": asdict(recipe), "memory": plan, "notes": data.notes, "classes": list(base.classes) or None},
        **compared(data, before, after),
        **{"folder": str(folder), "bytes": size, "saved_bytes": done.saved_bytes, "peak_bytes": peak_bytes()},
        **{"loss": done.log[-1]["loss"] if done.log else None, "seconds": time.perf_counter() - started},
    }
    if events:
        events.close(report)
    write_atomic(out / "report.json", lambda p: p.write_text(json.dumps(report, indent=1), "utf-8"))
    return TrainedModel(report, base.model.eval(), folder)


def opened(request: Request) -> Base:
    """The model to train, in fp32, with weights drawn anew where that is asked for.

    Raises:
        UserError: there is no such model, it is packed, or it cannot be written as a folder of Hugging Face.
    """
    import torch

    base = open_base(request.model, length=request.length)
    if base.source is None:
        raise UserError(f"{request.model} is an artifact with packed weights; train the original, then fit it")
    if not hasattr(base.model, "save_pretrained"):
        raise UserError(
            f"{request.model} has no save_pretrained, and its result could not be kept; give a model of transformers"
        )
    if request.fresh:
        if not hasattr(base.model, "config"):
            raise UserError(f"{request.model} has no configuration to draw weights from; leave --fresh out")
        torch.manual_seed(request.seed)
        base.model = type(base.model)(base.model.config).to(torch.float32)
    return base


def formed(base: Base, form: Wrapper, level: str, seed: int) -> None:
    """Put a form of a matrix in place of every linear of the blocks.

    Raises:
        UserError: the level does not fit a linear, which the message names.
    """
    import torch

    for i, site in enumerate(s for s in base.sites if s.kind == "linear" and s.block is not None):
        rng = torch.Generator().manual_seed(seed * 100_003 + i)
        try:
            made = form.wrap(base.model.get_submodule(site.path), parse_level(level), rng=rng)
        except UserError as error:
            raise UserError(f"{site.path}: {error}") from error
        base.model.set_submodule(site.path, made)


def blocks_of(base: Base) -> dict[str, int]:
    """Every module that lies in a block, with the index of the block."""
    roots: dict[str, int] = {}
    for site in base.sites:
        if site.block is not None:
            parts = site.path.split(".")
            place = next(i for i, part in enumerate(parts) if part == str(site.block))
            roots[".".join(parts[: place + 1])] = site.block
    return {
        name: index
        for name, _ in base.model.named_modules()
        for root, index in roots.items()
        if name == root or name.startswith(f"{root}.")
    }


def write_model(base: Base, folder: Path) -> int:
    """Write a model as a plain folder of Hugging Face, with its tokenizer: all or nothing; its bytes on disk."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    temporary = folder.with_name(f".{folder.name}.part")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            base.model.save_pretrained(temporary)  # type: ignore[operator]
            for path in base.source.sidecars():
                if not (temporary / path.name).exists():
                    shutil.copyfile(path, temporary / path.name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    commit_folder(temporary, folder)
    return sum(p.stat().st_size for p in folder.iterdir())
