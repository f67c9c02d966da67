"""The bench that claims are measured on: a plan carried out on a model through the public engine, and scored on data
it never saw.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.level import Dense
from trimtab.core.plan import Plan, check

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trimtab.core.method import Method
    from trimtab.engine.apply import Applied
    from trimtab.models.source import Source
    from trimtab.pretraining import Pretraining
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


TUNED = (
    "The shipped language model of Python code, fine-tuned by 4 windows of 64 tokens a step to the prose of Python's "
    "reference; the better of two rates each, by windows that the training leaves out"
)


@dataclass(frozen=True)
class Adapted:
    """What an adaptation made of a model.

    Fields:
        loss: on text of the new domain that was never trained on, nats a token.
        known: on test text of the domain that the model comes from.
        course: training loss of each step.
        trained: how many numbers were trained.
        saved: most bytes kept for a backward pass.
        seconds: processor time of a step, the median.
        first: cosine of the first step's change of all adapted matrices with what the full gradient asks for.
        held: most bytes of gradients and of the optimiser's state after a step.
        model: the adapted module.
    """

    loss: float
    known: float
    course: tuple[float, ...]
    trained: int
    saved: int
    seconds: float
    first: float
    held: int
    model: nn.Module


@dataclass(frozen=True)
class Tuning:
    """How a copy is fine-tuned where nothing is put around its matrices.

    Fields:
        optimizer, gradient, freeze: as `trimtab train` takes them, or methods; no optimizer: torch's fused AdamW.
        whole: all parameters are trained, and not the linears of the blocks alone.
        codec: how what autograd keeps is kept.
    """

    optimizer: str = ""
    gradient: Any = ""
    freeze: Any = ""
    whole: bool = False
    codec: Any = "exact"


class Shift:
    """A language model on its way to another domain: from Python's library to the prose of Python's own reference.

    The reference is `pydoc_data.topics`, which comes with Python and lies in none of the splits that the shipped model
    was made with. Every method gets the same windows in the same order; rates are chosen among `RATES` by a slice of
    the training windows that the training leaves out.

    Args:
        seed: draws the order of the windows and what a method draws.
        steps: of 4 windows of 64 tokens.
    """

    RATES = (1e-3, 4e-3)
    LENGTH, BATCH, ITEMS = 64, 4, 32

    def __init__(self, seed: int = 0, steps: int = 24, model: str = "pocket-lm") -> None:
        import hashlib
        from importlib import import_module

        from trimtab.adapting import Material, open_base
        from trimtab.tasks.base import Batch
        from trimtab.tasks.causal_lm import CausalLM
        from trimtab.tasks.text import stdlib_documents, token_blocks
        from trimtab.tasks.training import Prediction

        self.seed, self.steps, self.model = seed, steps, model
        base = open_base(model)
        topics = import_module("pydoc_data.topics").topics
        order = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
        cut = len(order) * 4 // 5
        new, apart = ([topics[name] for name in part] for part in (order[:cut], order[cut:]))
        code = stdlib_documents("test"), stdlib_documents("search")
        texts: dict[str, Any] = {"new": new, "apart": apart, "test": code[0], "code": code[1]}
        limits = {"new": self.ITEMS * 8, "apart": self.ITEMS, "test": self.ITEMS, "code": self.ITEMS}
        blocks = {k: token_blocks(base.tokenizer, v, self.LENGTH, limit=limits[k]) for k, v in texts.items()}

        def prediction(tokens: Tensor) -> Prediction:
            labels = tokens.clone()
            labels[:, 0] = -100
            return Prediction({"input_ids": tokens}, labels, {"use_cache": False})

        def batch(name: str) -> Batch:
            found = prediction(blocks[name].tokens)
            return Batch(found.inputs, found.labels, blocks[name].bytes)

        tokens = blocks["new"].tokens
        task = CausalLM({"test": blocks["apart"].tokens}, {"test": blocks["apart"].bytes})
        held = len(tokens) // 8
        chosen = prediction(tokens[:held])
        self.train = prediction(tokens[held:])
        self.choosing = Material(self.train, Batch(chosen.inputs, chosen.labels, blocks["new"].bytes[:held]), task, "")
        self.judging = Material(self.train, batch("apart"), task, "")
        self.knowing = Material(prediction(blocks["code"].tokens), batch("test"), task, "")
        self.hash = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]

    def before(self) -> tuple[float, float]:
        """Losses of the model as it came: on the new domain, and on its own."""
        from trimtab.adapting import open_base

        model = open_base(self.model).model
        return self._loss(model, self.judging), self._loss(model, self.knowing)

    def matched(self, method: str, numbers: int) -> str:
        """The largest rank at which a method trains at most so many numbers, see `matched`."""
        return matched(self._opened, method, numbers)

    @cached_property
    def _opened(self) -> Any:
        from trimtab.adapting import open_base

        return open_base(self.model)

    def run(
        self, method: str | Method, level: str, context: str = "new", rates: tuple[float, ...] | None = None
    ) -> Adapted:
        """Adapt a fresh copy with a method at a level, at the better of the rates.

        Args:
            method: its name with its fields, or a method of a claim's own.
            context: what statistics are collected on: `new`, or `code`, the domain that the model comes from.
        """
        tried = [self._run(method, level, context, rate) for rate in rates or self.RATES]
        return min(tried, key=lambda pair: pair[0])[1]

    def full(self) -> Adapted:
        """Full fine-tuning of all linears of the blocks, for comparison."""
        return self.tune(Tuning(), (1e-4, 4e-4))

    def tune(self, tuning: Tuning, rates: tuple[float, ...]) -> Adapted:
        """Fine-tune a fresh copy at the best of the rates."""
        return min((self._run("", "", "new", rate, tuning) for rate in rates), key=lambda pair: pair[0])[1]

    def untrained(self, method: str | Method, level: str) -> float:
        """Loss on the new domain once a method is put on, before any step."""
        return self._loss(self._wrapped(method, level, "new").model, self.judging)

    def solved(self, model: nn.Module, method: str, level: str) -> float:
        """Loss on the new domain once the linears of a model's blocks are solved at a level, in place.

        Statistics are of the training windows, on the model as it was before the first linear was solved.
        """
        import dataclasses

        import torch

        from trimtab.adapting import collect
        from trimtab.core.level import parse_level
        from trimtab.core.plan import parse_method

        chosen: Any = parse_method(method)
        sites = [s for s in self._opened.sites if s.kind == "linear" and s.block is not None]
        base = dataclasses.replace(self._opened, model=model)
        stats = collect(base, self.choosing, sites, chosen.needs(), self.seed)
        with torch.no_grad():
            for site in sites:
                weight = model.get_parameter(f"{site.path}.weight")
                wanted = {k: stats[site.path][k] for k in chosen.needs()}
                weight.copy_(chosen.solve(weight.float(), parse_level(level), **wanted).dense())
        return self._loss(model, self.judging)

    def _wrapped(self, method: str | Method, level: str, context: str) -> Any:
        from trimtab.adapting import chosen_sites, open_base, wrap_all
        from trimtab.core.level import parse_level
        from trimtab.core.plan import parse_method

        base = open_base(self.model)
        chosen: Any = parse_method(method) if isinstance(method, str) else method
        about = self.knowing if context == "code" else self.choosing
        wrap_all(base, about, chosen_sites(base, (), chosen), chosen, parse_level(level), self.seed)
        return base

    def _run(
        self, method: str | Method, level: str, context: str, rate: float, tuning: Tuning = Tuning()
    ) -> tuple[float, Adapted]:
        import statistics
        import time

        import torch

        from trimtab.adapting import open_base
        from trimtab.core.plan import parse_method
        from trimtab.engine.freezing import Freezing
        from trimtab.engine.train import Recipe, train
        from trimtab.models.adapter import frames
        from trimtab.optimising import optimiser_of
        from trimtab.training import blocks_of

        base = self._wrapped(method, level, context) if method else open_base(self.model)
        if not method and tuning.whole:
            base.model.requires_grad_(True)
        elif not method:
            for site in base.sites:
                if site.kind == "linear" and site.block is not None:
                    base.model.get_submodule(site.path).weight.requires_grad_(True)
        trained = [p for p in base.model.parameters() if p.requires_grad]
        recipe = Recipe(self.steps, self.BATCH, rate=rate, recompute=0.0, seed=self.seed, codec=tuning.codec)
        optimiser: torch.optim.Optimizer
        if tuning.optimizer:
            rule: Any = parse_method(tuning.optimizer)
            optimiser, trained = optimiser_of(base.model, rule, rate, seed=self.seed)
        else:
            optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
        gradient, policy = _made(tuning.gradient), _made(tuning.freeze)
        freezing = Freezing(base.model, blocks_of(base), policy, optimiser, self.steps, self.seed) if policy else None
        marks, first, held = [time.process_time()], [0.0], [0]
        adapted = frames(base.model)
        linear = all(frame.factored() is not None for frame in adapted.values())
        start = {path: frame.delta() for path, frame in adapted.items()} if linear else {}

        def watch(step: int, loss: float) -> None:
            marks.append(time.process_time())
            grads = sum(p.grad.nbytes for p in trained if p.grad is not None)
            state = sum(v.nbytes for s in optimiser.state.values() for v in s.values() if hasattr(v, "nbytes"))
            held[0] = max(held[0], grads + state)
            if step == 1 and start:
                first[0] = self._along({path: adapted[path].delta() - start[path] for path in start})

        done = train(
            *(base.model, self.train, len(self.train), recipe, optimiser),
            gradient=gradient,
            freezing=freezing,
            watch=watch,
        )
        steps = [b - a for a, b in itertools.pairwise(marks[1:])]
        found = Adapted(
            loss=self._loss(base.model, self.judging),
            known=self._loss(base.model, self.knowing),
            course=tuple(row["loss"] for row in done.log),
            trained=sum(p.numel() for p in trained),
            saved=done.saved_bytes,
            seconds=statistics.median(steps),
            first=first[0],
            held=held[0],
            model=base.model,
        )
        return self._loss(base.model, self.choosing), found

    def _along(self, change: dict[str, Tensor]) -> float:
        """Cosine between a change of the matrices and minus the gradient of the first step's loss."""
        import torch

        from trimtab.engine.train import order

        base = self._opened
        weights = {path: base.model.get_submodule(path).weight.requires_grad_(True) for path in change}
        value, count = self.train(base.model, order(len(self.train), self.BATCH, 0, self.seed))
        grads = torch.autograd.grad(value / count, list(weights.values()))
        for weight in weights.values():
            weight.requires_grad_(False)
        gone, asked = (torch.cat([t.flatten() for t in ts]) for ts in (list(change.values()), [-g for g in grads]))
        return float(torch.cosine_similarity(gone, asked, dim=0))

    def open(self) -> Any:
        """A fresh copy of the model, see `adapting.Base`."""
        from trimtab.adapting import open_base

        return open_base(self.model)

    def loss(self, model: nn.Module) -> float:
        """Loss of a model on the new domain, nats a token."""
        return self._loss(model, self.judging)

    def _loss(self, model: Any, what: Any) -> float:
        from trimtab.adapting import scored

        scores = scored(model, what)
        return float(scores.nll.sum() / scores.count.sum())


