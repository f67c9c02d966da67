"""How good a network of a super-network is: its batch norms' statistics gathered anew, its scores on given items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.knob import Genome
from trimtab.engine.elastic import Supernet, called

if TYPE_CHECKING:
    from collections.abc import Iterator

BatchNorm = nn.modules.batchnorm._BatchNorm


class Jury:
    """Scores networks on items of a task; nothing of the super-network changes.

    Args:
        task: see `trimtab.tasks`.
        gathering: items that statistics are gathered on; None where networks have no batch norm.
        items: that networks are scored on.
        chunk: items in one forward.
    """

    def __init__(self, task: Any, gathering: Any, items: Any, chunk: int | None = None) -> None:
        self.task, self.gathering, self.items = task, gathering, items
        self.chunk = chunk or task.chunk

    def gather(self, module: nn.Module) -> None:
        """Set the statistics of batch norms to the mean over the items for them.

        The statistics of a shared norm are those of many networks mixed, and of use to none.
        """
        norms = [m for m in module.modules() if isinstance(m, BatchNorm) and m.track_running_stats]
        module.eval()
        if not norms:
            return
        before = [m.momentum for m in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        with torch.no_grad():
            for inputs, _ in self._parts(self.gathering):
                called(module, inputs, self.task.options)
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
        module.eval()

    def scores(self, module: nn.Module, items: Any = None) -> Any:
        """Scores of a network, item by item."""
        items = self.items if items is None else items
        module.eval()
        with torch.no_grad():
            parts = [
                self.task.score(called(module, inputs, self.task.options), labels, None)
                for inputs, labels in self._parts(items)
            ]
        return parts[0].join(parts)

    def error(self, scores: Any, amounts: Tensor) -> float:
        """The metric as something to make small: 1 - accuracy, or a perplexity as it is."""
        value = self.task.overall(scores, amounts)
        return 1 - value if self.task.higher else value

    def of(self, supernet: Supernet, genome: Genome) -> float:
        """The error of a network over the shared weights."""
        module, _ = supernet.bound(genome, statistics=False)
        self.gather(module)
        return self.error(self.scores(module), self.items.amounts)

    def _parts(self, batch: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for i in range(0, len(batch), self.chunk):
            part = batch.take(i, i + self.chunk)
            yield dict(part.inputs), part.labels
