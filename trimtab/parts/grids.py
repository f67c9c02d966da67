"""Grids: one face for every scalar format: integers, minifloats, MX and NV formats are rounded to in the same words.

A grid fits its scales (and zero points) to a weight, rounds them first to what storage can hold, and rounds weights
against those: the values that `Grid.round` gives are, bit for bit, those that `Packed.dense` reads back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Float, Int, Shape
from trimtab.formats.minifloat import encode_magnitude, magnitudes
from trimtab.formats.packed import Packed, hadamard_blocks, pack_float, pack_int, store_scale

Rule = Literal["minmax", "mse"]
Power = Literal["floor", "ceil"]

_SHRINKS = tuple(1 - 0.025 * i for i in range(25))  # the range from whole down to 0.4 of it


@dataclass
class Grid:
    """The representable values of each group of a weight `[out, in]` at a level.

    Fields:
        level: the scalar format.
        cols: columns of the weight.
        rule: how a range is chosen: `minmax` covers every weight; `mse` shrinks it, group by group, to the least
            squared error.
        power: for `e8m0` scales: `floor` is the OCP rule, 2**(floor(log2 max) - emax), which may saturate the largest
            weights; `ceil` takes the next power of two that saturates none. `mse` tries both.
        scale: `[out, groups]`, as storage holds them, fp32.
        zero: zero points `[out, groups]`; None for symmetric integers and minifloats.
        matrix: for `e4m3` scales: the one scale of the matrix `[1]`, fixed when the grid is made.
    """

    level: Int | Float
    cols: int
    rule: Rule
    power: Power
    scale: Tensor
    zero: Tensor | None
    matrix: Tensor | None

    @property
    def group(self) -> int:
        """Columns of a group; the whole row for a level without groups."""
        return self.level.group or self.cols

    def round(self, columns: Tensor, j0: int = 0) -> tuple[Tensor, Tensor]:
        """Codes and values `[out, k]` of the grid points nearest to `columns [out, k]`, the columns from `j0` on."""
        scale, zero = self._at(self.scale, j0, columns.shape[1]), self.zero
        if zero is not None:
            zero = self._at(zero, j0, columns.shape[1])
        return _round(columns, scale, zero, self.level)

    def refit(self, columns: Tensor, j0: int) -> None:
        """Fit anew the groups that `columns [out, k]` fill, the first of them beginning at column `j0`."""
        scale, zero = _fit(_grouped(columns, self.group), self.level, self.rule, self.power, self.matrix)
        first = j0 // self.group
        here = slice(first, first + scale.shape[1])
        self.scale[:, here] = scale
        if self.zero is not None:
            assert zero is not None
            self.zero[:, here] = zero

    def pack(self, codes: Tensor, shape: Shape) -> Packed:
        """The stored form of `codes [out, in]`; `shape` is the weight's own, as `Packed` keeps it."""
        if self.matrix is None:
            stored = store_scale(self.scale, self.level.scale)[1]
        else:
            stored = {"scale": _e4m3_codes(self.scale, self.matrix).to(torch.uint8), "matrix_scale": self.matrix}
        if isinstance(self.level, Float):
            return pack_float(codes, stored, self.level, shape)
        return pack_int(codes, stored, self.zero, self.level, shape)

    def _at(self, per_group: Tensor, j0: int, k: int) -> Tensor:
        """Values of each group spread over columns `j0 .. j0+k`; one column where they all lie in one group."""
        first, last = j0 // self.group, (j0 + k - 1) // self.group
        if first == last:
            return per_group[:, first : first + 1]
        return per_group[:, torch.arange(j0, j0 + k) // self.group]


def grid_for(weight: Tensor, level: Int | Float, *, rule: Rule = "minmax", power: Power = "floor") -> Grid:
    """The grid of a level, fitted to a weight `[out, in]`.

    Integers with a zero point cover [min, max] of each group with 2**bits - 1 steps, zero included; symmetric integers
    cover [-max|w|, max|w|] with as many, so that no weight lies further than half a step from its code; minifloats put
    max|w| on their largest magnitude. A `hadamard` level expects a weight that `rotate` has rotated.

    Raises:
        UserError: an unknown rule or power.

    >>> level = Int(4, 64)
    >>> weight = torch.randn(8, 200, generator=torch.Generator().manual_seed(0))
    >>> grid = grid_for(weight, level)
    >>> codes, values = grid.round(weight)
    >>> packed = grid.pack(codes, (8, 200))
    >>> torch.equal(packed.dense(), values), packed.nbytes == level.bytes((8, 200))
    (True, True)
    """
    if rule not in get_args(Rule) or power not in get_args(Power):
        found = f"rule={rule!r}, power={power!r}"
        raise UserError(f"a grid was asked for with {found}; the rule is minmax or mse, the power floor or ceil")
    groups = _grouped(weight.float(), level.group or weight.shape[1])
    matrix = None
    if level.scale == "e4m3":
        tiny = torch.finfo(torch.float32).tiny
        matrix = (_extent(groups, level)[1].max() / (_top(level) * 448)).clamp_min(tiny).reshape(1)
    scale, zero = _fit(groups, level, rule, power, matrix)
    # a sweep reads the scales one group at a time: keep each group's together
    zero = None if zero is None else zero.t().contiguous().t()
    return Grid(level, weight.shape[1], rule, power, scale.t().contiguous().t(), zero, matrix)


def rotate(weight: Tensor, level: Int | Float) -> Tensor:
    """The weight `[out, in]` with its columns rotated group by group, where the level stores it so; else as it is."""
    return hadamard_blocks(weight, level.group) if level.hadamard and level.group else weight


def rotate_gram(gram: Tensor, level: Int | Float) -> Tensor:
    """The gram `[in, in]` of inputs rotated as `rotate` rotates the columns: R G R."""
    return rotate(rotate(gram, level).t().contiguous(), level)


def extents(weight: Tensor, level: Int | Float, group: int | None) -> Tensor:
    """The range `[out, groups]` to cover in each group of `group` columns (None: the row) of a weight `[out, in]`."""
    return _extent(_grouped(weight, group or weight.shape[1]), level)[1]


def _grouped(weight: Tensor, group: int) -> Tensor:
    """`[out, in]` as `[out, groups, group]`, the last group filled with zeros, which every grid holds exactly."""
    pad = -weight.shape[1] % group
    return torch.nn.functional.pad(weight, (0, pad)).contiguous().reshape(weight.shape[0], -1, group)


def _top(level: Int | Float) -> float:
    """How many scales the range of a group spans."""
    if isinstance(level, Float):
        return float(magnitudes(level.e, level.m)[-1])
    steps = float((1 << level.bits) - 1)
    return steps / 2 if level.symmetric and level.bits > 1 else steps


def _extent(groups: Tensor, level: Int | Float) -> tuple[Tensor | None, Tensor]:
    """The least weight (None for symmetric grids) and the range to cover, `[out, groups]`."""
    if isinstance(level, Float) or level.symmetric:
        return None, groups.abs().amax(2)
    low = groups.amin(2).clamp_max(0)
    return low, groups.amax(2).clamp_min(0) - low


def _fit(
    groups: Tensor, level: Int | Float, rule: Rule, power: Power, matrix: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of `groups [out, groups, group]`."""
    low, extent = _extent(groups, level)
    best: tuple[Tensor, Tensor | None] | None = None
    least = torch.full_like(extent, torch.inf)
    for shrink in _SHRINKS if rule == "mse" else (1.0,):
        # the powers of two at and below the one that clips nothing are all tried: the OCP rule's is among them
        scale = _hold(extent * shrink, level, "ceil" if rule == "mse" else power, matrix)
        zero = None
        if low is not None:
            zero = (low * -shrink / scale).round().clamp(0, (1 << level.bits) - 1)  # type: ignore[union-attr]
        if rule == "minmax":
            return scale, zero
        values = _round(groups, scale[..., None], None if zero is None else zero[..., None], level)[1]
        error = (values - groups).square().sum(2)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        zero = None if zero is None else torch.where(better, zero, best[1])  # type: ignore[arg-type]
        best, least = (torch.where(better, scale, best[0]), zero), torch.where(better, error, least)
    assert best is not None
    return best


def _hold(extent: Tensor, level: Int | Float, power: Power, matrix: Tensor | None) -> Tensor:
    """The scale that storage can hold for a group of that range."""
    if matrix is not None:
        return magnitudes(4, 3)[_e4m3_codes(extent / _top(level), matrix)] * matrix
    if level.scale == "e8m0" and power == "floor":
        top = torch.tensor(_top(level)).log2().floor()
        return torch.exp2((extent.log2().floor() - top).clamp(-126, 127))
    return store_scale(extent / _top(level), level.scale)[0]


def _e4m3_codes(scale: Tensor, matrix: Tensor) -> Tensor:
    return encode_magnitude(scale / matrix, 4, 3).clamp_min(1)


def _round(weight: Tensor, scale: Tensor, zero: Tensor | None, level: Int | Float) -> tuple[Tensor, Tensor]:
    if isinstance(level, Float):
        code = encode_magnitude(weight / scale, level.e, level.m)
        negative = weight < 0
        value = magnitudes(level.e, level.m)[code]
        return code | negative.long() << (level.e + level.m), torch.where(negative, -value, value) * scale
    offset: Tensor | float = float(1 << (level.bits - 1)) if zero is None else zero
    code = ((weight / scale).round_() + offset).clamp_(0, (1 << level.bits) - 1)
    return code, (code - offset) * scale
