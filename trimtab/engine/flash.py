"""Text written by a model whose feed-forward weights lie on disk: of each layer only neurons that a token needs are
read, and those of the last few tokens stay in memory.

A layer's memory is one matrix, a row a neuron, made once. Neurons that go are overwritten by the last rows, so that
those that are held are always the first, in any order, and a product takes them without gathering. What decides which
neurons a token needs is in memory too: the rows that a ReLU reads, which is exact, or a predictor, which is not.
What a token gives depends on the neurons that it needs alone, not on what else is held.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Pager
from trimtab.core.view import Held
from trimtab.engine.neurons import FeedForward
from trimtab.engine.session import TorchSession, said_bytes
from trimtab.formats.bundles import Bundles, Spec, bundled, write_bundles
from trimtab.formats.cache import CacheFormat
from trimtab.parts.activity import Deciding, predictor

if TYPE_CHECKING:
    from trimtab.engine.adapters import Bank

PIECE = 1 << 22  # bytes that are read together, at most; beside the layers' memory there is room for so many
NEVER = 1 << 40


@dataclass(frozen=True)
class Seen:
    """What a sample of text showed of a layer.

    Fields:
        decider: which of its makers a ReLU reads: a neuron is silent where that gives nothing above zero.
        needed: neurons that a token needed, the mean, as the file's way of deciding has it.
    """

    decider: int
    needed: int


# ---- writing the file


class Watch:
    """Looks at feed-forward layers while text goes through a model.

    Args:
        rank: of the predictors that are to be trained on it; 0: none are, and what the layers read is not kept.
    """

    def __init__(self, model: nn.Module, layers: Sequence[FeedForward], rank: int = 0) -> None:
        self.model, self.layers, self.rank = model, layers, rank
        self.made: dict[str, Tensor] = {}
        self.counts: list[list[list[Tensor]]] = [[[] for _ in at.makers] for at in layers]
        self.missed = [[False] * len(at.makers) for at in layers]
        self.inputs: list[list[Tensor]] = [[] for _ in layers]
        self.active: list[list[Tensor]] = [[] for _ in layers]
        self.handles = []
        for i, at in enumerate(layers):
            for path in at.paths:
                self.handles.append(model.get_submodule(path).register_forward_hook(partial(self._making, i, path)))
            self.handles.append(model.get_submodule(at.down).register_forward_pre_hook(partial(self._reading, i)))

    def close(self) -> None:
        """Look no longer."""
        for handle in self.handles:
            handle.remove()

    def _making(self, i: int, path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        self.made[path] = output.detach().flatten(0, -2)
        if self.rank and path == self.layers[i].paths[0]:
            self.inputs[i].append(args[0].detach().flatten(0, -2).float())

    def _reading(self, i: int, module: nn.Module, args: Any) -> None:
        at, active = self.layers[i], args[0].detach().flatten(0, -2) != 0
        for j, (path, first) in enumerate(at.makers):
            above = self.made[path][:, first : first + at.neurons] > 0
            self.missed[i][j] |= bool((active & ~above).any())
            self.counts[i][j].append(above.sum(-1))
        if self.rank:
            self.active[i].append(active)

    def seen(self, i: int) -> tuple[Seen, dict[str, Tensor]]:
        """What a layer showed, and the matrices of its predictor, where there is one.

        Raises:
            UserError: its neurons are never silent.
        """
        at = self.layers[i]
        if False not in self.missed[i]:
            raise UserError(
                f"weights were to stay on disk, of which tokens need few where a ReLU makes neurons silent, and none "
                f"makes those of {at.down}; take a model with ReLU"
            )
        decider = self.missed[i].index(False)
        counts, found = torch.cat(self.counts[i][decider]), {}
        if self.rank:
            inputs, active = torch.cat(self.inputs[i]), torch.cat(self.active[i])
            made = predictor(inputs, active, min(self.rank, inputs.shape[1]), seed=i)
            counts = (made(inputs) > 0).sum(-1)
            found = {"up": made.up, "down": made.down, "bias": made.bias[:, None]}  # type: ignore[index]
        return Seen(decider, ceil(max(float(counts.float().mean()), 1.0))), found  # type: ignore[return-value]


def write_flash(
    path: Path,
    watch: Watch,
    weight: Callable[[str], Tensor],
    dtype: torch.dtype,
    said: Callable[[str], object] = lambda text: None,
) -> None:
    """Write the file that `Flash` reads.

    Args:
        watch: what has seen a sample of text. Without a rank the rows that decide are kept apart from the records.
        weight: gives the matrix `[out, in]` of a path.
        dtype: of the file: fp32, bf16 or fp16.
        said: is told how far it is.

    Raises:
        UserError: a layer's neurons are never silent, or the file cannot be written.
    """
    stored, layers = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype], watch.layers
    learned: dict[str, Tensor] = {}
    seen: list[Seen] = []
    specs: list[Spec] = []
    for i, at in enumerate(layers):
        said(f"looking at feed-forward layer {i + 1} of {len(layers)}")
        found, made = watch.seen(i)
        seen.append(found)
        learned |= {_name(i, what): tensor for what, tensor in made.items()}
        inputs = _inputs(watch.model.get_submodule(at.paths[0]))
        width = inputs * (len(at.makers) - (not watch.rank)) + _outputs(watch.model.get_submodule(at.down))
        specs.append((_name(i, "neurons"), stored, (at.neurons, width)))
        if not watch.rank:
            specs.append((_name(i, "up"), stored, (at.neurons, inputs)))
    specs += [(name, "F32", tuple(tensor.shape)) for name, tensor in learned.items()]

    def tensor(name: str) -> Tensor:
        if name in learned:
            return learned[name]
        _, number, what = name.split(".")
        at, decider = layers[int(number)], seen[int(number)].decider
        wanted = [j for j in range(len(at.makers)) if (j == decider if what == "up" else watch.rank or j != decider)]
        runs = [at.makers[j] for j in wanted]
        rows = [weight(p)[first : first + at.neurons] for p, first in runs]
        if what == "up":
            return rows[0].to(dtype)
        said(f"writing feed-forward layer {int(number) + 1} of {len(layers)}")
        return bundled(rows, weight(at.down)).to(dtype)

    about = {"rank": str(watch.rank), "seen": json.dumps([asdict(s) for s in seen])}
    write_bundles(path, specs, tensor, about)


def _name(layer: int, what: str) -> str:
    return f"layers.{layer:04d}.{what}"


# ---- running from it


@dataclass
class Tally:
    """What was read since the model was opened.

    Fields:
        tokens: that went through the layers.
        needed, met: neurons that they needed, and how many of those were in memory.
        reads, bytes: runs of neighbouring neurons that were read, and their bytes.
    """

    tokens: int = 0
    needed: int = 0
    met: int = 0
    reads: int = 0
    bytes: int = 0

    def report(self) -> dict[str, float | None]:
        """Numbers a token, and the share of needed neurons that were in memory."""
        tokens, needed = max(self.tokens, 1), max(self.needed, 1)
        size = self.bytes / self.reads if self.reads else None
        each = {"bytes_per_token": self.bytes / tokens, "reads_per_token": self.reads / tokens, "bytes_per_read": size}
        return {"tokens": self.tokens, **each, "hit_share": self.met / needed}


class Layer:
    """A feed-forward layer in `room` bytes, and its linears' forwards for one token.

    Args:
        number: its place in the file.
        modules: path -> module, for the biases, which are in memory.
        deciding: says which neurons a token needs.
        exact: the maker that `deciding` is, or None.
        limit: the score above which a neuron is needed.
    """

    def __init__(
        self,
        number: int,
        at: FeedForward,
        modules: Mapping[str, nn.Module],
        file: Bundles,
        policy: Pager,
        room: int,
        deciding: Deciding,
        exact: int | None,
        limit: float,
        tally: Tally,
    ) -> None:
        self.at, self.file, self.policy, self.room, self.tally = at, file, policy, room, tally
        self.deciding, self.exact, self.limit = deciding, exact, limit
        self.name = _name(number, "neurons")
        self.record = 4 * file.spec(self.name)[1]
        self.biases = {path: _bias(modules[path]) for path in (*at.paths, at.down)}
        width = deciding.up.shape[1] if deciding.down is None else deciding.down.shape[1]
        kept = [j for j in range(len(at.makers)) if j != exact]
        self.columns = {j: slice(k * width, (k + 1) * width) for k, j in enumerate(kept)}
        self.below = slice(len(kept) * width, None)
        self.rows = torch.zeros(max(room // self.record, 1), self.record // 4)
        self.used = 0
        self.numbers = np.zeros(len(self.rows), np.int64)  # of the neuron in each row
        self.places = np.full(at.neurons, -1)  # of each neuron's row
        self.idle = np.full(at.neurons, NEVER)
        self.token: Tensor | None = None
        self.scores = torch.zeros(0)
        self.needed = np.zeros(at.neurons, np.bool_)

    def forwards(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """path -> forward of the linear there."""
        made: dict[str, Callable[[Tensor], Tensor]] = {p: partial(self._make, p) for p in self.at.paths}
        return {**made, self.at.down: self._give}

    def _make(self, path: str, x: Tensor) -> Tensor:
        """What a maker gives; neurons that are not needed may get zero."""
        if x is not self.token:
            self._begin(x)
        flat, runs = x.reshape(-1), []
        for j, (where, _) in enumerate(self.at.makers):
            if where != path:
                continue
            if j == self.exact:
                runs.append(self.scores)
                continue
            made = torch.zeros(self.at.neurons)
            made[self._held()] = self.rows[: self.used, self.columns[j]] @ flat
            for numbers, records in self._passing():
                made[numbers] = records[:, self.columns[j]] @ flat
            bias = self.biases[path]
            first = self.at.makers[j][1]
            runs.append(made if bias is None else made + bias[first : first + self.at.neurons])
        return torch.cat(runs).reshape(*x.shape[:-1], -1)

    def _give(self, h: Tensor) -> Tensor:
        """What the layer gives, from its neurons."""
        flat = torch.where(torch.from_numpy(self.needed), h.reshape(-1), 0)
        y = flat[self._held()] @ self.rows[: self.used, self.below]
        for numbers, records in self._passing():
            y = y + flat[numbers] @ records[:, self.below]
        bias = self.biases[self.at.down]
        self.token = None
        return (y if bias is None else y + bias).reshape(*h.shape[:-1], -1)

    def _begin(self, x: Tensor) -> None:
        """A token: which neurons it needs, and what is read for it."""
        self.token = x
        self.scores = self.deciding(x.reshape(-1))
        self.needed = (self.scores > self.limit).numpy()
        self.idle += 1
        self.idle[self.needed] = 0
        held = self.places >= 0
        change = self.policy.decide(Held(self.idle, held, self.room, self.record))
        self._drop(change.drop)
        self.tally.needed += int(self.needed.sum())
        self.tally.met += int((self.needed & (self.places >= 0)).sum())
        for piece in self._pieces(change.load):
            records, stop = self._read(piece), self.used + len(piece)
            self.rows[self.used : stop] = records
            self.numbers[self.used : stop], self.places[piece] = piece, np.arange(self.used, stop)
            self.used = stop

    def _drop(self, numbers: np.ndarray) -> None:
        """Let neurons go; the last rows that stay take their places."""
        gone, left = self.places[numbers], self.used - len(numbers)
        self.places[numbers] = -1
        holes = gone[gone < left]
        last = np.arange(left, self.used)
        movers = last[self.places[self.numbers[last]] == last]
        self.rows[torch.from_numpy(holes)] = self.rows[torch.from_numpy(movers)]
        self.numbers[holes] = self.numbers[movers]
        self.places[self.numbers[holes]] = holes
        self.used = left

    def _held(self) -> Tensor:
        return torch.from_numpy(self.numbers[: self.used])

    def _passing(self) -> Any:
        """Neurons that are needed and have no room: read, used and let go, piece by piece."""
        for piece in self._pieces(np.flatnonzero(self.needed & (self.places < 0))):
            yield torch.from_numpy(piece), self._read(piece)

    def _pieces(self, numbers: np.ndarray) -> list[np.ndarray]:
        count = max(PIECE // self.record, 1)
        return [numbers[i : i + count] for i in range(0, len(numbers), count)]

    def _read(self, numbers: np.ndarray) -> Tensor:
        reads, size = self.file.reads, self.file.bytes
        records = self.file.read(self.name, numbers.tolist()).float()
        self.tally.reads += self.file.reads - reads
        self.tally.bytes += self.file.bytes - size
        return records


def _bias(module: nn.Module) -> Tensor | None:
    bias: Any = getattr(module, "bias", None)
    return None if bias is None else bias.detach().float()


class Flash:
    """A causal language model with its feed-forward weights in a file: opens sessions as `Runtime` does.

    Args:
        model: without the weights of its feed-forward linears; their biases are there.
        layers: its feed-forward layers.
        file: what `write_flash` wrote of it.
        policy: which neurons are held.
        room: bytes for feed-forward weights in memory, what decides included.
        threshold: the probability from which a predicted neuron is needed; without predictors it does not count.

    Raises:
        UserError: the room does not hold the neurons of one token, or the file is another model's.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[FeedForward],
        file: Bundles,
        policy: Pager,
        room: int,
        threshold: float = 0.5,
    ) -> None:
        if not 0 < threshold < 1:
            raise UserError(f"a threshold of {threshold} was asked for; give a probability above 0 and below 1")
        self.model, self.file, self.tally, self.form = model, file, Tally(), None
        rank, seen = _described(file, layers)
        limit = log(threshold / (1 - threshold)) if rank else 0.0
        modules = dict(model.named_modules())
        deciders = [_decider(file, i, at, modules, rank, s) for i, (at, s) in enumerate(zip(layers, seen, strict=True))]
        records = [4 * file.spec(_name(i, "neurons"), rows=at.neurons)[1] for i, at in enumerate(layers)]
        fixed = sum(d.nbytes for d in deciders)
        least = [r * s.needed for r, s in zip(records, seen, strict=True)]
        rooms = shared(least, [r * at.neurons for r, at in zip(records, layers, strict=True)], room - fixed)
        if rooms is None:
            what = f"predictors of rank {rank}" if rank else "the rows that decide which neurons are silent"
            raise UserError(
                f"{said_bytes(room)} were asked for as memory of feed-forward weights, and a token of a sample needed "
                f"{said_bytes(sum(least))} of neurons, beside {said_bytes(fixed)} of {what}; give at least "
                f"{-(-(fixed + sum(least)) // 10**6)}MB"
            )
        self.layers = [
            Layer(i, at, modules, file, policy, rooms[i], deciders[i], None if rank else s.decider, limit, self.tally)
            for i, (at, s) in enumerate(zip(layers, seen, strict=True))
        ]
        self.held_bytes = fixed + sum(layer.rows.nbytes for layer in self.layers)

    def forwards(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """path -> forward of a feed-forward linear, of one token at a time."""
        return {path: forward for layer in self.layers for path, forward in layer.forwards().items()}

    def open(self, context: int, *, cache: str = "fp16", bank: Bank | None = None, **given: Any) -> FlashSession:
        """A session on torch; keys and values stay in the model's own type.

        Raises:
            UserError: a packed cache was asked for.
        """
        stored = CacheFormat.parse(cache)
        if stored.window or not stored.compiled:
            raise UserError(
                f"a cache of {cache} was asked for, and a model on disk keeps keys and values plain; leave it out"
            )
        return FlashSession(self, context, stored)

    def bank(self, most: int = 0) -> Bank:
        """No adapters run beside weights on disk."""
        raise UserError(
            "an adapter was asked for with weights on disk; merge it into the model first, or run it in memory"
        )

    @property
    def engine(self) -> str:
        """What runs its sessions."""
        return f"torch, {torch.get_num_threads()} threads, feed-forward weights on disk"


class FlashSession(TorchSession):
    """A session that takes one token at a time, prompts as well."""

    def __init__(self, flash: Flash, context: int, cache: CacheFormat) -> None:
        super().__init__(flash.model, flash.forwards(), context, cache)
        self.tally = flash.tally

    def outputs(self, tokens: Sequence[int], sequence: int = 0) -> Tensor:
        """Logits `[tokens, vocabulary]` after each of these tokens of a sequence."""
        if not tokens:
            raise UserError("no tokens to go on from; give at least one")
        self.tally.tokens += len(tokens)
        return torch.cat([super(FlashSession, self).outputs([token], sequence) for token in tokens])


def shared(least: Sequence[int], most: Sequence[int], room: int) -> list[int] | None:
    """Bytes for each layer, in proportion to the least that each needs and at most all of it; None: too few for that.

    >>> shared([10, 30], [100, 50], 100), shared([10, 30], [100, 50], 30)
    ([50, 50], None)
    """
    if room < sum(least):
        return None
    open_, given = set(range(len(least))), [0] * len(least)
    while open_:
        left = room - sum(given[i] for i in range(len(least)) if i not in open_)
        total = sum(least[i] for i in open_)
        full = {i for i in open_ if least[i] * left // total >= most[i]}
        for i in full or open_:
            given[i] = most[i] if full else least[i] * left // total
        open_ = open_ - full if full else set()
    return given


def _described(file: Bundles, layers: Sequence[FeedForward]) -> tuple[int, list[Seen]]:
    """What the header says, as far as it fits the layers."""
    try:
        rank = int(file.metadata["rank"])
        seen = [Seen(int(s["decider"]), int(s["needed"])) for s in json.loads(file.metadata["seen"])]
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        rank, seen = -1, []
    sound = all(0 <= s.decider < len(at.makers) and 0 < s.needed <= at.neurons for s, at in zip(seen, layers))  # noqa: B905
    if rank < 0 or len(seen) != len(layers) or not sound:
        raise UserError(
            f"{file.path} does not describe this model's feed-forward layers; delete it, and it is written again"
        )
    return rank, seen


def _decider(
    file: Bundles, number: int, at: FeedForward, modules: Mapping[str, nn.Module], rank: int, seen: Seen
) -> Deciding:
    """What decides for a layer, from the file."""
    path, first = at.makers[seen.decider]
    width, inputs = file.spec(_name(number, "neurons"), rows=at.neurons)[1], _inputs(modules[path])
    outputs = width - inputs * (len(at.makers) - (not rank))
    if outputs != _outputs(modules[at.down]):
        raise UserError(
            f"{file.path}: the records of {at.down} have {width} elements, which is another model's; delete it"
        )
    if rank:
        ranks = file.spec(_name(number, "up"), rows=at.neurons)[1]
        file.spec(_name(number, "down"), rows=ranks, width=inputs)
        file.spec(_name(number, "bias"), rows=at.neurons, width=1)
        up, down, shift = (file.whole(_name(number, what)).float() for what in ("up", "down", "bias"))
        return Deciding(up, down, shift[:, 0])
    file.spec(_name(number, "up"), rows=at.neurons, width=inputs)
    bias = _bias(modules[path])
    return Deciding(
        file.whole(_name(number, "up")).float(), None, None if bias is None else bias[first : first + at.neurons]
    )


def _inputs(module: Any) -> int:
    return module.in_features if hasattr(module, "in_features") else module.nx


def _outputs(module: Any) -> int:
    return module.out_features if hasattr(module, "out_features") else module.nf
