"""Levels: how hard a site is pressed. A level prices itself exactly and has a text form that round-trips.

| level | text | what is stored for a weight of `out` rows and `in` columns |
|---|---|---|
| `Dense("bf16")` | `bf16` | every weight in that type |
| `Int(4, 64)` | `4b/g64` | 4-bit codes, a 16-bit scale and an 8-bit zero point a group of 64 columns |
| `Int(4, 64, symmetric=True)` | `4b/g64/sym` | no zero points |
| `Int(4, None)` | `4b/row` | one group a row |
| `Int(8, 32, True, "e8m0")` | `mxint8` | 8-bit two's complement, a power-of-two scale byte a block of 32 |
| `Float(2, 1, 16, "e4m3")` | `nvfp4` | FP4 codes, an FP8 scale a block of 16, one 32-bit scale a matrix |
| `Codebook(4, 256)` | `vq/d4/k256` | 8-bit indices of 4-vectors and the codebook in 16 bits |
| `Sparse(0.5)` | `50%` | a bit a weight and the kept weights in 16 bits |
| `NM(2, 4)` | `2:4` | 2 weights of every 4 in 16 bits, with their positions |
| `Rank(16)` | `r16` | two factors in 16 bits |
| `Plus(Int(4, 64), Rank(8))` | `4b/g64+r8` | both: the level of the weight, and a low-rank correction |
| `Width(0.75)` | `w75%` | three quarters of the coupled channels |
| `Depth(0)` | `drop` | nothing: the sublayer is skipped |
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from math import ceil, log2, prod

from trimtab.core.errors import UserError

Shape = tuple[int, ...]

DENSE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
SCALE_BYTES = {"f16": 2, "e8m0": 1, "e4m3": 1}


def rows_cols(shape: Shape) -> tuple[int, int]:
    """A weight as methods see it, a matrix: a convolution's kernel is flattened into columns.

    >>> rows_cols((64, 32, 3, 3))
    (64, 288)
    """
    return shape[0], prod(shape[1:])


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits, end to end."""
    return (count * bits + 7) // 8


def _percent(share: float) -> str:
    """A share in per cent, every digit of it, so that `_share` gives the same number back."""
    return f"{(Decimal(repr(share)) * 100).normalize():f}%"


def _share(percent: str) -> float:
    return float(Decimal(percent) / 100)


class Level(ABC):
    """How hard a site is pressed; every subclass is a frozen dataclass and final."""

    @abstractmethod
    def bytes(self, shape: Shape) -> int:
        """Exact bytes stored for a weight of this shape: codes, scales, indices and padding counted."""

    def flops(self, shape: Shape) -> int:
        """Floating-point operations (2 a multiply-add) for one input row, or one output position of a convolution."""
        return 2 * prod(shape)

    def bits_per_weight(self, shape: Shape) -> float:
        """Bits stored a weight of the original."""
        return 8 * self.bytes(shape) / prod(shape)


@dataclass(frozen=True)
class Dense(Level):
    """Every weight in a floating-point type: `fp32`, `bf16` or `fp16`."""

    dtype: str = "bf16"

    def bytes(self, shape: Shape) -> int:
        return prod(shape) * DENSE_BITS[self.dtype] // 8

    def __str__(self) -> str:
        return self.dtype


def _groups(cols: int, group: int | None) -> int:
    return 1 if group is None else ceil(cols / group)


@dataclass(frozen=True)
class Int(Level):
    """Integers with a scale (and a zero point, unless symmetric) for every `group` columns of a row; None: the row.

    The last group of a row may be short. `scale` is how the scales are stored: `f16`, `e8m0` (a power of two) or `e4m3`
    (FP8, with one more 32-bit scale for the matrix, as NVIDIA's formats have it). `hadamard` says that the columns were
    rotated block by block with a Hadamard matrix of the size of the group before rounding: the run time rotates the
    activations.
    """

    bits: int
    group: int | None = None
    symmetric: bool = False
    scale: str = "f16"
    hadamard: bool = False

    def bytes(self, shape: Shape) -> int:
        rows, cols = rows_cols(shape)
        per_group = SCALE_BYTES[self.scale] + (0 if self.symmetric else 1)
        tensor_scale = 4 if self.scale == "e4m3" else 0
        return packed_bytes(rows * cols, self.bits) + rows * _groups(cols, self.group) * per_group + tensor_scale

    def __str__(self) -> str:
        return _alias(self, f"{self.bits}b", self.symmetric)


