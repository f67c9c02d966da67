"""The one training loop: batches, loss, backward, optimiser; what autograd keeps goes through a saver.

Everything random follows from seed and step, the place in the data from the step alone, and a checkpoint holds what is
trained, the optimiser's state and torch's generator: a run that was killed goes on with the same bytes. A checkpoint is
whole or absent; the last good one stays until the next is on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.journal import Journal, write_atomic, writing
from trimtab.core.method import Estimator
from trimtab.engine.freezing import Freezing
from trimtab.engine.memory import FRUGAL, keep_freed_memory
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.parts.integer_weight import Held
from trimtab.parts.norms import rms_norm, rms_norms
from trimtab.parts.saving import Codec, Saver

LOG = "train-log.jsonl"
SCHEDULES = ("cosine", "linear", "constant")
Loss = Callable[[nn.Module, Tensor], tuple[Tensor, int]]
"""What a micro-batch, given by the places of its items, costs: the sum over its predictions, and how many they are."""


@dataclass(frozen=True)
class Recipe:
    """How a training runs.

    Fields:
        steps: optimiser steps.
        batch: items of a step.
        micro: items of one forward; 0: all of a step's. The gradients of a step are those of its whole batch.
        rate: largest learning rate.
        warmup: share of the steps over which the rate rises from 0.
        schedule: `cosine`, `linear` or `constant` behind the warm-up, down to a tenth of the rate.
        decay: decoupled weight decay.
        clip: largest norm of the whole gradient; 0: no limit.
        codec, recompute: how what autograd keeps is kept, see `trimtab.parts.saving`.
        every: steps between two checkpoints; 0: one at the end.
        frugal: give large blocks back to the system as they are freed: least memory, and more time.
        seed: of the order of the items, and of torch's generator.
    """

    steps: int = 100
    batch: int = 4
    micro: int = 0
    rate: float = 1e-3
    warmup: float = 0.05
    schedule: str = "cosine"
    decay: float = 0.0
    clip: float = 1.0
    codec: Codec = "exact"
    recompute: float = 0.22
    every: int = 0
    frugal: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} was asked for; a training takes 1 or more")
        if not 0 < self.rate < math.inf:
            raise UserError(f"a learning rate of {self.rate} was asked for; give a number above 0, like 1e-3")
        if self.schedule not in SCHEDULES:
            raise UserError(f"the schedule {self.schedule!r} was asked for; choose from {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup < 1:
            raise UserError(f"a warm-up of {self.warmup} was asked for; it is a share of the steps, from 0 to below 1")
        Saver(codec=self.codec, recompute=self.recompute)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        >>> [round(Recipe(steps=4, rate=1.0, warmup=0.5).rate_at(i), 2) for i in range(4)]
        [0.5, 1.0, 1.0, 0.55]
        """
        first = round(self.warmup * self.steps)
        if step < first:
            return self.rate * (step + 1) / first
        done = (step - first) / max(1, self.steps - first)
        if self.schedule == "constant":
            return self.rate
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return self.rate * (0.1 + 0.9 * left)


@dataclass
class Trained:
    """What a training did: the log's rows, most bytes that autograd kept, and seconds of each step of this process."""

    log: list[dict[str, Any]] = field(default_factory=list)
    saved_bytes: int = 0
    seconds: list[float] = field(default_factory=list)