def _made(method: Any) -> Any:
    from trimtab.core.plan import parse_method

    return parse_method(method) if isinstance(method, str) and method else method or None


def matched(base: Any, method: str, numbers: int) -> str:
    """The largest rank at which a method trains at most so many numbers, which grow in proportion to the rank.

    Args:
        base: the model, see `adapting.Base`.
    """
    import torch
    from torch import nn

    from trimtab.adapting import chosen_sites
    from trimtab.core.level import Rank
    from trimtab.core.plan import parse_method
    from trimtab.parts.shared import Shared

    chosen: Any = parse_method(method)
    total = 0
    for site in chosen_sites(base, (), chosen):
        rows, cols = site.shape
        rng, ones = torch.Generator().manual_seed(0), torch.ones(cols)
        stats = {"rng": rng, "absmean": ones, "mean": ones, "gram": torch.eye(cols), "grad": torch.ones(rows, cols)}
        stats["shared"] = Shared((site.shape,))
        frame = chosen.wrap(nn.Linear(cols, rows, False), Rank(4), **{k: stats[k] for k in chosen.needs()})
        total += sum(p.numel() for p in frame.parameters() if p.requires_grad)
    return f"r{4 * numbers // total}"


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

    def shift(self, seed: int = 0, **options: Any) -> Shift:
        """A language model on its way to another domain, see `Shift`."""
        shift = Shift(seed, **options)
        self.hashes |= {shift.model: shift._opened.hash, "reference": shift.hash}
        return shift

    def pretraining(self, seed: int = 0, **options: Any) -> Pretraining:
        """A small language model that learns from nothing, see `Pretraining`."""
        from trimtab.pretraining import Pretraining

        bench = Pretraining(seed, **options)
        self.hashes |= {"library bytes": bench.hash}
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