@dataclass(frozen=True)
class Float(Level):
    """Minifloats: a sign, `e` exponent and `m` mantissa bits; a scale for every `group` columns (None: the row)."""

    e: int
    m: int
    group: int | None = None
    scale: str = "f16"
    hadamard: bool = False

    def bytes(self, shape: Shape) -> int:
        rows, cols = rows_cols(shape)
        tensor_scale = 4 if self.scale == "e4m3" else 0
        codes = packed_bytes(rows * cols, 1 + self.e + self.m)
        return codes + rows * _groups(cols, self.group) * SCALE_BYTES[self.scale] + tensor_scale

    def __str__(self) -> str:
        return _alias(self, f"e{self.e}m{self.m}", False)


@dataclass(frozen=True)
class Codebook(Level):
    """Vectors of `dim` neighbouring weights of a row, each an index into `size` codewords; `residual` codewords for
    what is left.

    The codewords are stored in 16 bits; `size` and `residual` are powers of two. A row's last vector is padded.
    """

    dim: int
    size: int
    residual: int = 0

    def bytes(self, shape: Shape) -> int:
        rows, cols = rows_cols(shape)
        vectors = rows * ceil(cols / self.dim)
        books = [k for k in (self.size, self.residual) if k]
        return sum(packed_bytes(vectors, int(log2(k))) + 2 * k * self.dim for k in books)

    def __str__(self) -> str:
        return f"vq/d{self.dim}/k{self.size}" + (f"/r{self.residual}" if self.residual else "")


@dataclass(frozen=True)
class Sparse(Level):
    """A share `ratio` of the weights is zero, anywhere; stored as a bit a weight and the kept weights in 16 bits."""

    ratio: float

    def kept(self, shape: Shape) -> int:
        """How many weights stay: the same number in each row."""
        rows, cols = rows_cols(shape)
        return rows * (cols - int(self.ratio * cols))

    def bytes(self, shape: Shape) -> int:
        return packed_bytes(prod(shape), 1) + 2 * self.kept(shape)

    def flops(self, shape: Shape) -> int:
        return 2 * self.kept(shape)

    def __str__(self) -> str:
        return _percent(self.ratio)


@dataclass(frozen=True)
class NM(Level):
    """`n` weights of every `m` neighbours in a row are kept, in 16 bits, with their positions in ceil(log2 m) bits
    each.
    """

    n: int
    m: int

    def kept(self, shape: Shape) -> int:
        """How many weights are stored: `n` for every group, a short last group counted whole."""
        rows, cols = rows_cols(shape)
        return rows * ceil(cols / self.m) * self.n

    def bytes(self, shape: Shape) -> int:
        kept = self.kept(shape)
        return 2 * kept + packed_bytes(kept, max(1, ceil(log2(self.m))))

    def flops(self, shape: Shape) -> int:
        return 2 * self.kept(shape)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Rank(Level):
    """Two factors, `out x rank` and `rank x in`, in 16 bits; `bias` adds a 16-bit vector of `out` that corrects the
    mean.
    """

    rank: int
    bias: bool = False

    def bytes(self, shape: Shape) -> int:
        rows, cols = rows_cols(shape)
        return 2 * self.rank * (rows + cols) + (2 * rows if self.bias else 0)

    def flops(self, shape: Shape) -> int:
        rows, cols = rows_cols(shape)
        return 2 * self.rank * (rows + cols)

    def __str__(self) -> str:
        return f"r{self.rank}" + ("/bias" if self.bias else "")


@dataclass(frozen=True)
class Plus(Level):
    """Two levels added up: a coarse one and a low-rank correction of its error."""

    base: Level
    extra: Rank

    def bytes(self, shape: Shape) -> int:
        return self.base.bytes(shape) + self.extra.bytes(shape)

    def flops(self, shape: Shape) -> int:
        return self.base.flops(shape) + self.extra.flops(shape)

    def __str__(self) -> str:
        return f"{self.base}+{self.extra}"


@dataclass(frozen=True)
class Width(Level):
    """A share `keep` of the channels of a coupled dimension stays; bytes are those of a dense 16-bit weight with
    fewer rows.
    """

    keep: float

    def bytes(self, shape: Shape) -> int:
        rows, cols = rows_cols(shape)
        return 2 * max(1, round(self.keep * rows)) * cols

    def flops(self, shape: Shape) -> int:
        rows, cols = rows_cols(shape)
        return 2 * max(1, round(self.keep * rows)) * cols

    def __str__(self) -> str:
        return f"w{_percent(self.keep)}"


@dataclass(frozen=True)
class Depth(Level):
    """`keep=0`: the block or sublayer is skipped and nothing of it is stored; `keep=1` leaves it."""

    keep: int = 0

    def bytes(self, shape: Shape) -> int:
        return 2 * prod(shape) if self.keep else 0

    def flops(self, shape: Shape) -> int:
        return 2 * prod(shape) if self.keep else 0

    def __str__(self) -> str:
        return "keep" if self.keep else "drop"


