"""Caches of keys and values: how they are stored, what that takes, and the form of what a method stores.

| text | what is stored of a token |
|---|---|
| `fp32`, `fp16`, `bf16` | keys and values in that type |
| `kivi2`, `kivi4` | codes of 2 or 4 bits, a step and a lowest value in fp16 a group of 32; the newest tokens in fp16 |
| `kivi2/g64` | the same with groups of 64 |
| `kivi2/g32/r256` | the same, packed 256 tokens at a time in place of 128 |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import DENSE_BITS
from trimtab.formats.bitstream import pack_bits, unpack_bits

BLOCK = 64  # tokens that the kernels take together: a cache has room for whole blocks
PADDING = 32  # channels of values are filled up to a multiple of this
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
    """

    dtype: str = "fp16"
    method: str = ""
    bits: int = 0
    group: int = 0
    window: int = 0

    @staticmethod
    def parse(text: str) -> CacheFormat:
        """The format that a text names; `CacheFormat.parse(str(format)) == format`.

        Raises:
            UserError: there is none of that name.

        >>> str(CacheFormat.parse("kivi2")), CacheFormat.parse("kivi4/g64").group
        ('kivi2/g32', 64)
        """
        if text in DENSE_BITS:
            return CacheFormat(text)
        match = _PACKED.fullmatch(text)
        window = int(match["window"] or 128) if match else 0
        if match is None or window % BLOCK or not window:
            raise UserError(
                f"unknown cache {text[:40]!r}; a cache is fp16, bf16, fp32, kivi4 or kivi2, or like kivi2/g64/r256 "
                f"with groups of 32 or 64 and a window of a multiple of {BLOCK} tokens"
            )
        return CacheFormat("fp16", match["method"], int(match["bits"]), int(match["group"] or 32), window)

    def __str__(self) -> str:
        if not self.method:
            return self.dtype
        return f"{self.method}{self.bits}/g{self.group}" + (f"/r{self.window}" if self.window != 128 else "")

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


@dataclass(frozen=True)
class Stored:
    """Keys and values of some tokens, as a method stores them."""

    keys: Coded
    values: Coded

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., tokens, channels]`, fp32."""
        return self.keys.dense(), self.values.dense()
