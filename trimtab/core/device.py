"""What a machine can do, what a forward asks of it, and what that costs: the nouns of pricing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import log
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.level import Dense, Level

FORMAT = 1
CACHE_BYTES = 2  # of a stored key or value


@dataclass(frozen=True)
class Cost:
    """Seconds of a piece of work, and the most bytes that it holds.

    Fields:
        low, mid, high: seconds: on the best shapes, as fitted on an undisturbed machine, and on the worst shapes.
        bytes: weights, cache and activations.
    """

    low: float
    mid: float
    high: float
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.low + other.low, self.mid + other.mid, self.high + other.high, max(self.bytes, other.bytes))


@dataclass(frozen=True)
class Product:
    """A product with a weight `[rows, cols]` at a level; `last`: only of the last token of each sequence, as a head."""

    level: Level
    rows: int
    cols: int
    last: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of the weight, all of which a forward reads."""
        return self.level.bytes((self.rows, self.cols))


@dataclass(frozen=True)
class Heads:
    """An attention product: query heads, heads of keys and values, and the size of each."""

    heads: int
    kv_heads: int
    size: int


@dataclass(frozen=True)
class Work:
    """One forward of a model.

    Fields:
        products: with the weights, in order.
        attentions: one a layer.
        passes: floats a token that each step between the products reads and writes: norms, rotations, activations.
        batch: sequences.
        tokens: new tokens of each sequence: the prompt's length, or 1 where text is being written.
        context: tokens of each sequence that are in the cache already.
        room: tokens that the run loop's buffers have room for, where those are more: a chunk of a prompt.
        idle_bytes: weights that no forward reads as a whole, such as an embedding's.
        around: where the work is only a part of a model's forward: bytes that the rest of it reads. They push the
            part's weights out of the caches, and are not priced. None: the work is a whole forward.
    """

    products: tuple[Product, ...]
    attentions: tuple[Heads, ...] = ()
    passes: tuple[int, ...] = ()
    batch: int = 1
    tokens: int = 1
    context: int = 0
    room: int = 0
    idle_bytes: int = 0
    around: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a forward reads."""
        return sum(p.bytes for p in self.products)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values when the forward is done."""
        held = self.batch * (self.context + self.tokens) * 2 * CACHE_BYTES
        return sum(held * a.kv_heads * a.size for a in self.attentions)

    @property
    def held_bytes(self) -> int:
        """Most bytes held at once: weights, the cache with room to the next 64 tokens, and in fp32 the residual three
        times over, the widest layer's inputs twice and outputs once, and the logits of 16 tokens or of each sequence.
        """
        inner = [p for p in self.products if not p.last]
        width = inner[0].cols if inner else 0
        wide, deep = max((p.rows for p in inner), default=0), max((p.cols for p in inner), default=0)
        mixed = max((a.heads * a.size for a in self.attentions), default=0)
        states = 4 * max(self.room, self.batch * self.tokens) * (3 * width + mixed + wide + deep)
        logits = 4 * max(16, self.batch) * sum(p.rows + p.cols for p in self.products if p.last)
        whole = -(-(self.context + self.tokens) // 64) * 64
        cache = self.batch * whole * sum(2 * CACHE_BYTES * a.kv_heads * a.size for a in self.attentions)
        return self.weight_bytes + self.idle_bytes + cache + states + logits


@dataclass(frozen=True)
class Kernel:
    """How near one operation comes to what limits it, fitted to its measured seconds over several shapes:

        seconds = fixed + edge * (rows + cols) + max(bytes / bandwidth, operations / peak) / share + start * rows

    Fields:
        op: `linear`, `attention` or `pass`.
        level: text of the level, for a linear; else "".
        m: inputs: tokens of all sequences together.
        runs: the variant that runs it, or `torch`.
        fixed: seconds of a call. edge: seconds for each row and column: inputs prepared, outputs written.
        near, far: the share reached with the weight in the caches, and from memory.
        start: seconds for each row where the weight comes from memory: a run of addresses that the prefetcher has yet
            to see.
        low, high: measured to fitted seconds of the best and of the worst shape.
        noise: median to fastest seconds while it was measured: how much else the machine was doing.
    """

    op: str
    level: str
    m: int
    runs: str
    fixed: float
    edge: float
    near: float
    far: float
    start: float = 0.0
    low: float = 1.0
    high: float = 1.0
    noise: float = 1.0


@dataclass(frozen=True)
class Device:
    """A machine as its kernels find it, measured by `trimtab bench`.

    Fields:
        name, cores, memory_bytes: what the system says.
        threads: that everything was measured with.
        variant: of the compiled kernels, or `torch`.
        caches: bytes by name: `l1` and `l2` of a core, `l3` of all.
        bandwidth: (bytes of the set, bytes a second that all threads read of it), from the first cache to memory.
        spill: (bytes of the set, share of it that comes from memory when a kernel reads it again and again).
        limits: what else was measured: `copy` bytes a second; `int8`, `fp32`, `bf16` operations a second; `barrier`
            and `call` in seconds.
        kernels: how near each operation comes to these limits.
        date, versions: when and with what it was measured.
    """

    name: str
    cores: int
    memory_bytes: int
    threads: int
    variant: str
    caches: Mapping[str, int]
    bandwidth: tuple[tuple[int, float], ...]
    spill: tuple[tuple[int, float], ...]
    limits: Mapping[str, float]
    kernels: tuple[Kernel, ...] = ()
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def from_memory(self) -> float:
        """Bytes a second read from memory: of the largest set."""
        return self.bandwidth[-1][1]

    def reads(self, set_bytes: float) -> float:
        """Bytes a second that a set of this size is read with, again and again; in between, by the logarithm of its
        size.
        """
        points = self.bandwidth
        if set_bytes <= points[0][0]:
            return points[0][1]
        for (small, fast), (large, slow) in pairwise(points):
            if set_bytes <= large:
                t = log(set_bytes / small) / log(large / small)
                return 1 / ((1 - t) / fast + t / slow)
        return points[-1][1]

    def missing(self, set_bytes: float) -> float:
        """The share of a set of this size that comes from memory when kernels read it again and again."""
        points = self.spill
        if set_bytes <= points[0][0]:
            return points[0][1]
        for (small, less), (large, more) in pairwise(points):
            if set_bytes <= large:
                return less + (more - less) * (set_bytes - small) / (large - small)
        return points[-1][1]

    def peak(self, level: Level) -> float:
        """Operations a second in registers of the arithmetic that a level's kernel uses."""
        return self.limits["fp32" if isinstance(level, Dense) or "int8" not in self.limits else "int8"]

    def kernel(self, op: str, level: str = "") -> tuple[Kernel, ...]:
        """The rows of one operation at one level, by rising `m`; () where it was not measured."""
        return tuple(sorted((k for k in self.kernels if (k.op, k.level) == (op, level)), key=lambda k: k.m))

    def to_json(self) -> str:
        """The profile as text; `from_json` reads it back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Device:
        """The profile that `to_json` wrote.

        Raises:
            UserError: the text is damaged, or of another format.

        >>> speeds, spill = ((1 << 20, 2e11), (1 << 28, 4e10)), ((1 << 24, 0.0), (1 << 26, 1.0))
        >>> one = Device("a", 2, 8, 2, "torch", {"l3": 1 << 25}, speeds, spill, {"fp32": 1e11})
        >>> Device.from_json(one.to_json()) == one
        True
        """
        try:
            data: dict[str, Any] = json.loads(text)
            assert data.pop("format") == FORMAT
            kernels = tuple(Kernel(**k) for k in data.pop("kernels"))
            bandwidth, spill = (tuple((int(n), float(x)) for n, x in data.pop(k)) for k in ("bandwidth", "spill"))
            device = Device(**data, bandwidth=bandwidth, spill=spill, kernels=kernels)
            assert spill and bandwidth and all(rate > 0 for _, rate in bandwidth) and device.limits["fp32"] > 0
            assert device.caches["l3"] > 0 and all(k.m > 0 and k.near > 0 and k.far > 0 for k in kernels)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                "the device's profile is damaged or of another format; measure again with `trimtab bench`"
            ) from error
        return device
