"""The bench that claims are measured on: a plan carried out on a model through the public engine, and scored on data
it never saw.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.level import Dense
from trimtab.core.plan import Plan, check

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.engine.apply import Applied
    from trimtab.models.source import Source
    from trimtab.tasks.base import Scores


@dataclass(frozen=True)
class Measured:
    """What a plan made of a model.

    Fields:
        value: the task's metric on the test items (perplexity, accuracy).
        loss: mean negative log-likelihood a prediction, nats.
        damage: mean KL divergence to the original, nats a prediction.
        bytes: bytes of the weights, touched or not.
        bits: bits stored a weight, over the sites that the plan touched.
        scores: by item, for paired comparisons.
        applied: the changed model's stream and packed weights.
    """

    value: float
    loss: float
    damage: float
    bytes: int
    bits: float
    scores: Scores
    applied: Applied


class Bench:
    """One model with its task and data for one seed; keeps the original's outputs, so that many plans are compared
    cheaply.

    Args:
        source: the model.
        seed: draws calibration and test items.
        calibration, items: how many items; windows of 256 tokens for text.
        data: see `tasks.build.task_for`.
    """

    def __init__(
        self, source: Source, seed: int = 0, calibration: int = 24, items: int = 64, data: str | None = None
    ) -> None:
        from trimtab.tasks.build import task_for

        self.source, self.seed = source, seed
        self.task = task_for(source, data)
        self.calibration = self.task.batch("calibration", calibration, seed)
        self.test = self.task.batch("test", items, seed)
        self.chunk = self.task.chunk

    @cached_property
    def modelmap(self) -> Any:
        """The traced map."""
        from trimtab.engine.stream import traced

        return traced(self.source, self.test)

    def stream(self) -> Any:
        """A fresh stream over the original."""
        from trimtab.engine.stream import Stream

        return Stream(self.source, self.modelmap, self.task.options, resident=True)

    @cached_property
    def sites(self) -> list[Any]:
        """The model's sites, each storage once, and its sublayers and blocks."""
        from trimtab.engine.stream import plan_sites

        return plan_sites(self.modelmap)

    @cached_property
    def _reference(self) -> list[Any]:
        from trimtab.engine.measure import references, through

        stream = self.stream()
        return references(stream, through(stream, self.test, self.chunk), self.test, self.task)

    def measure(self, plan: str | Plan = "") -> Measured:
        """Carry a plan out and score it; the empty plan scores the original.

        A `Plan` may hold methods of a claim's own.
        """
        from trimtab.engine.apply import apply
        from trimtab.engine.measure import measure

        steps = (Plan.parse(plan) if isinstance(plan, str) else plan).resolve(self.sites)
        check(steps, self.sites)
        applied = apply(self.stream(), steps, self.calibration, self.chunk, seed=self.seed)
        scores = measure(applied.stream, self.test, self.task, self.chunk, self._reference)
        dense = Dense(self.source.dtype)
        sites = {s.path: s for s in applied.stream.sites.values()}
        stored = sum(p.nbytes for p in applied.packed.values())
        weights = sum(sites[p].weights for p in applied.packed)
        parameters = applied.stream.map.parameters
        total = stored + dense.bytes((parameters - weights,))
        value = self.task.overall(scores, self.test.amounts)
        loss = float(scores.nll.sum() / scores.count.sum())
        return Measured(value, loss, scores.damage(), total, 8 * stored / weights if weights else 0.0, scores, applied)

    def weight(self, path: str) -> Tensor:
        """A site's weight `[out, in]`, fp32."""
        stream = self.stream()
        return stream.weight(stream.sites[path])

    def statistics(self, names: Iterable[str] = ("gram", "mean", "absmean")) -> dict[str, dict[str, Tensor]]:
        """Statistics of every site that has them, on the original and the calibration items: path -> name -> tensor."""
        from trimtab.engine.measure import measure
        from trimtab.engine.stats import collect

        stream = self.stream()
        run = partial(measure, stream, self.calibration, self.task, self.chunk)
        return collect(stream, dict.fromkeys(stream.sites, names), run)


class Lab:
    """What a claim's `measure(lab, seed)` is given.

    Fields:
        data: the shared data folder, or None.
        hashes: of the models and data used so far, for the record.
    """

    def __init__(self, data: Path | None = None) -> None:
        self.data = data
        self.hashes: dict[str, str] = {}

    def bench(self, model: str = "pocket-lm", seed: int = 0, outliers: float = 0.0, **options: Any) -> Bench:
        """A bench for a model.

        Args:
            outliers: plant outlier channels: the scale of 4 channels of every norm that linears alone read is
                multiplied by this, and the columns that read them divided: the function is exactly the same, and
                activations look like a large model's. 0:
                    none.
            options: `calibration`, `items`, `data` of `Bench`.
        """
        from trimtab.models.source import open_source

        source = open_source(model)
        bench = Bench(source, seed, **options)
        if outliers:
            bench.source = planted(source, bench.modelmap, outliers, seed)
        self.hashes |= {model: source.hash, f"{model} data": bench.task.data_hash()}
        return bench


def planted(source: Source, modelmap: Any, factor: float, seed: int, channels: int = 4) -> Source:
    """The same function with outlier channels planted in the inputs of every linear behind a norm.

    A norm before a tied head is left alone: the head's columns are the embedding's, which must stay as they are.
    """
    import torch

    rng = torch.Generator().manual_seed(seed)
    scales: dict[str, Tensor] = {}
    norms = {n.path: n for n in modelmap.norms}
    tied = {name for group in modelmap.tied for name in group}
    for norm, readers in modelmap.readers.items():
        if tied & {f"{r}.weight" for r in readers}:
            continue
        width = norms[norm].width
        scale = torch.ones(width)
        scale[torch.randperm(width, generator=rng)[:channels]] = factor
        scales |= {name: scale for name in (norms[norm].weight, norms[norm].bias) if name}
        scales |= {f"{r}.weight": 1 / scale for r in readers}
    transposed = {f"{s.path}.weight" for s in modelmap.sites if s.transposed}

    def read(name: str) -> Tensor:
        value = source.read(name)
        if name not in scales:
            return value
        return value.float() * (scales[name][:, None] if name in transposed else scales[name])

    return dataclasses.replace(source, read=read, dtype="fp32", name=f"{source.name} with planted outliers")
