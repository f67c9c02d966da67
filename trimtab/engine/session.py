"""Text written by a model: in a compiled program where its form is known and the program proved itself, else by torch.

Both have one face: `extend` and `step` give the logits of the next token, and `generate` the tokens.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.engine import memory
from trimtab.engine.adapters import MOST, Bank, half
from trimtab.engine.drawing import draw
from trimtab.engine.program import (
    PROOF,
    Form,
    ModuleStore,
    Unknown,
    Weights,
    compile_form,
    form_of,
    matrices_of,
)
from trimtab.formats.cache import BLOCK, CacheFormat
from trimtab.formats.packed import Packed
from trimtab.kernels.native import native

if TYPE_CHECKING:
    from trimtab.core.method import Selector
    from trimtab.core.modelmap import ModelMap
    from trimtab.engine.cache import Caching

AGREE = 1e-4  # by how much of the largest logit they may differ
ROUNDED = 5e-2  # the same where activations are rounded to 8 bits, which on a tie goes either way


class Writer(Protocol):
    """What writes text: sequences, each a number, to which tokens are added.

    Attributes:
        context: tokens that a sequence may have.
        most: tokens of a step whose logits can be asked for.
        cache: how keys and values are stored.
    """

    context: int
    most: int
    cache: CacheFormat

    def extend(self, sequence: int, tokens: Sequence[int]) -> Tensor:
        """Logits `[vocabulary]` after these tokens."""

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Logits `[sequences, vocabulary]` after one more token of each of these sequences."""

    def advance(self, pieces: Mapping[int, Sequence[int]]) -> Tensor:
        """Logits `[sequences, vocabulary]` after more tokens of each of these sequences, packed into one step: together
        no more than a step takes, and none across the end of a window of a packed cache.
        """

    def outputs(self, tokens: Sequence[int], sequence: int = 0) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of a sequence."""

    def score(self, pieces: Mapping[int, Sequence[int]]) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of these sequences, packed into one step as by
        `advance`, of `most` tokens at most.
        """

    def forget(self, sequence: int, length: int = 0) -> None:
        """Drop all tokens of a sequence but the first `length`. Where that ends within a window of a packed cache, the
        tokens of the window that stay go on from their packed form.
        """

    def use(self, sequence: int, adapter: str | None) -> None:
        """From now on tokens of the sequence go through this adapter of the bank, or through none."""


