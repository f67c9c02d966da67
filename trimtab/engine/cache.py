"""Caches of which older tokens are packed or dropped, for models that run on torch: a method's own arithmetic behind
the face of a cache of transformers.

All happens where a window of tokens is full and one more comes. A `Cacher` then stores the window, layer by layer; a
policy says which of all tokens stay, the same ones in every layer. What a method asks for by name is gathered while the
model runs: inputs where the layer's projections read them, queries where attention is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimtab.core.errors import UserError
from trimtab.core.method import Cacher, Method, Policy, Remembered
from trimtab.engine.program import Rotary, Unknown, rotary_of
from trimtab.formats.cache import Place, Projection, Stored

if TYPE_CHECKING:
    from trimtab.core.modelmap import ModelMap

AGREE = 1e-2  # by how much of the largest key those made from a layer's inputs may differ from the model's own


class Caching:
    """A method of caches at work in a model; its caches are made by `new` and filled by `run`.

    Args:
        keeper: a `Cacher`, or a policy that decides which tokens stay.
        window: tokens of a window.
        model, found: the model and its map; a method that asks for nothing but keys and values needs neither.
        sample: gives tokens `[texts, length]` that stand for what the model reads, for methods that prepare themselves.
    """

    def __init__(
        self,
        keeper: Method,
        window: int,
        model: nn.Module | None = None,
        found: ModelMap | None = None,
        sample: Callable[[], Tensor] | None = None,
    ) -> None:
        assert isinstance(keeper, Cacher | Policy)
        self.keeper, self.window, self.model, self.found, self.sample = keeper, window, model, found, sample
        self.needs = frozenset(keeper.needs()) if isinstance(keeper, Cacher) else frozenset({"place"})
        self.rotary = self._rotary() if "place" in self.needs else None
        self._projections: dict[int, Projection] = {}
        self._prepared: dict[int, Any] = {}
        self._grams: list[Tensor] | None = None

    def new(self) -> Held:
        """An empty cache."""
        if isinstance(self.keeper, Cacher) and self._grams is None and self._asks_gram():
            self._grams = self._gather_grams()
        return Held(self)

    def run(self, cache: Held, tokens: Tensor) -> Any:
        """What the model gives for tokens `[texts, count]`, which are added; no step crosses the end of a window."""
        cache.make_room()
        with self._gathering(cache):
            out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)  # type: ignore[misc]
        cache.note(tokens, out.logits)
        return out

    @contextmanager
    def _gathering(self, cache: Held) -> Iterator[None]:
        """While this lasts, what the method asks for reaches the cache's layers."""
        assert self.model is not None
        hooks, name = [], self.model.config.get_text_config()._attn_implementation  # type: ignore[union-attr,operator]
        if self.needs & {"inputs", "place"}:
            for i, module in enumerate(self._readers()):
                hooks.append(module.register_forward_pre_hook(partial(_keep_inputs, cache.reads, i)))
        watched = "queries" in self.needs and name in ALL_ATTENTION_FUNCTIONS
        if watched:
            before = ALL_ATTENTION_FUNCTIONS[name]
            ALL_ATTENTION_FUNCTIONS[name] = partial(_attend, cache, before)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if watched:
                ALL_ATTENTION_FUNCTIONS[name] = before

    # ---- what methods ask for

    def given(self, layer: PackedLayer) -> dict[str, Any]:
        """What the method asks for of the layer's full window."""
        first = len(layer.stored) * self.window
        stats: dict[str, Any] = {**layer.gathered, "first": first}
        if missing := (self.needs & {"inputs", "queries"}) - stats.keys():
            raise UserError(
                f"{self.keeper.card.name} asks for the {', '.join(sorted(missing))} of every layer, and this model "
                "does not show them; take a cache of another method, like kivi2"
            )
        if "place" in self.needs:
            stats["place"] = self.place(layer.index, first)
        if "below" in self.needs:
            below = layer.cache.layers[layer.index - 1].stored if layer.index else []
            stats["below"] = below[len(layer.stored)] if layer.index else None
        if "prepared" in self.needs:
            stats["prepared"] = self.prepared(layer.index)
        return {name: stats[name] for name in self.needs}

    def prepared(self, index: int) -> Any:
        """What the method worked out for a layer, once."""
        if index not in self._prepared:
            cacher = self.keeper
            assert isinstance(cacher, Cacher)
            stats = {"gram": self._grams[index]} if self._grams else {}
            self._prepared[index] = cacher.prepare(self.projection(index), **stats)
        return self._prepared[index]

    def projection(self, index: int) -> Projection:
        """How a layer makes keys and values."""
        if index not in self._projections:
            at, width = self._attention(index), 0
            made = []
            for path in (at.k, at.v):
                module = self.model.get_submodule(path)  # type: ignore[union-attr]
                width = width or int(self.found.site(path).shape[1])  # type: ignore[union-attr]
                with torch.no_grad():
                    bias = module(torch.zeros(1, width))[0].float()
                    made.append((module(torch.eye(width)).float().T - bias[:, None], bias))
            size = at.kv_heads * at.head_size
            if at.k == at.v:  # one linear for all three: queries, keys, values
                (weight, bias), start = made[0], at.heads * at.head_size
                made = [(weight[a : a + size], bias[a : a + size]) for a in (start, start + size)]
            (key, key_bias), (value, value_bias) = made
            self._projections[index] = Projection(index, key, value, key_bias, value_bias, at.kv_heads)
        return self._projections[index]

    def place(self, index: int, first: int) -> Place:
        """What puts positions from `first` on into a layer's keys."""
        heads = self._attention(index).kv_heads

        def place(keys: Tensor) -> Tensor:
            split = keys.unflatten(-1, (heads, -1)).transpose(-2, -3)
            if self.rotary is None:
                return split
            angles = self.rotary.angles(first + keys.shape[-2])
            return turned(split, *(t[first:] for t in angles))

        return place

    def _asks_gram(self) -> bool:
        return "gram" in signature(self.keeper.prepare).parameters  # type: ignore[union-attr]

    @torch.no_grad()
    def _gather_grams(self) -> list[Tensor]:
        """X^T X / n of what each layer's projections read in the sample, `[width, width]`."""
        if self.sample is None:
            raise UserError(
                f"{self.keeper.card.name} prepares itself on a sample of text, and the model was opened without one"
            )
        tokens, reads = self.sample(), dict[int, Tensor]()
        hooks = [m.register_forward_pre_hook(partial(_keep_inputs, reads, i)) for i, m in enumerate(self._readers())]
        sums = [torch.zeros(()) for _ in hooks]
        try:
            for text in tokens:
                self.model(input_ids=text[None], use_cache=False)  # type: ignore[misc]
                for i, x in reads.items():
                    sums[i] = sums[i] + x[0].float().T @ x[0].float()
        finally:
            for hook in hooks:
                hook.remove()
        return [s / tokens.numel() for s in sums]

    def check(self, index: int, first: int, inputs: Tensor, keys: Tensor) -> None:
        """Refuse where keys that are made from a layer's inputs are not those that the model made."""
        at = self.projection(index)
        ours = self.place(index, first)(inputs.float() @ at.key.T + at.key_bias)
        error = float((ours - keys.float()).abs().max() / keys.float().abs().max().clamp_min(1e-12))
        if not error <= AGREE:
            raise UserError(
                f"{self.keeper.card.name} makes keys anew from what a layer reads, and in layer {index} of this model "
                f"they come out with an error of {error:.2g} of the largest: it makes its keys in a way that is not "
                "known here; take a cache of another method, like kivi2"
            )

    def _attention(self, index: int) -> Any:
        found = self.found.attentions if self.found is not None else ()
        if index >= len(found) or found[index].k is None or found[index].v is None:
            raise UserError(
                f"{self.keeper.card.name} asks how layer {index} makes its keys and values, and this model does not "
                "show it; take a cache of another method, like kivi2"
            )
        return found[index]

    def _readers(self) -> list[nn.Module]:
        count = len(self.found.attentions) if self.found is not None else 0
        return [self.model.get_submodule(self._attention(i).k) for i in range(count)]  # type: ignore[union-attr]

    def _rotary(self) -> Rotary | None:
        try:
            return rotary_of(self.model) if self.model is not None else None
        except Unknown as unknown:
            raise UserError(
                f"{self.keeper.card.name} puts positions into keys, and this model has {unknown}; take a cache of "
                "another method, like kivi2"
            ) from unknown


