"""Caches of keys and values: how they are stored, what that takes, and the form of what a method stores.

| text | what is stored of a token |
|---|---|
| `fp32`, `fp16`, `bf16` | keys and values in that type |
| `kivi2`, `kivi4` | codes of 2 or 4 bits, a step and a lowest value in fp16 a group of 32; the newest tokens in fp16 |
| `kivi2/g64` | the same with groups of 64 |
| `kivi2/g32/r256` | the same, packed 256 tokens at a time in place of 128 |
| `think(prune=0.4)` | what that method of caches keeps, with its fields as in a plan; on torch |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from inspect import signature
from math import ceil
from typing import Protocol

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import DENSE_BITS
from trimtab.core.method import Cacher, Method, Remembered, discover, method
from trimtab.core.plan import parse_method
from trimtab.formats.bitstream import pack_bits, unpack_bits

BLOCK = 64  # tokens that the kernels take together: a cache has room for whole blocks
PADDING = 32  # channels of values are filled up to a multiple of this
TRIED = (4, 512)  # tokens and channels on which a method of caches is tried, before there is a model
_PACKED = re.compile(r"(?P<method>kivi)(?P<bits>[24])(?:/g(?P<group>32|64))?(?:/r(?P<window>\d{1,6}))?")


@dataclass(frozen=True)
class CacheFormat:
    """How a cache stores keys and values.

    Fields:
        dtype: type of what is not packed.
        method: the method that packs older tokens; empty where nothing is packed.
        bits, group: of its codes, and how many of them share a grid.
        window: tokens that are packed together, once all of them are there and another one comes. What a token sees
            therefore depends on its position alone, however a text was cut into steps: the windows before its own
            packed, its own as floats.
        keeper: the method with its fields, where the text names one that only torch carries out.
    """

    dtype: str = "fp16"
    method: str = ""
    bits: int = 0
    group: int = 0
    window: int = 0
    keeper: Method | None = None

    @staticmethod
    def parse(text: str) -> CacheFormat:
        """The format that a text names; `CacheFormat.parse(str(format)) == format`.

        Raises:
            UserError: there is none of that name, or its method, tried on a few tokens, refuses its fields.

        >>> str(CacheFormat.parse("kivi2")), CacheFormat.parse("kivi4/g64").group
        ('kivi2/g32', 64)
        >>> str(CacheFormat.parse("think(prune=0.25)"))
        'think(prune=0.25)'
        """
        if text in DENSE_BITS:
            return CacheFormat(text)
        if re.fullmatch(r"[a-z-]+|[a-z-]+\(.*\)", text, re.DOTALL) and text.partition("(")[0] in _keepers():
            keeper = parse_method(text)
            window = keeper.residual  # type: ignore[attr-defined]
            if not isinstance(window, int) or window < 1:
                raise UserError(f"the cache {text} has windows of {window} tokens; a window has a whole number of them")
            try:
                _try(keeper)
            except UserError as error:
                raise UserError(f"the cache {text} does not work, as {TRIED[0]} tokens showed: {error}") from error
            return CacheFormat("fp16", keeper.card.name, window=window, keeper=keeper)
        match = _PACKED.fullmatch(text)
        window = int(match["window"] or 128) if match else 0
        if match is None or window % BLOCK or not window:
            raise UserError(
                f"unknown cache {text[:40]!r}; a cache is fp16, bf16, fp32, kivi4 or kivi2, or like kivi2/g64/r256 "
                f"with groups of 32 or 64 and a window of a multiple of {BLOCK} tokens, or a method with fields, like "
                f"think(prune=0.4): {', '.join(_keepers())}"
            )
        return CacheFormat("fp16", match["method"], int(match["bits"]), int(match["group"] or 32), window)

    def __str__(self) -> str:
        if self.keeper is not None:
            fields = ", ".join(f"{name}={value!r}" for name, value in self.keeper.config().items())
            return f"{self.method}({fields})" if fields else self.method
        if not self.method:
            return self.dtype
        return f"{self.method}{self.bits}/g{self.group}" + (f"/r{self.window}" if self.window != 128 else "")

    @property
    def compiled(self) -> bool:
        """Whether the compiled kernels hold such a cache."""
        return self.keeper is None

    def worker(self) -> Method | None:
        """The method with its fields; None where nothing is packed."""
        if self.keeper is not None or not self.method:
            return self.keeper
        return method(self.method, bits=self.bits, group=self.group, residual=self.window)

    def bytes(self, heads: int, size: int, context: int, sequences: int = 1) -> int:
        """Exact bytes of the cache of one layer, as the compiled kernels hold it.

        Tokens are counted in whole blocks; channels of values, and packed ones of keys, are padded to 32. Of a packed
        cache the newest window has room as floats.

        >>> fp16, kivi2 = (CacheFormat.parse(text).bytes(8, 64, 16384) for text in ("fp16", "kivi2"))
        >>> fp16, kivi2, round(fp16 / kivi2, 2)
        (33554432, 6504448, 5.16)
        """
        width, padded = DENSE_BITS[self.dtype] // 8, ceil(size / PADDING) * PADDING
        floats = context if not self.window else min(context, self.window)
        total = ceil(floats / BLOCK) * BLOCK * (size + padded) * width
        if self.window:
            blocks = max(0, context - 1) // self.window * self.window // BLOCK
            total += blocks * self._block(size, padded)
        return sequences * heads * total

    def _block(self, size: int, padded: int) -> int:
        """Bytes of a packed block of one head: grids of keys, in whole cache lines, grids of values, codes of both."""
        grids = ceil(BLOCK // self.group * size * 4 / 64) * 64 + ceil(size / self.group) * BLOCK * 4
        return grids + 2 * padded * BLOCK * self.bits // 8

    def cuts(self, start: int, count: int, most: int) -> Iterator[tuple[int, int]]:
        """Tokens `start .. start + count` in steps of at most so many, none of which crosses the end of a window:
        (first, last) of each, counted from `start`.

        >>> list(CacheFormat.parse("kivi2").cuts(100, 200, 96))
        [(0, 28), (28, 124), (124, 156), (156, 200)]
        """
        done = 0
        while done < count:
            step = min(most, count - done)
            if self.window:
                step = min(step, self.window - (start + done) % self.window)
            yield done, done + step
            done += step


@dataclass(frozen=True)
class Coded:
    """A tensor `[..., rows, cols]` of which `group` neighbours in a row share a grid: x = low + step * code.

    Fields:
        bits: of a code, which lie end to end in `codes`.
        step, low: `[..., rows, groups]`, fp16; the last group of a row may be short.
        transposed: the original is `[..., cols, rows]`.
    """

    bits: int
    group: int
    shape: tuple[int, ...]
    codes: Tensor
    step: Tensor
    low: Tensor
    transposed: bool = False

    @staticmethod
    def of(codes: Tensor, bits: int, group: int, step: Tensor, low: Tensor, transposed: bool = False) -> Coded:
        """From codes `[..., rows, cols]` that are not yet packed."""
        packed = pack_bits(codes, bits)
        return Coded(bits, group, tuple(codes.shape), packed, step.half(), low.half(), transposed)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and grids."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.step, self.low))

    def dense(self) -> Tensor:
        """The original's stand-in, fp32."""
        count = torch.Size(self.shape).numel()
        codes = unpack_bits(self.codes, self.bits, count).reshape(self.shape).float()
        place = torch.arange(self.shape[-1]) // self.group
        x = self.low.float()[..., place] + self.step.float()[..., place] * codes
        return x.transpose(-1, -2) if self.transposed else x


