"""A step of an elastic training: sub-networks that a curriculum names, one after the other, over the shared weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.journal import write_atomic
from trimtab.core.knob import Domain, Genome
from trimtab.core.method import Elastic, Lesson, Pupil
from trimtab.engine.elastic import Supernet, called
from trimtab.engine.train import Recipe
from trimtab.formats.checkpoint import Checkpoint, write_safetensors

TEACHER = "teacher.safetensors"


@dataclass(frozen=True)
class Course(Recipe):
    """A recipe whose learning rate goes as a curriculum wants it.

    Fields:
        method: the curriculum.
    """

    method: Elastic | None = None

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        assert self.method is not None
        start, end, share = self.method.rate(Lesson(Domain(()), {}, step, self.steps))
        first, last = round(start * self.steps), round(end * self.steps)
        part = Recipe(steps=max(1, last - first), rate=share * self.rate, warmup=self.warmup, schedule=self.schedule)
        return part.rate_at(max(0, step - first))


class Teaching:
    """Gradients of a step of an elastic training, for the training loop's `backward`.

    A pupil's loss is, over its predictions, share * CE(labels) + (1 - share) * CE(softmax(teacher)), the second the
    cross-entropy with the teacher's probabilities.

    Args:
        supernet: the shared weights.
        method: which sub-networks a step trains, and from whom they learn.
        inputs: by the name of the network's argument, first dimension the item.
        labels: `[items]`, or `[items, length]` with -100 where nothing is to be predicted.
        steps: of the whole training.
        seed: of the sub-networks.
        options: of every forward.
        folder: where the largest network is kept once it teaches; None: only in memory.
    """

    def __init__(
        self,
        supernet: Supernet,
        method: Elastic,
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        steps: int,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.supernet, self.method, self.steps, self.seed = supernet, method, steps, seed
        self.inputs, self.labels, self.options, self.folder = dict(inputs), labels, dict(options or {}), folder
        self.offered = method.offer(supernet.domain)
        for p in supernet.parameters():  # from the first step on: what a step leaves out moves on alike, resumed or not
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        self.passes = 0  # forward and backward passes of networks so far
        self._before: nn.Module | None = None

    def __call__(self, places: Tensor, step: int) -> tuple[float, int]:
        """Gradients of the sum of the pupils' losses; that sum, and how many predictions a pupil makes."""
        lesson = Lesson(self.supernet.domain, self.offered, step, self.steps)
        if self.method.sorts(lesson):
            self.supernet.sort({k: v[:1] for k, v in self.inputs.items()})
        pupils = self.method.teach(lesson, Random(self.seed * 1_000_003 + step))
        inputs, labels = {k: v[places] for k, v in self.inputs.items()}, self.labels[places]
        wanted = {p.teacher for p in pupils}
        known: dict[Any, Tensor] = {}
        if "before" in wanted:
            with torch.no_grad():
                known["before"] = self._logits(self._teacher(step), inputs, labels)
        total, count = 0.0, 1
        self.passes += len(pupils)
        for number, pupil in enumerate(pupils):
            module, views = self.supernet.bound(pupil.genome, leaves=True)
            module.train()
            logits = self._logits(module, inputs, labels)
            loss = pupil.weight * self._loss(pupil, logits, labels, known)
            if not bool(loss.isfinite()):
                raise UserError(
                    f"step {step + 1}: the loss of the sub-network {said(self.supernet, pupil.genome)} is "
                    f"{float(loss.detach()):.4g}, which is no number to go on with; train with a lower rate"
                )
            loss.backward()
            self.supernet.gather(pupil.genome, views)
            if number in wanted:
                known[number] = logits.detach()
            total, count = total + float(loss.detach()), len(logits)
        return total, count

    def _loss(self, pupil: Pupil, logits: Tensor, labels: Tensor, known: Mapping[Any, Tensor]) -> Tensor:
        share = 1.0 if pupil.teacher is None else pupil.labels
        loss = logits.new_zeros(())
        if share:
            loss = share * nn.functional.cross_entropy(logits, _targets(labels), reduction="sum")
        if share < 1:
            soft = known[pupil.teacher].softmax(-1)
            loss = loss + (1 - share) * nn.functional.cross_entropy(logits, soft, reduction="sum")
        return loss

    def _logits(self, module: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """The rows of logits that are predictions `[n, classes]`."""
        return predictions(called(module, inputs, self.options), labels)

    def _teacher(self, step: int) -> nn.Module:
        """The largest network as it was when it was first asked for."""
        if self._before is None:
            self._before = (
                self.supernet.extract(self.supernet.domain.largest(self.offered)).train().requires_grad_(False)
            )
            file = None if self.folder is None else self.folder / TEACHER
            if file is not None and file.is_file():
                stored = Checkpoint(file)
                if stored.metadata.get("step", "") <= f"{step:09}":
                    self._before.load_state_dict({n: stored.read(n) for n in stored.names()})
                    return self._before
            if file is not None:
                state = {k: v.contiguous() for k, v in self._before.state_dict().items()}
                write_atomic(file, lambda p: write_safetensors(state.items(), p, {"step": f"{step:09}"}))
        return self._before


def predictions(output: Any, labels: Tensor) -> Tensor:
    """The rows of logits that are predictions `[n, classes]`: of text each token from those before it."""
    logits = getattr(output, "logits", output).float()
    if labels.dim() == 1:
        return logits
    return logits[:, :-1].flatten(0, 1)[labels[:, 1:].flatten() >= 0]


def _targets(labels: Tensor) -> Tensor:
    if labels.dim() == 1:
        return labels
    flat = labels[:, 1:].flatten()
    return flat[flat >= 0]


def said(supernet: Supernet, genome: Genome) -> str:
    """A genome as its choices."""
    return ", ".join(f"{name}={option}" for name, option in supernet.domain.setting(genome).items())
