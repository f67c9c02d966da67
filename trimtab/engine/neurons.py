"""The feed-forward layers of a model, neuron by neuron: which there are, what they give, and runs with some of them.

A neuron is what `down` reads of one channel: its row of `gate` and of `up` made it, and its column of `down` takes it
on. All channels that the map says hang together so are neurons, whatever the modules are called. Where some are left
out, the model's own code runs with narrower linears, for what lies between them works channel by channel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.core.coupling import Coupled, Member
from trimtab.core.errors import UserError
from trimtab.core.method import Selector
from trimtab.core.view import Prompted
from trimtab.engine.session import TorchSession, lent
from trimtab.parts.frozen import Frozen

if TYPE_CHECKING:
    from trimtab.core.modelmap import ModelMap


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward layer of a block.

    Fields:
        block: index of its block, or None.
        makers: (path, first row) of the rows that make its neurons, in forward order: those of `gate` and `up`, of `up`
            alone, or two runs of one linear where both are one.
        down: the linear that reads them.
        neurons: how many there are.
    """

    block: int | None
    makers: tuple[tuple[str, int], ...]
    down: str
    neurons: int

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears that make the neurons, each once."""
        return tuple(dict.fromkeys(path for path, _ in self.makers))


def feed_forwards(found: ModelMap) -> tuple[FeedForward, ...]:
    """The feed-forward layers of a model, in forward order; stacks of experts are none.

    Raises:
        UserError: there are none whose neurons can be told apart.
    """
    order = {site.path: place for place, site in enumerate(found.sites)}
    made = []
    for site in found.where("down"):
        group = next((g for g in found.coupled if Member(site.path, "in") in g.members), None)
        makers = () if group is None or group.width != site.shape[1] else _makers(found, group)
        if makers:
            runs = tuple(sorted(makers, key=lambda run: (order[run[0]], run[1])))
            made.append(FeedForward(site.block, runs, site.path, group.width))  # type: ignore[union-attr]
    if not made:
        ends, experts = len(found.where("down")), len(found.where("expert"))
        raise UserError(
            "neurons of feed-forward layers were asked for, and this model has no such layer whose neurons stand "
            f"apart: {ends} linears end a feed-forward layer, and {experts} are experts; take a model with plain "
            "feed-forward layers"
        )
    return tuple(made)


def _makers(found: ModelMap, group: Coupled) -> tuple[tuple[str, int], ...]:
    """The runs of rows that make a group's channels; none where anything but linears meets them."""
    linear = {site.path for site in found.sites if site.kind == "linear"}
    makers = [m for m in group.members if m.side == "out"]
    plain = all(m.path in linear and m.repeat == m.stride == 1 for m in group.members)
    if not plain or len(makers) + 1 != len(group.members) or group.kind != "channels" or group.padded:
        return ()
    return tuple((m.path, m.offset) for m in makers)


# ---- what they give