def order(items: int, batch: int, step: int, seed: int) -> Tensor:
    """Places of a step's items: pass after pass over all of them, each in an order of its own.

    >>> sorted(torch.cat([order(6, 2, step, seed=0) for step in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    found: list[int] = []
    place = step * batch
    while len(found) < batch:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + place // items)
        whole = torch.randperm(items, generator=rng)
        part = whole[place % items : place % items + batch - len(found)]
        found += part.tolist()
        place += len(part)
    return torch.tensor(found)


def train(
    model: nn.Module,
    loss: Loss,
    items: int,
    recipe: Recipe,
    optimiser: torch.optim.Optimizer,
    folder: Path | None = None,
    *,
    gradient: Estimator | None = None,
    backward: Callable[[Tensor, int], tuple[float, int]] | None = None,
    freezing: Freezing | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    watch: Callable[[int, float], None] | None = None,
    log: Callable[[Mapping[str, Any]], None] | None = None,
) -> Trained:
    """Train what requires a gradient in a model.

    Args:
        loss: see `Loss`; an estimator takes its method `items`, see `tasks.training.Prediction`.
        items: how many there are.
        optimiser: over the model's trained parameters; its learning rate is set at each step, group by group in
            proportion to what each had at first.
        folder: of the journal, the log and the checkpoints; None: none are written.
        gradient: where a step's gradient comes from; None: backward of the whole batch's loss.
        backward: called with the places of a step's items and the step, in place of all of this; leaves the gradients
            of a sum behind, and returns the sum and of how many predictions it is.
        freezing: what is frozen at a step; None: nothing.
        resume: go on with the run in `folder`.
        identity: what the run is of, and what must be the same for it to go on.
        watch: called with each step and its loss.
        log: called with each row of the log.

    Raises:
        UserError: the loss is no number at a step (the last good checkpoint stays), the folder holds another run, or
            the disk is full.
    """
    # forward passes alone are for least memory: what is kept would lie around in pieces
    frugal = recipe.frugal or (gradient is not None and gradient.streams)
    keep_freed_memory(FRUGAL if frugal else None)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise UserError("nothing in the model is trained; choose a method, or parameters to train")
    header = {"recipe": asdict(recipe), **(identity or {})}
    book = _Book(folder, resume, header, _stored(model, named), optimiser, freezing) if folder else None
    torch.manual_seed(recipe.seed)
    first = book.load() if book else 0
    shares = [group["lr"] / max(optimiser.param_groups[0]["lr"], 1e-30) for group in optimiser.param_groups]
    shares = [share if share > 0 else 1.0 for share in shares]
    saver = Saver([*model.parameters(), *model.buffers()], recipe.codec, recipe.recompute)
    training_mode(model)
    done = Trained(log=book.rows if book else [])
    last = first
    with lean_norms(model):
        for step in range(first, recipe.steps):
            start = time.perf_counter()
            for group, share in zip(optimiser.param_groups, shares, strict=True):
                group["lr"] = recipe.rate_at(step) * share
            if freezing:
                freezing.turn(step)
            places = order(items, recipe.batch, step, recipe.seed)
            found: Iterable[tuple[str, Tensor]] = ()
            if backward is not None:
                total, count = backward(places, step)
                mean, norm = total / count, _scaled(named.values(), count, recipe.clip)
            elif gradient is None:
                total, count = _gradients(model, loss, places, recipe.micro or recipe.batch, saver, done)
                mean, norm = total / count, _scaled(named.values(), count, recipe.clip)
            else:
                mean, found = _estimated(model, loss, places, step, recipe, gradient, saver)
                done.saved_bytes = max(done.saved_bytes, saver.peak)
                norm = 0.0
                if not gradient.streams:
                    for name, grad in found:
                        named[name].grad = grad
                    norm = _scaled(named.values(), 1, recipe.clip)
            if not (math.isfinite(mean) and math.isfinite(norm)):
                kept = f"the last good checkpoint, of step {last}, stays in {folder}" if folder else "nothing was saved"
                raise UserError(
                    f"step {step + 1}: the loss is {mean:.4g} and the gradient's norm {norm:.4g}, which is no number "
                    f"to go on with; {kept}. Train with a lower rate than {recipe.rate:g}, or in fp32"
                )
            if gradient is not None and gradient.streams:
                norm = _streamed(found, named, optimiser)
            else:
                optimiser.step()
            for p in named.values():
                if p.grad is not None:
                    p.grad.zero_()  # kept, so that no step has to find memory for it again
            if freezing:
                freezing.turned()
            done.seconds.append(time.perf_counter() - start)
            row = {"step": step + 1, "loss": mean, "norm": norm, "rate": recipe.rate_at(step)}
            done.log.append(row | {"seconds": done.seconds[-1]})
            if log:  # before a checkpoint: what is logged twice is told by its step, what is not is lost
                log(done.log[-1])
            if book:
                book.write(done.log[-1])
                if step + 1 == recipe.steps or (recipe.every and (step + 1) % recipe.every == 0):
                    book.save(step + 1)
                    last = step + 1
            if watch:
                watch(step + 1, mean)
            if progress:
                progress("train", step + 1, recipe.steps)
    return done


def _gradients(
    model: nn.Module, loss: Loss, places: Tensor, micro: int, saver: Saver, done: Trained
) -> tuple[float, int]:
    """Sum of the losses of a step's items and how many predictions they are; gradients of the sum are left behind."""
    total, count = 0.0, 0
    for part in places.split(micro):
        with saver:
            value, n = loss(model, part)
        done.saved_bytes = max(done.saved_bytes, saver.peak)
        value.backward()
        total, count = total + float(value.detach()), count + n
    if not count:
        raise UserError("a batch holds nothing to predict: all of its tokens are prompt; give examples with answers")
    return total, count


def _estimated(
    model: nn.Module, loss: Any, places: Tensor, step: int, recipe: Recipe, gradient: Estimator, saver: Saver
) -> tuple[float, Iterable[tuple[str, Tensor]]]:
    """The mean loss of a step's items and the gradients that an estimator gives."""

    def items(part: Tensor) -> Tensor:
        with saver:
            return loss.items(model, part)

    given = {"rng": torch.Generator().manual_seed(recipe.seed * 1_000_003 + step), "rate": recipe.rate_at(step)}
    parts = [partial(items, part) for part in places.split(recipe.micro or recipe.batch)]
    found = gradient.estimate(model, parts, **{k: given[k] for k in gradient.needs()})
    training_mode(model)  # forward passes alone are those of inference
    return found


