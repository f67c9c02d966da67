"""Grouped integers times 8-bit inputs, in plain torch: the arithmetic that every compiled variant follows, and what
runs where none is compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil

import torch
from torch import Tensor

from trimtab.core.level import Float, Int, rows_cols
from trimtab.formats.bitstream import unpack_bits
from trimtab.formats.minifloat import magnitudes
from trimtab.formats.packed import Packed, hadamard_blocks, load_scale

MOST, PIECE, LEAST = 256, 128, 32  # columns whose inputs share a scale: at most; of cut or joined groups; at least
_AT_ONCE = 1 << 24  # products of a group kept at a time


@cache
def exact_step(e: int, m: int) -> float | None:
    """The step of the integer grid on which all values of a minifloat lie, within 127 steps; None if there is none.

    >>> exact_step(2, 1), exact_step(2, 3), exact_step(4, 3)
    (0.5, 0.125, None)
    """
    grid = magnitudes(e, m)
    step = float(grid[grid > 0].min())
    steps = grid / step
    return step if float(steps.max()) <= 127 and torch.equal(steps, steps.round()) else None


@dataclass(frozen=True)
class Spans:
    """How the columns of a row are cut where inputs are rounded.

    Fields:
        group: columns that share a scale of the weight.
        join: groups that share a scale of the inputs: small ones, 32 columns, or up to 128 where they leave no rest.
        pieces: spans of a group: one of more than 256 columns is cut into equal parts of about 128.
        block: columns of a group, or of a piece, rounded up to a multiple of 4.
    """

    group: int
    join: int
    pieces: int
    block: int

    @classmethod
    def of(cls, cols: int, group: int | None) -> Spans:
        """Those of a matrix of `cols` columns; `group` None is the row."""
        group = min(group or cols, cols)
        if group > MOST:
            block = 4 * ceil(group / (4 * ceil(group / PIECE)))
            return cls(group, 1, ceil(group / block), block)
        groups, block = ceil(cols / group), 4 * ceil(group / 4)
        least, most = min(max(LEAST // group, 1), groups), min(PIECE // block, groups)
        join = next((j for j in range(most, least, -1) if groups % j == 0), least)
        return cls(group, join, 1, block)

    def places(self, cols: int) -> Tensor:
        """Columns `[spans, join, block]`; `cols` stands for a place that holds none."""
        groups = ceil(cols / self.group)
        inside = torch.arange(self.pieces * self.block)
        column = torch.arange(groups)[:, None] * self.group + inside
        column = torch.where((inside < self.group) & (column < cols), column, cols)
        column = column.reshape(groups * self.pieces, self.block)
        short = -len(column) % self.join
        column = torch.cat((column, column.new_full((short, self.block), cols)))
        column = column.reshape(-1, self.join, self.block)
        return column[(column < cols).flatten(1).any(1)]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round the last dimension to 8 bits: integers in -127..127 as fp32, and the scale max|x| / 127.

    q = round_half_even(x / s); all zero where s is.
    """
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = (x / scale).clamp(-127, 127).round()
    return torch.where(scale > 0, codes, torch.where(scale.isnan(), scale, 0.0)), scale


def integers(packed: Packed) -> tuple[Tensor, Tensor]:
    """The stored integers less their zero points `[out, in]`, fp32, and the scales `[out, groups]`.

    Raises:
        ValueError: the level's values are not integers of 8 bits times a scale.
    """
    level, (rows, cols) = packed.level, rows_cols(packed.shape)
    assert isinstance(level, Int | Float)
    scale = load_scale(packed.tensors, level.scale)
    if isinstance(level, Int):
        codes = unpack_bits(packed.tensors["codes"], level.bits, rows * cols).reshape(rows, cols).float()
        if level.symmetric:
            return codes - float(1 << (level.bits - 1)), scale
        zero = packed.tensors["zero"].float().repeat_interleave(level.group or cols, dim=1)[:, :cols]
        return codes - zero, scale
    step, width = exact_step(level.e, level.m), level.e + level.m
    if step is None:
        raise ValueError(f"the values of {level} are no integers of 8 bits times a scale")
    codes = unpack_bits(packed.tensors["codes"], 1 + width, rows * cols).reshape(rows, cols)
    grid = magnitudes(level.e, level.m) / step
    value = grid[(codes & ((1 << width) - 1)).long()] * torch.where(codes >> width == 1, -1.0, 1.0)
    return value, scale * step


def linear(packed: Packed, x: Tensor) -> Tensor:
    """A packed matrix times inputs that are rounded to 8 bits span by span.

    y[m, n] = sum over groups g: s_x[m, g] * s_w[n, g] * sum over columns k of g: q_x[m, k] * (q_w[n, k] - z[n, g])

    The inner sum is exact (below 2^24 in fp32); the outer one is fp32. A `hadamard` level's inputs are first rotated
    as its columns were.

    Args:
        packed: `[out, in]` at an `Int` level, or a `Float` one whose grid is one of integers.
        x: `[m, in]`, fp32.

    Returns:
        `[m, out]`, fp32.
    """
    level, (rows, cols) = packed.level, rows_cols(packed.shape)
    assert isinstance(level, Int | Float)
    if level.hadamard and level.group:
        x = hadamard_blocks(x, level.group)
    spans = Spans.of(cols, level.group)
    places = spans.places(cols)
    weight, s_w = integers(packed)
    q_x, s_x = quantise(torch.nn.functional.pad(x, (0, 1))[:, places.flatten(1)])
    q_x = q_x.reshape(len(x), *places.shape).flatten(1, 2).transpose(0, 1)  # [blocks, m, block]
    q_w = torch.nn.functional.pad(weight, (0, 1))[:, places.flatten(0, 1)].permute(1, 2, 0)  # [blocks, block, out]
    s_x = s_x.squeeze(-1).repeat_interleave(spans.join, dim=1).t()  # [blocks, m]
    group = places.flatten(0, 1)[:, 0].clamp_max(cols - 1) // spans.group
    s_w = s_w[:, group].t()  # [blocks, out]
    y = torch.zeros(len(x), rows)
    some = max(1, _AT_ONCE // max(1, len(x) * rows))
    for b in range(0, len(q_x), some):
        here = slice(b, b + some)
        y += torch.einsum("bmn,bm,bn->mn", q_x[here] @ q_w[here], s_x[here], s_w[here])
    return y