class Part(Protocol):
    """Keys or values of a window in some stored form."""

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""

    def dense(self) -> Tensor:
        """The original's stand-in, fp32."""


@dataclass(frozen=True)
class Plain:
    """A tensor in 16 bits."""

    half: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return 2 * self.half.numel()

    def dense(self) -> Tensor:
        """The original's stand-in, fp32."""
        return self.half.float()


class Stored(Protocol):
    """What a method keeps of a window. One that has `read`, too, says which tokens a query reads:
    `read(queries [..., rows, channels]) -> Reading`.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., tokens, channels]`, fp32."""


@dataclass(frozen=True)
class Pair:
    """Keys and values of some tokens, each stored on its own."""

    keys: Part
    values: Part

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., tokens, channels]`, fp32."""
        return self.keys.dense(), self.values.dense()


@dataclass(frozen=True)
class Reading:
    """Tokens that queries read.

    Fields:
        taken: bool `[..., rows, tokens]`.
        visits: of how many tokens a key was looked at, `[..., rows]`; all that are taken are among them.
    """

    taken: Tensor
    visits: Tensor


@dataclass(frozen=True)
class Projection:
    """How a layer makes keys and values of what it reads: k = W_k x + b_k before positions are in it, v = W_v x + b_v.

    Fields:
        layer: which, from 0 on.
        key, value: W_k and W_v `[channels of all heads, width]`, fp32.
        key_bias, value_bias: b_k and b_v; zeros where there are none.
        heads: of keys, and of values.
    """

    layer: int
    key: Tensor
    value: Tensor
    key_bias: Tensor
    value_bias: Tensor
    heads: int


Place = Callable[[Tensor], Tensor]
"""From keys `[..., tokens, channels of all heads]` before positions to those of a cache, `[..., heads, tokens, n]`."""


@dataclass(frozen=True)
class Remade:
    """Keys and values that are made anew from what is stored of a layer's inputs.

    Fields:
        parts: what is stored, each `[..., tokens, channels]`.
        key, value: which of the parts keys and values are made of.
        key_map, value_map: matrices `[channels of all heads, channels of the part]`.
        projection: whose biases and heads these are.
        place: puts the window's positions into keys.
    """

    parts: tuple[Part, ...]
    key: int
    value: int
    key_map: Tensor
    value_map: Tensor
    projection: Projection
    place: Place

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored; the matrices are the layer's, not the window's."""
        return sum(part.nbytes for part in self.parts)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., tokens, channels]`, fp32."""
        read = [part.dense() for part in self.parts]
        keys = read[self.key] @ self.key_map.T + self.projection.key_bias
        values = read[self.value] @ self.value_map.T + self.projection.value_bias
        return self.place(keys), values.unflatten(-1, (self.projection.heads, -1)).transpose(-2, -3)


@cache
def _try(keeper: Method) -> None:
    """Let a method keep a few tokens: what it refuses of its fields, it refuses then."""
    if negative := [f"{k}={v}" for k, v in keeper.config().items() if isinstance(v, int) and v < 0]:
        raise UserError(f"{keeper.card.name} was given {', '.join(negative)}; its whole numbers are not negative")
    tokens, width = TRIED
    if not isinstance(keeper, Cacher):
        keeper.decide(Remembered(torch.zeros(1, tokens), torch.zeros(1, tokens)))  # type: ignore[attr-defined]
        return
    x, one = torch.zeros(tokens, width), torch.eye(width)
    gram = {"gram": one} if "gram" in signature(keeper.prepare).parameters else {}
    heads, stored, needs = x[None, None], None, keeper.needs()
    for layer in (0, 1000) if "below" in needs else (0,):
        projection = Projection(layer, one, one, torch.zeros(width), torch.zeros(width), heads=1)
        given = {
            **{"queries": heads, "inputs": x, "first": 0, "below": stored, "place": lambda keys: keys[None]},
            "prepared": keeper.prepare(projection, **gram) if "prepared" in needs else None,
        }
        stored = keeper.store(heads, heads, **{name: given[name] for name in needs})


def _keepers() -> list[str]:
    return sorted(name for name, cls in discover().items() if cls.family() == "kv")