def _streamed(
    found: Iterable[tuple[str, Tensor]], named: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> float:
    """Apply gradients one parameter after the other, each let go before the next; the norm of all of them."""
    squares = 0.0
    for name, grad in found:
        squares += float(grad.float().square().sum())
        named[name].grad = grad
        optimiser.step()  # of this parameter alone: no other has a gradient
        named[name].grad = None
    return squares**0.5


def _scaled(parameters: Iterable[nn.Parameter], count: int, clip: float) -> float:
    """The norm of the whole gradient, divided by `count`; the gradients are, and clipped to a norm where one is set."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return 0.0
    torch._foreach_div_(grads, count)
    norm = float(torch.stack(torch._foreach_norm(grads)).norm())
    if clip and clip < norm < math.inf:
        torch._foreach_mul_(grads, clip / norm)
    return norm


@contextlib.contextmanager
def lean_norms(model: nn.Module) -> Iterator[None]:
    """Have the RMS norms of a model computed in few passes for a while."""
    changed = [(module, partial(_norm_forward, module, eps)) for module, eps in rms_norms(model)]
    for module, forward in changed:
        module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module, _ in changed:
            del module.forward


def _norm_forward(module: Any, eps: float, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, eps)


def training_mode(model: nn.Module) -> None:
    """Training mode, but for norms that gather statistics: a frozen model's stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _stored(model: nn.Module, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The tensors that a checkpoint must hold: what is trained, codes in place of weights of 8 bits."""
    found: dict[str, Tensor] = dict(named)
    for path, module in model.named_modules():
        if isinstance(module, Held):
            found.pop(f"{path}.weight", None)
            found |= {f"{path}.{name}": value for name, value in module.named_buffers(recurse=False)}
    return found


class _Book:
    """A run's folder: journal, log, checkpoints."""

    def __init__(
        self,
        folder: Path,
        resume: bool,
        header: dict[str, Any],
        named: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
        freezing: Freezing | None,
    ) -> None:
        self.folder, self.named, self.optimiser, self.freezing = folder, named, optimiser, freezing
        shapes = {n: list(p.shape) for n, p in named.items()}
        self.journal = Journal(folder, resume, {**header, "trained": shapes})
        self.rows: list[dict[str, Any]] = []

    def load(self) -> int:
        """Go to the last checkpoint, if there is one; the step it is of."""
        self.journal.begin()
        entry = self.journal.done.get("checkpoint")
        if entry is None:
            self._cut(0)
            return 0
        path = self.folder / entry["file"]
        if not path.is_file():
            raise UserError(f"{path} is gone, and the run's journal names it; start the run again in another folder")
        file = Checkpoint(path)
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(file.read(f"parameters/{name}"))
        state = {"state": {}, "param_groups": entry["groups"]}
        for key in file.names():
            kind, _, rest = key.partition("/")
            if kind == "optimiser":
                index, _, name = rest.partition("/")
                state["state"].setdefault(int(index), {})[name] = file.read(key).clone()
        for index, numbers in entry["numbers"].items():
            state["state"].setdefault(int(index), {}).update(numbers)
        self.optimiser.load_state_dict(state)
        torch.set_rng_state(file.read("rng"))
        if self.freezing:
            self.freezing.load(entry["freezing"])
        self._cut(entry["step"])
        return int(entry["step"])

    def _cut(self, step: int) -> None:
        """Leave out of the log what lies behind a step: it is done again."""
        path = self.folder / LOG
        if path.exists():
            for line in path.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if row["step"] <= step:
                        self.rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomic(path, lambda p: p.write_text(text, "utf-8"))

    def write(self, row: dict[str, Any]) -> None:
        path = self.folder / LOG
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, step: int) -> None:
        """A checkpoint: it counts once the journal names it, and then the one before goes."""
        tensors: dict[str, Tensor] = {f"parameters/{n}": p.detach() for n, p in self.named.items()}
        numbers: dict[str, dict[str, Any]] = {}
        state = self.optimiser.state_dict()
        for index, values in state["state"].items():
            for name, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"optimiser/{index}/{name}"] = value
                else:
                    numbers.setdefault(str(index), {})[name] = value
        tensors["rng"] = torch.get_rng_state()
        file = f"checkpoint-{step}.safetensors"
        with writing(self.folder / file):
            write_safetensors(tensors.items(), self.folder / file)
        before = self.journal.done.get("checkpoint", {}).get("file")
        entry = {"step": step, "file": file, "groups": state["param_groups"], "numbers": numbers}
        if self.freezing:
            entry["freezing"] = self.freezing.numbers()
        self.journal.append("checkpoint", entry)
        if before and before != file:
            (self.folder / before).unlink(missing_ok=True)