class Held(Cache):
    """The cache of one text, or of several of equal length.

    Attributes:
        reads: layer -> inputs of the step that runs.
        read: tokens that were added so far, whether they are still held or not.
        visits, offered: of how many keys of packed windows queries looked at one, and how many there were.
    """

    def __init__(self, caching: Caching) -> None:
        layer = PackedLayer if isinstance(caching.keeper, Cacher) else SieveLayer
        super().__init__(layer_class_to_replicate=lambda: layer(self, len(self.layers)))  # type: ignore[arg-type]
        self.caching = caching
        self.reads: dict[int, Tensor] = {}
        self.read = self.visits = self.offered = 0
        self.surprise, self.origin = torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.long)
        self.last: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held of the text."""
        book = self.surprise.numel() * 4 + self.origin.numel() * 4  # a float and a position of 32 bits a token
        return sum(layer.nbytes for layer in self.layers) + (book if self.sieving else 0)  # type: ignore[union-attr]

    @property
    def sieving(self) -> bool:
        """Whether tokens are dropped, in place of packed."""
        return isinstance(self.caching.keeper, Policy)

    def make_room(self) -> None:
        """Drop the tokens that do not stay, where a window has been read."""
        if not self.sieving or not self.read or self.read % self.caching.window:
            return
        most = self.surprise.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
        windows = self.origin // self.caching.window
        view = Remembered(torch.where(self.surprise.isnan(), most, self.surprise), windows.max() - windows)
        assert isinstance(self.caching.keeper, Policy)
        stay = self.caching.keeper.decide(view)
        for layer in self.layers:
            layer.keep(stay)  # type: ignore[union-attr]
        self.surprise, self.origin = self.surprise.gather(1, stay), self.origin.gather(1, stay)

    def note(self, tokens: Tensor, logits: Tensor) -> None:
        """Keep the books on tokens `[texts, count]` that were added, and what the model says comes next."""
        count = tokens.shape[1]
        if self.sieving:
            before = logits[:, :1] * torch.nan if self.last is None else self.last
            told = torch.cat((before, logits[:, :-1]), 1).float().log_softmax(-1)
            surprise = -told.gather(-1, tokens[..., None]).squeeze(-1)
            origin = (self.read + torch.arange(count)).expand_as(tokens)
            if self.read == 0:
                self.surprise, self.origin = surprise, origin
            else:
                self.surprise = torch.cat((self.surprise, surprise), 1)
                self.origin = torch.cat((self.origin, origin), 1)
            self.last = logits[:, -1:].detach().clone()
        self.read += count

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens that were read, their number given as a negative one."""
        self.read = max(0, self.read + tokens_to_remove)
        if self.sieving:
            assert len(self.origin) <= 1, "only one text can be cut back"
            stay = (self.origin[0] < self.read).nonzero().T if len(self.origin) else self.origin
            self.surprise, self.origin, self.last = self.surprise[:, : stay.shape[1]], self.origin[:, stay[0]], None
            tokens_to_remove = stay.shape[1] - self.get_seq_length()
        super().crop(tokens_to_remove)