@contextmanager
def watched(model: nn.Module, layers: Sequence[FeedForward]) -> Iterator[dict[int, Tensor]]:
    """While this lasts, what the neurons gave in the last forward: a layer's place in `layers` -> `[..., neurons]`."""
    seen: dict[int, Tensor] = {}

    def keep(place: int, module: nn.Module, args: Any) -> None:
        seen[place] = args[0].detach()

    hooks = [_of(model, at.down).register_forward_pre_hook(partial(keep, i)) for i, at in enumerate(layers)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def activations(model: nn.Module, layers: Sequence[FeedForward], tokens: Tensor) -> list[Tensor]:
    """What each layer's neurons give for tokens `[texts, tokens]`: `[texts, tokens, neurons]` a layer."""
    with watched(model, layers) as seen:
        model(input_ids=tokens, use_cache=False)
    return [seen[i].reshape(*tokens.shape, -1) for i in range(len(layers))]


@dataclass
class Clock:
    """Seconds that feed-forward layers took, all together, and how often one ran."""

    seconds: float = 0.0
    runs: int = 0


@contextmanager
def clocked(
    model: nn.Module,
    layers: Sequence[FeedForward],
    clock: Clock | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Iterator[Clock]:
    """While this lasts, the time of the feed-forward layers is added up, from their first linear to the end of `down`.

    Args:
        clock: what it is added to; a new one by default.
        now: gives seconds; `time.process_time` where other work has the cores.
    """
    clock, began = clock or Clock(), [0.0]

    def start(module: nn.Module, args: Any) -> None:
        began[0] = now()

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        clock.seconds, clock.runs = clock.seconds + now() - began[0], clock.runs + 1

    hooks = [_of(model, at.paths[0]).register_forward_pre_hook(start) for at in layers]
    hooks += [_of(model, at.down).register_forward_hook(stop) for at in layers]
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


# ---- with some of them


def narrowed(
    model: nn.Module, layers: Sequence[FeedForward], chosen: Sequence[Tensor]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """path -> a forward of the linear there with nothing but its part of the chosen neurons, for `session.lent`.

    Rows and columns are gathered once, here; of a packed weight in fp32, where the kernels would round inputs.

    Args:
        chosen: numbers of neurons, `[count]` a layer.

    Raises:
        UserError: a layer is left without neurons, or one is asked for that is not there.
    """
    made: dict[str, Callable[[Tensor], Tensor]] = {}
    for at, some in zip(layers, chosen, strict=True):
        if some.ndim != 1 or not len(some) or int(some.min()) < 0 or int(some.max()) >= at.neurons:
            raise UserError(
                f"neurons {some.tolist()[:8]} of {at.down} were asked for, {len(some)} in all; it has {at.neurons}, "
                f"numbers 0 to {at.neurons - 1}, and at least one is needed"
            )
        for path in at.paths:
            rows = torch.cat([first + some for of, first in at.makers if of == path])
            made[path] = _rows(Frozen(_of(model, path)), rows)
        base = Frozen(_of(model, at.down))
        made[at.down] = partial(nn.functional.linear, weight=base.weight()[:, some].contiguous(), bias=base.bias)
    return made


@contextmanager
def only(model: nn.Module, layers: Sequence[FeedForward], chosen: Sequence[Tensor]) -> Iterator[None]:
    """While this lasts, the layers run with these neurons alone, and the others cost nothing; see `narrowed`."""
    with lent(model, narrowed(model, layers, chosen)):
        yield


@contextmanager
def masked(model: nn.Module, layers: Sequence[FeedForward], keep: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While this lasts, all neurons are computed, and what `keep` says no to counts as zero; no time is saved.

    Args:
        keep: from a layer's place in `layers` and what its neurons gave `[..., neurons]` to bools that fit that shape.
    """

    def hide(place: int, module: nn.Module, args: Any) -> Any:
        return (args[0] * keep(place, args[0]), *args[1:])

    hooks = [_of(model, at.down).register_forward_pre_hook(partial(hide, i)) for i, at in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def _rows(base: Frozen, rows: Tensor) -> Callable[[Tensor], Tensor]:
    weight = base.weight()[rows].contiguous() if base.packed is None else base.packed.take(rows)
    return partial(nn.functional.linear, weight=weight, bias=None if base.bias is None else base.bias[rows])


# ---- writing text with some of them


class NeuronSession(TorchSession):
    """Reads the beginning of each text with all neurons, and writes on with those that a policy chooses from it.

    Args:
        policy: chooses, from what the neurons gave for the first tokens that a sequence is given, its prompt.
        layers: those of the model.
        rest: see `TorchSession`.
        sample: gives tokens `[texts, length]`, for policies that prepare themselves on some.

    Attributes:
        chosen: of each sequence, the neurons of each layer.
        read, written: time of the feed-forward layers, for prompts and for what follows them.
    """

    def __init__(
        self,
        policy: Selector,
        layers: Sequence[FeedForward],
        *rest: Any,
        sample: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__(*rest)
        self.policy, self.layers = policy, layers
        self.chosen: dict[int, tuple[Tensor, ...]] = {}
        self.read, self.written = Clock(), Clock()
        self._thin: dict[int, dict[str, Callable[[Tensor], Tensor]]] = {}
        self._prepared = policy.prepare(self._texts(sample))

    def outputs(self, tokens: Sequence[int], sequence: int = 0) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of a sequence."""
        if sequence in self.chosen:
            with clocked(self.model, self.layers, self.written):
                return super().outputs(tokens, sequence)
        pieces, given = [], []
        with watched(self.model, self.layers) as seen, clocked(self.model, self.layers, self.read):
            for first, last in self.cache.cuts(0, len(tokens), len(tokens)):
                pieces.append(super().outputs(tokens[first:last], sequence))
                given.append([seen[i].reshape(last - first, -1) for i in range(len(self.layers))])
        if not pieces:
            return super().outputs(tokens, sequence)
        view = Prompted(tuple(torch.cat(layer) for layer in zip(*given, strict=True)), self._prepared)
        self.chosen[sequence] = tuple(self.policy.decide(view))
        self._thin[sequence] = narrowed(self.model, self.layers, self.chosen[sequence])
        return torch.cat(pieces)

    def forget(self, sequence: int, length: int = 0) -> None:
        """Drop all tokens of a sequence but the first `length`; without any, its neurons are chosen anew."""
        super().forget(sequence, length)
        if length == 0:
            self.chosen.pop(sequence, None)
            self._thin.pop(sequence, None)

    def _lends(self, sequence: int) -> dict[str, Callable[[Tensor], Tensor]]:
        return super()._lends(sequence) | self._thin.get(sequence, {})

    def _texts(self, sample: Callable[[], Tensor] | None) -> Iterator[list[Tensor]]:
        if sample is None:
            raise UserError(
                f"{self.policy.card.name} prepares itself on a sample of text, and the model was opened without one"
            )
        for text in sample():
            yield [given[0] for given in activations(self.model, self.layers, text[None])]
