"""Classification: images or other inputs with one class each; the metric is accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.tasks.base import Batch, Scores, Task

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Classification(Task):
    """Name the class of each item.

    Fields:
        data: split -> (inputs by the name of the forward's argument, labels `[n]` int64).
        names: of classes that are the data's and not the model's, in the order of their labels; empty: the model's.
    """

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True
    chunk: ClassVar[int] = 128
    multiple: ClassVar[int] = 100

    data: dict[str, tuple[dict[str, Tensor], Tensor]]
    names: tuple[str, ...] = ()

    def batch(self, split: str, items: int, seed: int = 0) -> Batch:
        import torch

        inputs, labels = self.data[split]
        pick = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:items]
        return Batch({k: v[pick] for k, v in inputs.items()}, labels[pick], torch.ones(len(pick)))

    def pick(self, output: Any, labels: Tensor) -> Tensor:
        return getattr(output, "logits", output)

    def targets(self, labels: Tensor) -> Tensor:
        return labels

    def counts(self, labels: Tensor) -> Tensor:
        import torch

        return torch.ones_like(labels)

    def value(self, scores: Scores, amounts: Tensor) -> Tensor:
        return scores.hits / scores.count
