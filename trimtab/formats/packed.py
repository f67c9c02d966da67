"""Packed weights: what a solver returns and an artifact stores; `dense()` gives the weight that it stands for.

For every level `packed.nbytes == level.bytes(shape)`, exactly. Codes lie end to end over the whole matrix, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, log2, prod

import numpy as np
import torch
from torch import Tensor

from trimtab.core.level import (
    NM,
    Codebook,
    Dense,
    Float,
    Int,
    Level,
    Plus,
    Rank,
    Shape,
    Sparse,
    packed_bytes,
    rows_cols,
)
from trimtab.formats.bitstream import pack_bits, unpack_bits
from trimtab.formats.minifloat import encode_magnitude, magnitudes

_TILE = 1 << 17  # weights that are decoded together: what decoding holds besides is small, and in the cache
_LAST_SCALE = {"e8m0": 254, "e4m3": 126}  # the largest code of a scale; what follows is NaN
_FP8 = {(e, m): len(magnitudes(e, m)) for e, m in ((4, 3), (5, 2))}  # formats in which not every code has a value
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Packed:
    """A weight at a level, as it is stored.

    Fields:
        level: the level; it says how the tensors are to be read.
        shape: shape of the original weight, `(out, in, ...)`.
        tensors: the stored tensors by name.
    """

    level: Level
    shape: Shape
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def dense(self) -> Tensor:
        """The weight in fp32, in the original's shape."""
        return next(self.parts(prod(self.shape)))[1].reshape(self.shape)

    def parts(self, most: int) -> Iterator[tuple[int, Tensor]]:
        """The weight in fp32 as runs of rows of about so many weights, each with the number of its first row; all at
        once at a level that does not store one row after the other.
        """
        rows, cols = rows_cols(self.shape)
        tile, step = (max(8, count // cols // 8 * 8) for count in (_TILE, most))  # rows whose codes end on a byte
        if not isinstance(self.level, Int | Float) or rows <= tile:
            yield 0, _DECODE[type(self.level)](self).reshape(rows, cols)
            return
        step = rows if most >= rows * cols else step
        for first in range(0, rows, step):
            run = torch.empty(min(step, rows - first), cols)
            for at in range(0, len(run), tile):
                part = _rows(self, first + at, first + min(at + tile, len(run)))
                run[at : at + tile] = _DECODE[type(self.level)](part)
            yield first, run

    def take(self, rows: Tensor) -> Tensor:
        """The rows of these numbers, fp32 `[len(rows), in]`; nothing else is unpacked where a row fills whole bytes.

        >>> scale = torch.ones(4, 1, dtype=torch.float16)
        >>> packed = pack_int(torch.arange(8).reshape(4, 2), {"scale": scale}, None, Int(4, 2, symmetric=True), (4, 2))
        >>> packed.take(torch.tensor([3, 0, 3])).tolist()
        [[-2.0, -1.0], [-8.0, -7.0], [-2.0, -1.0]]
        """
        count, cols = rows_cols(self.shape)
        bits = _bits(self.level) * cols if isinstance(self.level, Int | Float) else 1
        if bits % 8:
            return self.dense().reshape(count, cols)[rows]
        codes = self.tensors["codes"].reshape(count, bits // 8)[rows].reshape(-1)
        other = {name: self.tensors[name][rows] for name in ("scale", "zero") if name in self.tensors}
        part = Packed(self.level, (len(rows), cols), {**self.tensors, "codes": codes, **other})
        return _DECODE[type(self.level)](part)

    def flaw(self) -> str | None:
        """What no packing stores, as damage to a file leaves it, in a phrase; None where all can be read."""
        level = self.level.base if isinstance(self.level, Plus) else self.level
        for name, (dtype, shape) in layout(self.level, self.shape).items():
            tensor = self.tensors[name]
            if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
                return f"{tensor.dtype} {list(tensor.shape)} as `{name}`, where {level} takes {dtype} {list(shape)}"
            if dtype.is_floating_point and not _is_finite(tensor):
                return f"NaN or infinite values in `{name}`"
        match level:
            case Int() | Float() if (
                level.scale in _LAST_SCALE and self.tensors["scale"].max() > _LAST_SCALE[level.scale]
            ):
                return f"codes of NaN in `scale` ({level.scale})"
            case Int() | Float() if level.scale == "e4m3" and not _is_sane(float(self.tensors["matrix_scale"])):
                return f"a `matrix_scale` of {float(self.tensors['matrix_scale']):g}"
            case Float() if int((self.tensors["codes"] & 127).max()) >= _FP8.get((level.e, level.m), 128):
                return f"codes of NaN or infinity in `codes` (e{level.e}m{level.m})"
            case NM():
                places = _places(self, level)
                if int(places.max()) >= level.m:
                    return f"places beyond {level.m} in `places`"
                if bool((places.diff(dim=1) <= 0).any()):
                    return "places that are not in order in `places`"
            case Sparse():
                kept, asked = int(unpack_bits(self.tensors["mask"], 1, prod(self.shape)).sum()), level.kept(self.shape)
                return f"a `mask` of {kept} weights, where {level} keeps {asked}" if kept != asked else None
        return None

    def bias(self) -> Tensor | None:
        """The vector that corrects the mean of the output, where the level stores one."""
        stored = self.tensors.get("bias")
        return None if stored is None else stored.float()


def _is_sane(matrix_scale: float) -> bool:
    """Whether a matrix's scale is positive, no subnormal, and leads with a scale of 448 to no weight beyond fp32."""
    return torch.finfo(torch.float32).tiny <= matrix_scale <= 1e34


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; numpy, where it has the type, takes a quarter of torch's time."""
    known = tensor.dtype in (torch.float16, torch.float32)
    return bool(np.isfinite(tensor.numpy()).all() if known else tensor.isfinite().all())


# ---- scales: the values that storage can hold, so that a solver rounds against what will be read back


def store_scale(scale: Tensor, kind: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Round positive scales to what `kind` can hold: the scales as they will be read back (fp32), and what is stored.

    `e8m0` takes the power of two at or above (so that nothing of the block is clipped); `e4m3` divides by a matrix
    scale first, max / 448, as NVFP4 does.
    """
    tiny = torch.finfo(torch.float32).tiny
    if kind == "f16":
        stored = scale.clamp(2.0**-24, 65504.0).to(torch.float16)
        return stored.float(), {"scale": stored}
    if kind == "e8m0":
        exponent = torch.ceil(torch.log2(scale.clamp_min(tiny)) - 1e-6).clamp(-127, 127)
        return torch.exp2(exponent), {"scale": (exponent + 127).to(torch.uint8)}
    if kind == "e4m3":
        matrix = (scale.max() / 448).clamp_min(tiny).reshape(1).float()
        code = encode_magnitude(scale / matrix, 4, 3).clamp_min(1).to(torch.uint8)
        return magnitudes(4, 3)[code.long()] * matrix, {"scale": code, "matrix_scale": matrix}
    raise AssertionError(kind)


def load_scale(tensors: Mapping[str, Tensor], kind: str) -> Tensor:
    """The scales that `store_scale` stored, fp32."""
    stored = tensors["scale"]
    if kind == "f16":
        return stored.float()
    if kind == "e8m0":
        return torch.exp2(stored.float() - 127)
    return magnitudes(4, 3)[stored.long()] * tensors["matrix_scale"]


def spread(per_group: Tensor, group: int | None, cols: int) -> Tensor:
    """Values for each group `[out, groups]`, repeated over the columns `[out, cols]`."""
    if group is None:
        return per_group.expand(-1, cols)
    return per_group.repeat_interleave(group, dim=1)[:, :cols]


# ---- from codes to stored tensors


def pack_int(codes: Tensor, scale: Mapping[str, Tensor], zero: Tensor | None, level: Int, shape: Shape) -> Packed:
    """Integers: `codes [out, in]` in 0..2**bits-1 (symmetric levels store code + 2**(bits-1)), what `store_scale`
    stored, zero points `[out, groups]`.
    """
    tensors = {"codes": pack_bits(codes, level.bits), **scale}
    if zero is not None:
        tensors["zero"] = zero.to(torch.uint8)
    return Packed(level, shape, tensors)


def pack_float(codes: Tensor, scale: Mapping[str, Tensor], level: Float, shape: Shape) -> Packed:
    """Minifloats: `codes [out, in]` with the sign in the highest bit, and what `store_scale` stored."""
    return Packed(level, shape, {"codes": pack_bits(codes, 1 + level.e + level.m), **scale})


def pack_codebook(indices: list[Tensor], books: list[Tensor], level: Codebook, shape: Shape) -> Packed:
    """Vectors: for the codebook and, if any, the residual codebook, indices `[out, ceil(in / dim)]` and codewords
    `[size, dim]`.
    """
    tensors = {}
    for name, index, book, size in zip(("", "residual_"), indices, books, (level.size, level.residual), strict=False):
        tensors[f"{name}codes"] = pack_bits(index, int(log2(size)))
        tensors[f"{name}book"] = book.to(torch.float16)
    return Packed(level, shape, tensors)


def pack_sparse(weight: Tensor, mask: Tensor, level: Sparse, shape: Shape) -> Packed:
    """Unstructured: `mask [out, in]` true where a weight stays, the same number in each row."""
    kept = weight[mask].to(torch.float16)
    assert kept.numel() == level.kept(shape), "the mask keeps another number of weights than the level says"
    return Packed(level, shape, {"mask": pack_bits(mask.to(torch.uint8), 1), "values": kept})


def pack_nm(weight: Tensor, mask: Tensor, level: NM, shape: Shape) -> Packed:
    """N:M: `mask [out, in]` true for at most `n` of every `m` neighbours of a row; a short last group is padded with
    zeros.
    """
    rows, cols = rows_cols(shape)
    groups = ceil(cols / level.m)
    pad = groups * level.m - cols
    m = torch.nn.functional.pad(mask, (0, pad)).reshape(rows * groups, level.m)
    w = torch.nn.functional.pad(weight * mask, (0, pad)).reshape(rows * groups, level.m)
    place = m.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : level.n].sort(dim=1).values
    width = max(1, ceil(log2(level.m)))
    return Packed(
        level, shape, {"places": pack_bits(place, width), "values": w.gather(1, place).to(torch.float16).reshape(-1)}
    )


def pack_rank(left: Tensor, right: Tensor, bias: Tensor | None, level: Rank, shape: Shape) -> Packed:
    """Two factors `left [out, rank] @ right [rank, in]`, and the mean-correcting bias `[out]` where the level has
    one.
    """
    tensors = {"left": left.to(torch.float16).contiguous(), "right": right.to(torch.float16).contiguous()}
    if level.bias:
        assert bias is not None
        tensors["bias"] = bias.to(torch.float16)
    return Packed(level, shape, tensors)


def pack_plus(base: Packed, extra: Packed, level: Plus) -> Packed:
    """A packed weight and the packed low-rank correction of its error."""
    return Packed(
        level, base.shape, {**base.tensors, **{f"extra_{k}" if k != "bias" else k: v for k, v in extra.tensors.items()}}
    )


def summands(packed: Packed) -> tuple[Packed, Packed]:
    """The two that `pack_plus` added up: the weight, and the low-rank correction without its bias."""
    level: Plus = packed.level  # type: ignore[assignment]
    names = tensor_names(level.base)
    base = {name: packed.tensors[name] for name in names}
    extra = {name: packed.tensors[f"extra_{name}"] for name in ("left", "right")}
    return Packed(level.base, packed.shape, base), Packed(Rank(level.extra.rank), packed.shape, extra)


def pack_dense(weight: Tensor, level: Dense) -> Packed:
    """The weight itself in the level's type."""
    return Packed(level, tuple(weight.shape), {"weight": weight.to(DTYPES[level.dtype])})


def row_separable(level: Level) -> bool:
    """Whether the rows of a weight are stored one after the other, none depending on another."""
    return isinstance(level, Int | Float) and level.scale != "e4m3"


def join_rows(parts: Iterable[Packed], shape: Shape) -> Packed | None:
    """Packed runs of rows, end to end; None where their levels differ. Of several, the level is row-separable, and all
    but the last fill bytes.

    Each run is put in its place before the next is made: small tensors that stay behind between large ones that go
    would leave a heap full of holes.
    """
    whole: Packed | None = None
    filled: dict[str, int] = {}
    for part in parts:
        if part.shape == shape:
            return part
        if whole is None:
            tensors = {name: torch.empty(s, dtype=dtype) for name, (dtype, s) in layout(part.level, shape).items()}
            whole, filled = Packed(part.level, shape, tensors), dict.fromkeys(tensors, 0)
        if part.level != whole.level:
            return None
        for name, tensor in part.tensors.items():
            whole.tensors[name][filled[name] : filled[name] + len(tensor)] = tensor
            filled[name] += len(tensor)
    assert whole is not None and row_separable(whole.level)
    return whole


# ---- from stored tensors to the weight


def _rows(p: Packed, first: int, last: int) -> Packed:
    """Rows `first .. last` of integers or minifloats, where `first` is a multiple of 8."""
    level, (_, cols) = p.level, rows_cols(p.shape)
    assert isinstance(level, Int | Float)
    bits = _bits(level)
    codes = p.tensors["codes"][first * cols * bits // 8 : packed_bytes(last * cols, bits)]
    rows = {name: p.tensors[name][first:last] for name in ("scale", "zero") if name in p.tensors}
    return Packed(level, (last - first, cols), {**p.tensors, "codes": codes, **rows})


def _bits(level: Int | Float) -> int:
    return level.bits if isinstance(level, Int) else 1 + level.e + level.m


def hadamard_blocks(weight: Tensor, block: int) -> Tensor:
    """Multiply every `block` columns by the orthonormal Hadamard matrix of that size: its own inverse, for it is
    symmetric.

    A short last group is left as it is.
    """
    cols = weight.shape[1] // block * block
    if not cols:
        return weight
    x = weight[:, :cols].reshape(weight.shape[0], -1, block)
    h = 1
    while h < block:
        a, b = x.reshape(*x.shape[:2], -1, 2, h).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        h *= 2
    return torch.cat((x.reshape(weight.shape[0], cols) / block**0.5, weight[:, cols:]), dim=1)


def _dense(p: Packed) -> Tensor:
    return p.tensors["weight"].float()


def _unrotate(weight: Tensor, level: Int | Float) -> Tensor:
    return hadamard_blocks(weight, level.group) if level.hadamard and level.group else weight


def _int(p: Packed) -> Tensor:
    level: Int = p.level  # type: ignore[assignment]
    rows, cols = rows_cols(p.shape)
    codes = unpack_bits(p.tensors["codes"], level.bits, rows * cols).reshape(rows, cols).float()
    zero = float(1 << (level.bits - 1)) if level.symmetric else spread(p.tensors["zero"].float(), level.group, cols)
    return _unrotate((codes - zero) * spread(load_scale(p.tensors, level.scale), level.group, cols), level)


def _float(p: Packed) -> Tensor:
    level: Float = p.level  # type: ignore[assignment]
    rows, cols = rows_cols(p.shape)
    width = level.e + level.m
    codes = unpack_bits(p.tensors["codes"], 1 + width, rows * cols).reshape(rows, cols)
    grid = magnitudes(level.e, level.m)
    value = grid[(codes & ((1 << width) - 1)).long()] * torch.where(codes >> width == 1, -1.0, 1.0)
    return _unrotate(value * spread(load_scale(p.tensors, level.scale), level.group, cols), level)


def _codebook(p: Packed) -> Tensor:
    level: Codebook = p.level  # type: ignore[assignment]
    rows, cols = rows_cols(p.shape)
    vectors = ceil(cols / level.dim)
    total = torch.zeros(rows, vectors * level.dim)
    for name, size in (("", level.size), ("residual_", level.residual)):
        if size:
            index = unpack_bits(p.tensors[f"{name}codes"], int(log2(size)), rows * vectors)
            total += p.tensors[f"{name}book"].float()[index.long()].reshape(rows, -1)
    return total[:, :cols]


def _sparse(p: Packed) -> Tensor:
    mask = unpack_bits(p.tensors["mask"], 1, prod(p.shape)).bool()
    return torch.zeros(prod(p.shape)).masked_scatter_(mask, p.tensors["values"].float())


def _places(p: Packed, level: NM) -> Tensor:
    """Where in its group each kept weight stands, `[groups, n]`."""
    width = max(1, ceil(log2(level.m)))
    return unpack_bits(p.tensors["places"], width, level.kept(p.shape)).reshape(-1, level.n).long()


def _nm(p: Packed) -> Tensor:
    level: NM = p.level  # type: ignore[assignment]
    rows, cols = rows_cols(p.shape)
    groups = ceil(cols / level.m)
    place = _places(p, level)
    flat = torch.zeros(rows * groups, level.m).scatter_(1, place, p.tensors["values"].float().reshape(-1, level.n))
    return flat.reshape(rows, -1)[:, :cols]


def _rank(p: Packed) -> Tensor:
    return p.tensors["left"].float() @ p.tensors["right"].float()


def _plus(p: Packed) -> Tensor:
    base, extra = summands(p)
    return extra.dense().add_(base.dense()).reshape(rows_cols(p.shape))


_DECODE: dict[type[Level], Callable[[Packed], Tensor]] = {
    **{Dense: _dense, Int: _int, Float: _float, Codebook: _codebook, Sparse: _sparse, NM: _nm, Rank: _rank, Plus: _plus}
}


def tensor_names(level: Level) -> tuple[str, ...]:
    """Names of the tensors that a packed weight of this level stores."""
    return tuple(layout(level, (1, 1)))


def layout(level: Level, shape: Shape) -> dict[str, tuple[torch.dtype, Shape]]:
    """Type and shape of each tensor that a packed weight of this level and shape stores."""
    rows, cols = rows_cols(shape)
    half, byte = torch.float16, torch.uint8
    match level:
        case Dense():
            return {"weight": (DTYPES[level.dtype], shape)}
        case Int() | Float():
            bits = level.bits if isinstance(level, Int) else 1 + level.e + level.m
            groups = (rows, 1 if level.group is None else ceil(cols / level.group))
            found = {
                "codes": (byte, (packed_bytes(rows * cols, bits),)),
                "scale": (half if level.scale == "f16" else byte, groups),
            }
            if level.scale == "e4m3":
                found["matrix_scale"] = (torch.float32, (1,))
            if isinstance(level, Int) and not level.symmetric:
                found["zero"] = (byte, groups)
            return found
        case Codebook():
            found = {}
            for name, size in (("", level.size), ("residual_", level.residual)):
                if size:
                    vectors = rows * ceil(cols / level.dim)
                    found[f"{name}codes"] = (byte, (packed_bytes(vectors, int(log2(size))),))
                    found[f"{name}book"] = (half, (size, level.dim))
            return found
        case Sparse():
            return {"mask": (byte, (packed_bytes(rows * cols, 1),)), "values": (half, (level.kept(shape),))}
        case NM():
            kept = level.kept(shape)
            places = packed_bytes(kept, max(1, ceil(log2(level.m))))
            return {"places": (byte, (places,)), "values": (half, (kept,))}
        case Rank():
            found = {"left": (half, (rows, level.rank)), "right": (half, (level.rank, cols))}
            return found | ({"bias": (half, (rows,))} if level.bias else {})
        case Plus():
            extra = {k if k == "bias" else f"extra_{k}": v for k, v in layout(level.extra, shape).items()}
            return layout(level.base, shape) | extra
    raise AssertionError(level)