class PackedLayer(DynamicLayer):
    """One layer: whole windows as the method stores them, the newest tokens in 16 bits. No step crosses a window."""

    def __init__(self, cache: Held, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.cacher, self.window = cache.caching.keeper, cache.caching.window
        self.stored: list[Stored] = []
        self.gathered: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens `[batch, heads, tokens, size]`; all keys and values so far, as the new ones see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (t[..., :0, :].half() for t in (key_states, value_states))
        assert isinstance(self.cacher, Cacher)
        if self.keys.shape[-2] == self.window:
            given = self.cache.caching.given(self)
            self.stored.append(self.cacher.store(self.keys, self.values, **given))
            self.keys, self.values = self.keys[..., :0, :], self.values[..., :0, :]
            self.gathered = {}
        self._take_inputs(key_states)
        self.keys = torch.cat((self.keys, rounded(key_states)), -2)
        self.values = torch.cat((self.values, rounded(value_states)), -2)
        assert self.keys.shape[-2] <= self.window, "a step crosses the end of a window"
        parts = [*(stored.dense() for stored in self.stored), (self.keys, self.values)]
        keys, values = (torch.cat([t.to(self.dtype) for t in each], -2) for each in zip(*parts, strict=True))
        return keys, values

    def _take_inputs(self, keys: Tensor) -> None:
        inputs = self.cache.reads.pop(self.index, None)
        if inputs is None:
            return
        if self.get_seq_length() == 0:
            self.cache.caching.check(self.index, 0, inputs, keys)
        if "inputs" in self.cache.caching.needs:
            self._gather("inputs", rounded(inputs))

    def _gather(self, name: str, rows: Tensor) -> None:
        self.gathered[name] = torch.cat((self.gathered[name], rows), -2) if name in self.gathered else rows

    def look(self, queries: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of what queries `[texts, heads, tokens, size]` read, who are kept for the method."""
        shared, count = queries.shape[1] // self.keys.shape[1], queries.shape[-2]
        rows = queries.unflatten(1, (-1, shared)).transpose(2, 3).flatten(2, 3)  # token by token
        readers = [stored for stored in self.stored if hasattr(stored, "read")]
        taken = []
        for stored in readers:
            reading = stored.read(rows)  # type: ignore[attr-defined]
            taken.append(reading.taken)
            self.cache.visits += int(reading.visits.sum())
            self.cache.offered += reading.taken.numel()
        self._gather("queries", rounded(rows))
        if not readers:
            return mask
        own = self.keys.shape[-2]
        causal = torch.ones(count, own, dtype=torch.bool).tril(own - count)
        packed = torch.cat(taken, -1).unflatten(2, (count, shared)).transpose(2, 3).flatten(1, 2)
        ours = torch.cat((packed, causal.expand(*packed.shape[:-1], own)), -1)
        return ours if mask is None else ours & mask

    @property
    def nbytes(self) -> int:
        """Bytes of packed windows, and of the newest with what is gathered of it."""
        newest = [self.keys, self.values, *self.gathered.values()]
        return sum(s.nbytes for s in self.stored) + sum(t.numel() * t.element_size() for t in newest)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return len(self.stored) * self.window + (self.keys.shape[-2] if self.is_initialized else 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, their number given as a negative one; what is left of a packed window becomes floats
        again, as far as it still can.

        Raises:
            UserError: that ends within a packed window, and the method asks for more than its keys and values.
        """
        length = self.get_seq_length() + tokens_to_remove
        whole, rest = divmod(length, self.window)
        if whole < len(self.stored):
            if rest and self.cache.caching.needs & {"inputs", "queries"}:
                raise UserError(
                    f"a cache of {self.cacher.card.name} was asked to go back to token {length}, within a window of "
                    f"{self.window} that is packed; go back to a multiple of {self.window}, or drop all tokens"
                )
            self.keys, self.values = (rounded(t) for t in self.stored[whole].dense())
            del self.stored[whole:]
        else:
            rest = length - len(self.stored) * self.window  # a full window that is not yet packed stays
        before = max(1, self.keys.shape[-2])
        self.gathered = {name: x[..., : x.shape[-2] // before * rest, :] for name, x in self.gathered.items()}
        self.keys, self.values = self.keys[..., :rest, :], self.values[..., :rest, :]


class SieveLayer(DynamicLayer):
    """One layer of a cache that drops tokens: those that are held, in 16 bits, each at the position of its place."""

    def __init__(self, cache: Held, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens `[batch, heads, tokens, size]`; all keys and values that are held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.cache.caching.check(self.index, 0, self.cache.reads.pop(self.index), key_states)
            self.keys, self.values = (t[..., :0, :].half() for t in (key_states, value_states))
        self.keys = torch.cat((self.keys, rounded(key_states)), -2)
        self.values = torch.cat((self.values, rounded(value_states)), -2)
        return self.keys.to(self.dtype), self.values.to(self.dtype)

    def keep(self, stay: Tensor) -> None:
        """Drop all tokens but those at these places `[batch, tokens]`, which move up."""
        rotary = self.cache.caching.rotary
        if rotary is None:
            raise UserError(
                f"{self.cache.caching.keeper.card.name} moves keys to other positions, which rotary angles allow, and "
                "this model has a table of positions; take a cache of another method, like kivi2"
            )
        picked = stay[:, None, :, None]
        keys, values = (t.gather(2, picked.expand(-1, t.shape[1], -1, t.shape[3])) for t in (self.keys, self.values))
        moved = (torch.arange(stay.shape[1]) - stay).float()[:, None, :, None]
        angle = moved * torch.tensor(rotary.frequencies)
        self.keys, self.values = rounded(turned(keys.float(), angle.cos(), angle.sin())), values

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * (self.keys.numel() + self.values.numel())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels j and j + n of `[..., tokens, size]` turned by the angles `[..., tokens, n]`; the rest stays."""
    n = cos.shape[-1]
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def rounded(x: Tensor) -> Tensor:
    """In 16 bits; too large a number becomes the largest."""
    return x.clamp(-65504, 65504).half()


def _keep_inputs(reads: dict[int, Tensor], index: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    reads[index] = args[0].detach()


def _attend(
    cache: Held,
    before: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **options: Any,
) -> Any:
    layer = cache.layers[module.layer_idx]
    assert isinstance(layer, PackedLayer)
    return before(module, query, key, value, layer.look(query, mask), **options)
