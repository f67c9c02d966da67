"""Small students on few digits: what losses of distillation are compared on.

The teacher is the shipped image transformer, which was trained on all training digits; a student sees a slice of them
and is judged on the 600 that no teacher or student was trained on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.tasks.digits import digits

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.core.method import Objective

CLASSES, PATTERNS, NOISE = 10, 16, 0.3


@dataclass(frozen=True)
class Taught:
    """What became of a student: accuracy on images it never saw, and processor seconds of a step, the median."""

    accuracy: float
    seconds: float


@dataclass(frozen=True)
class School:
    """How students are trained.

    Fields:
        images: how many they see.
        epochs: passes over them.
        batch: images of a step.
        rate: largest learning rate, which falls along a half cosine.
        width: channels of the first convolution.
        seed: of the images, the first weights, the order and the noise.
    """

    images: int = 120
    epochs: int = 150
    batch: int = 40
    rate: float = 1e-2
    width: int = 4
    seed: int = 0

    @functools.cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the slice."""
        import torch

        images, labels = digits("train")
        picked = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))[: self.images]
        return images[picked], labels[picked]

    def seen(self, items: Tensor, seeds: Tensor) -> Tensor:
        """The items as their augmentations' seeds change them: one of a few patterns of noise is added."""
        return self.data[0][items] + self._patterns[seeds]

    @functools.cached_property
    def _patterns(self) -> Tensor:
        import torch

        return NOISE * torch.randn(PATTERNS, 1, 8, 8, generator=torch.Generator().manual_seed(self.seed))

    def seeds(self, epoch: int) -> Tensor:
        """Seeds `[images]` of the augmentations of a pass."""
        import torch

        return torch.randint(
            PATTERNS, (self.images,), generator=torch.Generator().manual_seed(self.seed * 1000 + epoch)
        )

    @functools.cached_property
    def said(self) -> Tensor:
        """The teacher's logits `[patterns, images, classes]` of every image with every pattern."""
        import torch

        from trimtab.tasks.domains import base_model

        items = torch.arange(self.images)
        with torch.no_grad():
            views = [self.seen(items, torch.full_like(items, seed)) for seed in range(PATTERNS)]
            return torch.stack([base_model()(pixel_values=view).logits for view in views])

    def teach(self, objective: Objective | None, teacher: Callable[[Tensor, Tensor], Tensor] | None = None) -> Taught:
        """Train a student.

        Args:
            objective: what is minimised; None: the cross-entropy of the labels.
            teacher: gives logits for (items, seeds of their augmentations); None: what the teacher said.
        """
        import torch
        from torch.nn import functional

        torch.manual_seed(self.seed)
        student = _student(self.width)
        optimiser = torch.optim.AdamW(student.parameters(), lr=self.rate, weight_decay=0.01)
        steps = self.epochs * -(-self.images // self.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        rng, taken = torch.Generator().manual_seed(self.seed), []
        for epoch in range(self.epochs):
            seeds = self.seeds(epoch)
            for items in torch.randperm(self.images, generator=rng).split(self.batch):
                images, labels = self.seen(items, seeds[items]), self.data[1][items]
                said = teacher(items, seeds[items]) if teacher else self.said[seeds[items], items]
                start = time.process_time()
                logits, weak = student(images)
                if objective is None:
                    loss = functional.cross_entropy(logits, labels)
                else:
                    given: dict[str, Any] = {"weak": weak}
                    loss = objective.loss(logits, said, labels, **{k: given[k] for k in objective.needs()})
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                taken.append(time.process_time() - start)
        return Taught(_accuracy(student.eval()), sorted(taken)[len(taken) // 2])


def _student(width: int) -> Any:
    from torch import nn

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            self.second = nn.Sequential(
                *(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
                nn.MaxPool2d(2),
            )
            self.head, self.weak = nn.Linear(8 * width, CLASSES), nn.Linear(width, CLASSES)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            inner = self.first(images)
            return self.head(self.second(inner).flatten(1)), self.weak(inner.mean((2, 3)))

    return Student()


def _accuracy(student: Any) -> float:
    import torch

    pairs = [digits(split) for split in ("search", "test")]
    images, labels = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    with torch.no_grad():
        return float((student(images)[0].argmax(1) == labels).float().mean())