class Session:
    """A compiled program and how far each of its sequences has come."""

    def __init__(self, program: Any, head: Any, cache: CacheFormat | None = None, bank: Bank | None = None) -> None:
        self.program, self.head, self.cache, self.bank = program, head, cache or CacheFormat(), bank
        self.context: int = program.context
        self.most: int = program.outputs
        self.lengths = [0] * program.sequences
        self.adapters: dict[int, str] = {}

    def extend(self, sequence: int, tokens: Sequence[int]) -> Tensor:
        """Logits `[vocabulary]` after these tokens, taken in chunks of as many as the program has rows."""
        logits = None
        for first, last in self.cache.cuts(self.lengths[sequence], len(tokens), self.program.rows):
            logits = self._run(tokens[first:last], [sequence], [last - first])
        if logits is None:
            raise UserError("no tokens to go on from; give at least one")
        return torch.from_numpy(logits[0])

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Logits `[sequences, vocabulary]` after one more token of each of these sequences."""
        return torch.from_numpy(self._run(list(tokens.values()), list(tokens), [1] * len(tokens)))

    def advance(self, pieces: Mapping[int, Sequence[int]]) -> Tensor:
        """Logits `[sequences, vocabulary]` after more tokens of each of these sequences, packed into one step."""
        return self._packed(pieces, every=False)

    def score(self, pieces: Mapping[int, Sequence[int]]) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of these sequences, packed into one step."""
        return self._packed(pieces, every=True)

    def forget(self, sequence: int, length: int = 0) -> None:
        """Drop all tokens of a sequence but the first `length`."""
        before, self.lengths[sequence] = self.lengths[sequence], min(self.lengths[sequence], length)
        if self.program.paged and -(-before // BLOCK) > -(-length // BLOCK):
            self.program.release(sequence, length)

    def use(self, sequence: int, adapter: str | None) -> None:
        """From now on tokens of the sequence go through this adapter of the bank, or through none."""
        _use(self.bank, self.adapters, sequence, adapter)

    def outputs(self, tokens: Sequence[int], sequence: int = 0) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of a sequence."""
        cuts = self.cache.cuts(self.lengths[sequence], len(tokens), self.program.outputs)
        parts = [self._run(tokens[first:last], [sequence], [last - first], every=True).copy() for first, last in cuts]
        return torch.from_numpy(np.concatenate(parts))

    def _packed(self, pieces: Mapping[int, Sequence[int]], every: bool) -> Tensor:
        tokens = [token for piece in pieces.values() for token in piece]
        return torch.from_numpy(self._run(tokens, list(pieces), [len(piece) for piece in pieces.values()], every))

    def _run(self, tokens: Sequence[int], sequences: list[int], counts: list[int], every: bool = False) -> np.ndarray:
        starts = [self.lengths[s] for s in sequences]
        numbers = [np.array(n, np.int32) for n in (tokens, sequences, starts, counts)]
        adapters = [] if self.bank is None else [self.bank.number(self.adapters.get(s)) for s in sequences]
        logits = self.program.run(self.head, *numbers, every, adapters)
        for sequence, count in zip(sequences, counts, strict=True):
            self.lengths[sequence] += count
        return logits


class TorchSession:
    """The model itself, with the cache that transformers keeps; its packed weights are applied as the kernels do."""

    def __init__(
        self,
        model: nn.Module,
        forwards: Mapping[str, Callable[[Tensor], Tensor]],
        context: int,
        cache: CacheFormat | None = None,
        bank: Bank | None = None,
        caching: Caching | None = None,
    ) -> None:
        self.model, self.forwards, self.context, self.bank = model, forwards, context, bank
        self.most = context
        self.cache, self.caching = cache or CacheFormat(), caching
        self.past: dict[int, Any] = {}
        self.lengths: dict[int, int] = {}
        self.adapters: dict[int, str] = {}

    def extend(self, sequence: int, tokens: Sequence[int]) -> Tensor:
        """Logits `[vocabulary]` after these tokens."""
        return self.outputs(tokens, sequence)[-1]

    @torch.no_grad()
    def outputs(self, tokens: Sequence[int], sequence: int = 0) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of a sequence."""
        past: Any = self.past.get(sequence)
        length = self.lengths.get(sequence, 0)
        parts: list[Tensor] = []
        with lent(self.model, self._lends(sequence)):
            if past is None and self.caching is not None:
                past = self.caching.new()
            for first, last in self.cache.cuts(length, len(tokens), len(tokens)):
                ids = torch.tensor([list(tokens[first:last])])
                if self.caching is not None:
                    out = self.caching.run(past, ids)
                else:
                    out = self.model(input_ids=ids, past_key_values=past, use_cache=True)
                past = out.past_key_values
                parts.append(out.logits[0].float())
        if not parts:
            raise UserError("no tokens to go on from; give at least one")
        self.past[sequence], self.lengths[sequence] = past, length + len(tokens)
        return torch.cat(parts)

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Logits `[sequences, vocabulary]` after one more token of each of these sequences."""
        return self.advance({sequence: [token] for sequence, token in tokens.items()})

    def advance(self, pieces: Mapping[int, Sequence[int]]) -> Tensor:
        """Logits `[sequences, vocabulary]` after more tokens of each of these sequences."""
        return torch.stack([self.extend(sequence, piece) for sequence, piece in pieces.items()])

    def score(self, pieces: Mapping[int, Sequence[int]]) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of these sequences."""
        return torch.cat([self.outputs(piece, sequence) for sequence, piece in pieces.items()])

    def forget(self, sequence: int, length: int = 0) -> None:
        """Drop all tokens of a sequence but the first `length`."""
        if length == 0:
            self.past.pop(sequence, None)
            self.lengths.pop(sequence, None)
        elif sequence in self.past:
            past, before = self.past[sequence], self.lengths[sequence]
            past.crop(min(0, length - before))
            self.lengths[sequence] = min(length, before)

    def use(self, sequence: int, adapter: str | None) -> None:
        """From now on tokens of the sequence go through this adapter of the bank, or through none."""
        _use(self.bank, self.adapters, sequence, adapter)

    def _lends(self, sequence: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """path -> the forward that a module has for tokens of a sequence."""
        return {**self.forwards, **self._adapted(self.adapters.get(sequence))}

    def _adapted(self, adapter: str | None) -> dict[str, Callable[[Tensor], Tensor]]:
        if adapter is None or self.bank is None:
            return {}
        self.bank.number(adapter)
        found = {}
        for path, factors in self.bank.held[adapter].factors.items():
            found[path] = _corrected(self.forwards.get(path, self.model.get_submodule(path).forward), *factors)
        return found


def _corrected(forward: Callable[[Tensor], Tensor], down: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
    narrow, wide = half(down).float(), half(up).float()
    return lambda x: forward(x) + x @ narrow.T @ wide.T


def _use(bank: Bank | None, adapters: dict[int, str], sequence: int, adapter: str | None) -> None:
    adapters.pop(sequence, None)
    if adapter is not None:
        if bank is None:
            raise UserError(f"adapter {adapter!r} was asked for, and this session was opened without adapters")
        bank.number(adapter)
        adapters[sequence] = adapter


@dataclass
class Timing:
    """How long a text took.

    Fields:
        prompt, tokens: how many of either.
        prefill, decode: seconds for the prompt up to the first token, and for those after it.
    """

    prompt: int = 0
    tokens: int = 0
    prefill: float = 0.0
    decode: float = 0.0


def generate(
    writer: Writer,
    tokens: Sequence[int],
    limit: int,
    *,
    stop: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    seed: int = 0,
    timing: Timing | None = None,
) -> Iterator[int]:
    """Tokens one after the other, greedy at temperature 0.

    Args:
        tokens: the prompt.
        limit: at most so many new tokens.
        stop: tokens that end the text.
        timing: is kept up to date.
    """
    rng = np.random.default_rng(seed)
    timing = timing or Timing()
    timing.prompt = len(tokens)
    start = time.perf_counter()
    writer.forget(0)
    logits = writer.extend(0, tokens)
    while True:
        token = draw(logits.numpy(), rng, temperature)
        spent = time.perf_counter() - start
        timing.prefill, timing.decode = (timing.prefill, timing.decode + spent) if timing.tokens else (spent, 0.0)
        timing.tokens += 1
        if token in stop:
            return
        yield token
        if timing.tokens >= limit:
            return
        start = time.perf_counter()
        logits = writer.step({0: token})[0]


# ---- opening one


class Runtime:
    """A causal language model ready to open sessions: its map, its weights as the kernels hold them, and its form.

    Args:
        packed: parameter name -> reader of the packed weight, for those that an artifact stores packed.
        share: the module's own weights give way to those of the kernels, so that they are in memory once.
        plain: run on torch even where there are kernels.
        proved: is told the form when its program has proved itself.

    Attributes:
        reason: why the model runs on torch; empty where a program runs it.
    """

    def __init__(
        self,
        model: nn.Module,
        packed: Mapping[str, Callable[[], Packed]] | None = None,
        share: bool = False,
        plain: bool = False,
        proved: Callable[[Form], object] = lambda form: None,
    ) -> None:
        self.model, self.share, self.tell = model, share, proved
        self.kernels = None if plain else native()
        self.reason = "there are no compiled kernels" if self.kernels is None else ""
        self.found = found = map_of(model)
        self.weights = Weights(self.kernels, ModuleStore(model, packed or {}), matrices_of(found))
        self.form: Form | None = None
        if self.kernels is not None:
            try:
                self.form = form_of(model, found)
            except Unknown as unknown:
                self._refuse(unknown)
        self.proved = False

    def open(
        self,
        context: int,
        *,
        sequences: int = 1,
        chunk: int = 256,
        cache: str = "fp16",
        bank: Bank | None = None,
        paged: bool = False,
        sample: Callable[[], Tensor] | None = None,
        most: int = PROOF,
        neurons: Selector | None = None,
    ) -> Writer:
        """A session: compiled where the model's form is known and the program has proved itself, else on torch.

        Args:
            context: tokens that a text may have.
            sequences: texts that are written at once.
            chunk: tokens of a prompt that are taken together.
            cache: how keys and values are stored: `fp16`, `bf16`, `fp32`, or packed as by `kivi4` or `kivi2`, see
                `formats.cache`. On torch what is not packed stays in the model's own type.
            bank: adapters that sequences may use.
            paged: a sequence takes memory for the tokens that it holds, and gives it back when they are forgotten;
                whoever asks for it sees to it that all of them fit.
            sample: gives tokens `[texts, length]` for methods that prepare themselves on some.
            most: tokens of a step whose logits can be asked for; a draft's are checked so.
            neurons: chooses from each prompt the neurons that write on; on torch, and without adapters.

        Raises:
            UserError: there is no such cache, it does not fit into the memory that is free, or there are no neurons to
                choose from.
        """
        stored = CacheFormat.parse(cache)
        if not stored.compiled or neurons is not None:
            return self._on_torch(context, stored, bank, sample, neurons)
        if self.form is not None:
            check_memory(self.form, self.weights, context, 1 if paged else sequences, self.proved, stored)
        if self.form is not None and not self.proved:
            try:
                prove(self.model, self.form, self.weights)
                self.proved = True
                self.tell(self.form)
            except Unknown as unknown:
                self._refuse(unknown)
        if self.form is None:
            return self._on_torch(context, stored, bank, sample)
        if self.share:
            give_way(self.model, self.weights)
        return _session(self.form, self.weights, context, sequences, chunk, stored, bank, paged, most)

    def _on_torch(
        self,
        context: int,
        stored: CacheFormat,
        bank: Bank | None,
        sample: Callable[[], Tensor] | None,
        neurons: Selector | None = None,
    ) -> Writer:
        for path, matrix in self.weights.matrices.items():
            if self.weights.is_packed(path) and matrix.kind != "embedding":
                self.weights.get((path,))
        caching = None
        if (keeper := stored.worker()) is not None:
            from trimtab.engine.cache import Caching

            caching = Caching(keeper, stored.window, self.model, self.found, sample)
        rest = (self.model, self.weights.forwards(self.model), context, stored, bank, caching)
        if neurons is None:
            return TorchSession(*rest)
        from trimtab.engine.neurons import NeuronSession, feed_forwards

        return NeuronSession(neurons, feed_forwards(self.found), *rest, sample=sample)

    def bank(self, most: int = MOST) -> Bank:
        """A place for adapters of this model."""
        return Bank(self.kernels, self.weights.matrices, most)

    @property
    def engine(self) -> str:
        """What runs its sessions: the kernels and their threads, or torch and its."""
        return f"torch, {torch.get_num_threads()} threads" if self.form is None else _said(self.kernels)

    def _refuse(self, unknown: Unknown) -> None:
        self.form, self.reason = None, f"it has {unknown}"
        print(f"no program was made for this model, so it runs on torch, slower: {self.reason}", file=sys.stderr)


class Kept:
    """A causal language model whose program proved itself before: opens sessions from its stored weights alone, without
    a module.

    Args:
        weights: those of the form's matrices.
    """

    def __init__(self, form: Form, weights: Weights) -> None:
        self.form, self.weights = form, weights

    def prepare(self) -> None:
        """Read all weights and interleave them for the kernels."""
        for paths in self.form.products:
            self.weights.get(paths)

    def bank(self, most: int = MOST) -> Bank:
        """A place for adapters of this model."""
        return Bank(self.weights.kernels, self.form.matrices, most)

    def open(
        self,
        context: int,
        *,
        sequences: int = 1,
        chunk: int = 256,
        cache: str = "fp16",
        bank: Bank | None = None,
        paged: bool = False,
        most: int = PROOF,
    ) -> Writer:
        """A session, see `Runtime.open`.

        Raises:
            UserError: there is no such cache, it does not fit into the memory that is free, or what is stored is not of
                the form's shapes.
        """
        stored = CacheFormat.parse(cache)
        check_memory(self.form, self.weights, context, 1 if paged else sequences, bool(self.weights.made), stored)
        try:
            return _session(self.form, self.weights, context, sequences, chunk, stored, bank, paged, most)
        except ValueError as error:
            raise UserError(f"the stored weights are not those of the model's configuration: {error}") from error

    @property
    def engine(self) -> str:
        """What runs its sessions: the kernels and their threads."""
        return _said(self.weights.kernels)


def _session(
    form: Form,
    weights: Weights,
    context: int,
    sequences: int,
    chunk: int,
    cache: CacheFormat,
    bank: Bank | None,
    paged: bool,
    most: int,
) -> Session:
    sizes = {"rows": chunk, "outputs": max(sequences, most), "sequences": sequences, "context": context}
    return Session(*compile_form(form, weights, **sizes, cache=cache, bank=bank, paged=paged), cache, bank)


def _said(kernels: Any) -> str:
    return f"{kernels.__name__.rpartition('_')[2]} kernels, {kernels.threads()} threads"


def map_of(model: nn.Module) -> ModelMap:
    """The model's map; linears that stay packed are traced as the plain ones that they stand for."""
    from trimtab.core.modelmap import trace
    from trimtab.engine.run import PackedLinear

    packed = {path: module for path, module in model.named_modules() if isinstance(module, PackedLinear)}
    try:
        for path, module in packed.items():
            stand_in = nn.Linear(module.in_features, module.out_features, module.bias is not None, "meta")
            model.set_submodule(path, stand_in)
        return trace(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    finally:
        for path, module in packed.items():
            model.set_submodule(path, module)


@torch.no_grad()
def prove(model: nn.Module, form: Form, weights: Weights) -> None:
    """Run the program and torch, with the same weights, on one text: in chunks, then token by token.

    Raises:
        Unknown: they differ by more than the rounding of activations explains.
    """
    length = min(PROOF, form.limit or PROOF)
    program, head = compile_form(
        form, weights, rows=7, outputs=7, sequences=2, context=length, cache=CacheFormat("fp32")
    )
    session = Session(program, head)
    tokens = torch.randint(form.vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    found = [session.outputs(tokens[i : i + 7].tolist()) for i in range(0, length - 4, 7)]
    done = sum(len(part) for part in found)
    found += [session.outputs([token]) for token in tokens[done:].tolist()]
    with lent(model, weights.forwards(model)):
        expected = model(input_ids=tokens[None]).logits[0].float()
    error = float((expected - torch.cat(found)).abs().max() / expected.abs().max().clamp_min(1e-12))
    rounded = any(weights.is_packed(path) for path in form.sites)
    if not error <= (ROUNDED if rounded else AGREE):
        raise Unknown(f"outputs that a program of its form gives with an error of {error:.2g} of the largest")


@contextmanager
def lent(model: nn.Module, forwards: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Modules use these forwards for a while."""
    modules = {path: model.get_submodule(path) for path in forwards}
    before = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.forward = forwards[path]
        yield
    finally:
        for path, module in modules.items():
            if before[path] is None:
                del module.forward
            else:
                module.forward = before[path]  # type: ignore[assignment]


def give_way(model: nn.Module, weights: Weights) -> None:
    """From now on modules use the kernels' weights, and let go of their own."""
    for path, forward in weights.forwards(model).items():
        module = model.get_submodule(path)
        module.forward = forward  # type: ignore[assignment]
        if isinstance(getattr(module, "packed", None), Packed):
            module.packed = None  # type: ignore[assignment]
        elif "weight" in module._parameters and module._parameters["weight"] is not None:
            module._parameters["weight"] = nn.Parameter(module._parameters["weight"].to("meta"), requires_grad=False)


def check_memory(form: Form, weights: Weights, context: int, sequences: int, made: bool, stored: CacheFormat) -> None:
    """Refuse what the free memory cannot hold.

    Raises:
        UserError: it says how much is needed, and what would fit.
    """
    free = memory.free_bytes()
    if free is None:
        return
    weight = 0 if made else weights.nbytes(form.sites)
    cache = form.cache_bytes(context, sequences, stored)
    if weight + cache <= free:
        return
    parts = f"the weights take {said_bytes(weight)} and {sequences} x {context} tokens of context {said_bytes(cache)}"
    fits = bisect_right(range(context), free - weight, key=lambda n: form.cache_bytes(n, sequences, stored)) - 1
    cure = f"ask for a context of at most {fits} tokens" if fits >= 64 else "take a smaller artifact or free memory"
    raise UserError(f"the model needs {said_bytes(weight + cache)}, and {said_bytes(free)} are free: {parts}; {cure}")


def said_bytes(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
