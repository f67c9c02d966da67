"""The bench of optimisers: a small Llama that learns the bytes of Python's library from nothing."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


SETTING = (
    "A Llama of 2 blocks and a width of 64 from random weights, 8 windows of 64 bytes of Python's library a step; "
    "rates chosen on other modules of it, the loss measured on a third part"
)

MOVED = (
    "A Llama of 2 blocks and a width of 64 that 200 steps of AdamW taught the bytes of Python's library, fine-tuned to "
    "the prose of Python's reference by 8 windows of 64 bytes a step; rates chosen on other windows than the loss"
)


@dataclass(frozen=True)
class Pretrained:
    """What a training from nothing gave.

    Fields:
        loss: on text that was never trained on, nats a byte of text.
        state, weights: bytes of the optimiser's state, and of what is trained or held for it.
        saved: most bytes kept for a backward pass.
        seconds: processor time of a step, the median.
        course: training loss of each step.
        rate: the learning rate that was chosen.
        numbers: of the optimiser's state, summed over the parameters, but for its steps.
        model: the trained module.
    """

    loss: float
    state: int
    weights: int
    saved: int
    seconds: float
    course: tuple[float, ...]
    rate: float
    numbers: dict[str, float]
    model: Any


class Pretraining:
    """A Llama of 2 blocks and a width of 64 (0.13 million weights) on windows of 64 bytes, 8 a step.

    Every method sees the same windows in the same order and begins with the same weights. Rates are chosen by windows
    of the `search` modules of the library, and the loss is measured on the `test` modules.

    Args:
        seed: draws weights, order and what a method draws.
        steps: of 8 windows.
    """

    LENGTH, BATCH, ITEMS = 64, 8, 2048

    def __init__(self, seed: int = 0, steps: int = 300, width: int = 64) -> None:
        import hashlib

        from trimtab.tasks.training import Prediction

        self.seed, self.steps, self.width = seed, steps, width
        self.start: dict[str, Any] | None = None
        options = {"use_cache": False}
        self.train, self.choosing, self.judging = (
            Prediction({"input_ids": tokens}, tokens, options)
            for tokens in (_windows("train", self.ITEMS), _windows("search", 128), _windows("test", 256))
        )
        self.hash = hashlib.sha256(self.train.labels.numpy().tobytes()).hexdigest()[:16]

    def fresh(self) -> nn.Module:
        """The model as training begins."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(self.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                **{"vocab_size": 256, "hidden_size": self.width, "intermediate_size": 11 * self.width // 4},
                **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4},
                **{"max_position_embeddings": self.LENGTH, "bos_token_id": None, "eos_token_id": None},
            )
        )
        if self.start is not None:
            model.load_state_dict(self.start)
        return model

    def moved(self, steps: int) -> Pretraining:
        """The bench of fine-tuning: the model that 200 steps of AdamW made, on its way to the prose of Python's
        reference, of which a part is for choosing rates and another for the loss.
        """
        from trimtab.tasks.training import Prediction

        self.steps = 200
        bench = Pretraining(self.seed, steps, self.width)
        bench.start = self.run("adamw", (2e-3,)).model.state_dict()
        windows = _prose()
        cuts = (windows[:1024], windows[1024:1152], windows[1152:1408])
        options = {"use_cache": False}
        bench.train, bench.choosing, bench.judging = (Prediction({"input_ids": t}, t, options) for t in cuts)
        return bench

    def kept(self, sampled: Any = None) -> int:
        """Bytes that plain autograd keeps for the backward pass of one step, parameters not counted.

        Args:
            sampled: from a model to a context that the forward pass runs in.
        """
        import contextlib

        import torch

        model = self.fresh()
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        found: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            sampled(model) if sampled else (contextlib.nullcontext()),
        ):
            self.train(model, torch.arange(self.BATCH))
        return sum(storage.nbytes() for storage in found.values())

    def run(
        self,
        optimizer: Callable[[Any, float], Any] | str,
        rates: Sequence[float],
        *,
        gradient: str = "",
        change: Callable[[nn.Module], Any] | None = None,
    ) -> Pretrained:
        """Train from nothing, at the best of the rates.

        Args:
            optimizer: an update rule with its fields, or what makes an optimiser from the model and a rate.
            gradient: an estimator with its fields; empty: the backward pass.
            change: done to the fresh model before it is trained.
        """
        found = [self._once(optimizer, rate, gradient, change) for rate in rates]
        return min(found, key=lambda pair: pair[0])[1]

    def _once(self, optimizer: Any, rate: float, gradient: Any, change: Any) -> tuple[float, Pretrained]:
        from trimtab.core.plan import parse_method
        from trimtab.engine.train import Recipe, train
        from trimtab.optimising import optimiser_of

        model = self.fresh()
        if change is not None:
            change(model)
        if isinstance(optimizer, str):
            rule: Any = parse_method(optimizer)
            optimiser: Any = optimiser_of(model, rule, rate, seed=self.seed)[0]
        else:
            optimiser = optimizer(model, rate)
        recipe = Recipe(self.steps, self.BATCH, rate=rate, recompute=0.0, seed=self.seed)
        marks = [time.process_time()]
        done = train(
            *(model, self.train, len(self.train), recipe, optimiser),
            gradient=parse_method(gradient) if gradient else None,  # type: ignore[arg-type]
            watch=lambda step, loss: marks.append(time.process_time()),
        )
        steps = [b - a for a, b in itertools.pairwise(marks[1:])]
        pretrained = Pretrained(
            loss=loss_of(model, self.judging),
            state=sum(v.nbytes for s in optimiser.state.values() for v in s.values() if hasattr(v, "nbytes")),
            weights=sum(p.untyped_storage().nbytes() for p in (*model.parameters(), *model.buffers())),
            saved=done.saved_bytes,
            seconds=statistics.median(steps),
            course=tuple(row["loss"] for row in done.log),
            rate=rate,
            numbers=_numbers(optimiser),
            model=model,
        )
        return loss_of(model, self.choosing), pretrained


def _numbers(optimiser: Any) -> dict[str, float]:
    found: dict[str, float] = {}
    for state in optimiser.state.values():
        for name, value in state.items():
            if isinstance(value, int | float) and name != "step":
                found[name] = found.get(name, 0.0) + value
    return found


def loss_of(model: nn.Module, data: Any) -> float:
    """Mean loss of a prediction over all its items."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for places in torch.arange(len(data)).split(64):
            value, n = data(model, places)
            total, count = total + float(value), count + n
    return total / count


@cache
def _prose() -> Tensor:
    """Windows of bytes of Python's reference, its topics in an order of their own."""
    import hashlib
    from importlib import import_module

    import torch

    topics = import_module("pydoc_data.topics").topics
    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    found = torch.frombuffer(bytearray("".join(topics[n] for n in names).encode()), dtype=torch.uint8)
    return found[: len(found) // Pretraining.LENGTH * Pretraining.LENGTH].view(-1, Pretraining.LENGTH).long()


@cache
def _windows(split: str, most: int) -> Tensor:
    """Windows of bytes of the library's modules, spread evenly over the split."""
    import torch

    from trimtab.tasks.text import stdlib_text

    found = torch.frombuffer(bytearray(stdlib_text(split).encode()), dtype=torch.uint8)
    rows = found[: len(found) // Pretraining.LENGTH * Pretraining.LENGTH].view(-1, Pretraining.LENGTH)
    places = torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()
    return rows[places].long()
