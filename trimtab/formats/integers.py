"""What the readers of other libraries' integer formats share: words of 32 bits, groups, and the level that holds them.

All of these formats say weight = (code - zero) * scale for every group of columns, as our levels do. They differ in how
codes and zero points lie in 32-bit words, and in which order the columns make groups.

A level keeps scales in fp16. Scales in bf16 or fp32 nearly always are fp16 numbers too; where one is not, no level of
integers stands for the weight exactly, and the weight is unpacked to `fp32` rather than changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Dense, Int, Level, Shape
from trimtab.formats.bitstream import unpack_bits
from trimtab.formats.checkpoint import Checkpoint
from trimtab.formats.packed import Packed, pack_dense, pack_int, spread

FLOATS = ("F16", "BF16", "F32")
CURE = "quantise the original again so, or give the original in floating point"


@dataclass(frozen=True)
class Foreign:
    """A weight of another library's checkpoint, checked but for its codes, which are read when it is used.

    Fields:
        level: the level that holds it exactly.
        shape: `(out, in)`.
        read: reads and repacks it; its columns come in `order`.
        order: `[in]`, which of the layer's inputs each stored column multiplies; None: one after the other.
    """

    level: Level
    shape: Shape
    read: Callable[[], Packed]
    order: Tensor | None = None


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of int32 words `[rows, n]`, end to end from the least significant bit:
    int32 `[rows, count]`.

    >>> unpack_words(torch.tensor([[0x321], [0x654]], dtype=torch.int32), 4, 3)
    tensor([[1, 2, 3],
            [4, 5, 6]], dtype=torch.int32)
    """
    if 32 % bits:  # whole codes a row, so that the rows can be unpacked as one
        words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    rows, n = words.shape
    flat = words.contiguous().reshape(-1).view(torch.uint8)
    return unpack_bits(flat, bits, rows * n * 32 // bits).reshape(rows, -1)[:, :count]


def groups_of(cols: int, group: int | None) -> int:
    """How many groups a row of `cols` columns has."""
    return 1 if group is None else ceil(cols / group)


def group_for(groups: list[int | None], cols: int, count: int) -> int | None:
    """Which size of a group makes so many of `cols` columns, one that divides them first; if none, the first."""
    fitting = [g for g in groups if groups_of(cols, g) == count]
    return ([g for g in fitting if cols % (g or cols) == 0] or fitting or groups)[0]


def words_for(codes: int, bits: int) -> int:
    """How many words of 32 bits so many codes take, end to end."""
    return ceil(codes * bits / 32)


def expect(checkpoint: Checkpoint, name: str, dtypes: Iterable[str], shape: Shape) -> None:
    """Check a tensor's type and shape by the header.

    Raises:
        UserError: it is missing, or of another type or shape.
    """
    dtypes = tuple(dtypes)
    if name not in checkpoint:
        raise UserError(f"{checkpoint.path}: {name} is missing; the download may be incomplete: download it again")
    found, seen = checkpoint.dtype(name), checkpoint.shape(name)
    if found not in dtypes or seen != shape:
        raise UserError(
            f"{checkpoint.path}: {name} is {found} of shape {list(seen)}, and the configuration makes it "
            f"{' or '.join(dtypes)} of shape {list(shape)}: the two do not belong together; download it again"
        )


def check_scale(scale: Tensor, where: str) -> Tensor:
    """The scales themselves.

    Raises:
        UserError: one is NaN or infinite.
    """
    bad = int((~scale.isfinite()).sum())
    if bad:
        raise UserError(
            f"{where} holds {bad} scales or offsets that are NaN or infinite; the file is damaged: download it again"
        )
    return scale


def column_order(index: Tensor, cols: int, group: int | None, where: str) -> Tensor | None:
    """The order in which columns lie group by group, from each column's group `index [cols]`; None if they do already.

    Raises:
        UserError: the groups are not of `group` columns each.
    """
    wanted = torch.arange(cols) // (group or cols)
    index = index.long()
    if torch.equal(index, wanted):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], wanted):
        raise UserError(
            f"{where} does not put {group or cols} columns in each group (its last may be short), and no level has "
            "groups of uneven size; quantise the original again without act-order (`desc_act=False`)"
        )
    return order


def level_of(scale: Tensor, zero: Tensor | None, bits: int, group: int | None) -> Level:
    """The level that holds a weight exactly: by `scale [out, groups]`, and `zero`, of the same shape and within the
    codes' range, or None where it is 2**(bits-1) throughout.
    """
    if not torch.equal(scale.to(torch.float16).float(), scale.float()):
        return Dense("fp32")
    return Int(bits, group, symmetric=zero is None or bool((zero == 1 << (bits - 1)).all()))


def settle(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int | None) -> Packed:
    """A weight at the level of `level_of`: `codes [out, in]`, `scale` and `zero [out, groups]`."""
    level, shape = level_of(scale, zero, bits, group), tuple(codes.shape)
    if isinstance(level, Int):
        stored = {"scale": scale.to(torch.float16).contiguous()}
        return pack_int(codes, stored, None if level.symmetric else zero, level, shape)
    shift = float(1 << (bits - 1)) if zero is None else spread(zero.float(), group, shape[1])
    return pack_dense((codes.float() - shift) * spread(scale.float(), group, shape[1]), Dense("fp32"))


# ---- what a configuration says of them


def whole_numbers(settings: Iterable[Mapping[str, Any]], key: str, known: tuple[int, ...], where: str) -> list[int]:
    """The numbers that several settings give for a key, in order, each once.

    Raises:
        UserError: there is none, or one is not among the known.
    """
    found = [s[key] for s in settings if key in s]
    wrong = [n for n in found if type(n) is not int or n not in known]
    if not found or wrong:
        takes = ", ".join(map(str, known))
        raise UserError(f"{where} says {key}={wrong[0] if wrong else None!r:.40}; those that load are {takes}: {CURE}")
    return list(dict.fromkeys(found))


def group_sizes(settings: Iterable[Mapping[str, Any]], key: str, where: str) -> list[int | None]:
    """The group sizes that several settings give for a key, in order, each once; None: a group is the row.

    Raises:
        UserError: one is no size of a group.
    """
    found = [s.get(key) for s in settings if key in s] or [None]
    for size in found:
        if size is not None and (type(size) is not int or (size != -1 and not 1 <= size <= 1 << 24)):
            raise UserError(f"{where} says {key}={size!r:.40}, which is no size of a group: {CURE}")
    return list(dict.fromkeys(None if size in (None, -1) else size for size in found))