NAMED: dict[str, Level] = {
    "mxint8": Int(8, 32, True, "e8m0"),
    "mxint4": Int(4, 32, True, "e8m0"),
    "nvint4": Int(4, 16, True, "e4m3"),
    "mxfp8": Float(4, 3, 32, "e8m0"),
    "mxfp6": Float(2, 3, 32, "e8m0"),
    "mxfp4": Float(2, 1, 32, "e8m0"),
    "nvfp4": Float(2, 1, 16, "e4m3"),
    "keep": Depth(1),
    "drop": Depth(0),
} | {d: Dense(d) for d in DENSE_BITS}


def _alias(level: Int | Float, element: str, symmetric: bool) -> str:
    """The text of a grouped format; the named ones (`mxfp4`) go by their names."""
    plain = type(level)(**{**level.__dict__, "hadamard": False})
    name = next((n for n, known in NAMED.items() if known == plain), None)
    if name is None:
        name = element + ("/row" if level.group is None else f"/g{level.group}")
        name += ("/sym" if symmetric else "") + (f"/{level.scale}" if level.scale != "f16" else "")
    return name + ("/h" if level.hadamard else "")


_GROUPED = re.compile(
    r"(?:(?P<bits>\d+)b|e(?P<e>\d)m(?P<m>\d))/(?:row|g(?P<group>\d+))(?P<sym>/sym)?(?:/(?P<scale>e8m0|e4m3))?(?P<h>/h)?"
)
_CODEBOOK = re.compile(r"vq/d(\d+)/k(\d+)(?:/r(\d+))?")
LONGEST = 400  # characters of a level's text: the shortest share above zero takes this many digits
_KNOWN = (
    "4b/g64, 4b/g64/sym, 4b/row, e2m1/g32, mxfp4, mxfp8, mxint8, nvfp4, nvint4, vq/d4/k256, 50%, 2:4, r16, "
    "4b/g64+r8, w75%, drop, bf16"
)


@cache
def parse_level(text: str) -> Level:
    """The level that a text names; `parse_level(str(level)) == level` for every level.

    Raises:
        UserError: the text names no level, or one whose numbers make no sense.

    >>> parse_level("4b/g64")
    Int(bits=4, group=64, symmetric=False, scale='f16', hadamard=False)
    >>> str(parse_level("4b/g64+r8"))
    '4b/g64+r8'
    """
    text = text.strip().lower()
    found = _parse(text) if text.isascii() and len(text) <= LONGEST else None
    if found is None:
        shown = text if len(text) <= LONGEST else text[:LONGEST] + "..."
        raise UserError(f"unknown level {shown!r}; levels look like {_KNOWN}")
    return found


def _parse(text: str) -> Level | None:
    if text in NAMED:
        return NAMED[text]
    if text.endswith("/h") and text[:-2] in NAMED:
        plain = NAMED[text[:-2]]
        return type(plain)(**{**plain.__dict__, "hadamard": True}) if isinstance(plain, Int | Float) else None
    if match := re.fullmatch(r"(.+)\+(r\d+(?:/bias)?)", text):
        base, extra = _parse(match[1]), _parse(match[2])
        coarse = isinstance(base, Dense | Int | Float | Codebook | Sparse | NM)
        return Plus(base, extra) if base and coarse and isinstance(extra, Rank) else None
    if match := _GROUPED.fullmatch(text):
        group = int(match["group"]) if match["group"] else None
        scale, hadamard = match["scale"] or "f16", bool(match["h"])
        if group == 0 or (hadamard and (group is None or group & (group - 1))):
            return None
        if match["bits"]:
            bits = int(match["bits"])
            return Int(bits, group, bool(match["sym"]), scale, hadamard) if 1 <= bits <= 8 else None
        e, m = int(match["e"]), int(match["m"])
        return Float(e, m, group, scale, hadamard) if e >= 1 and 1 + e + m <= 8 and not match["sym"] else None
    if match := _CODEBOOK.fullmatch(text):
        dim, size, residual = int(match[1]), int(match[2]), int(match[3] or 0)
        powers = all(k >= 2 and not k & (k - 1) and k <= 65536 for k in (size, *([residual] if match[3] else [])))
        return Codebook(dim, size, residual) if dim >= 1 and powers else None
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text):
        ratio = _share(match[1])
        return Sparse(ratio) if 0 <= ratio < 1 else None
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        return NM(n, m) if 1 <= n < m <= 256 else None
    if match := re.fullmatch(r"r(\d+)(/bias)?", text):
        return Rank(int(match[1]), bool(match[2])) if int(match[1]) >= 1 else None
    if match := re.fullmatch(r"w(\d+(?:\.\d+)?)%", text):
        keep = _share(match[1])
        return Width(keep) if 0 < keep <= 1 else None
    return None
