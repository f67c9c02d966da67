"""The one wrapper that keeps a matrix on a grid of integers while its scales, and what lies below them, are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.core.errors import UserError
from trimtab.core.level import Int
from trimtab.formats.bitstream import unpack_bits
from trimtab.formats.packed import Packed, load_scale, pack_int, spread, store_scale
from trimtab.parts.frozen import Frame
from trimtab.parts.grids import grid_for
from trimtab.parts.saving import derived


def grid_of(name: str, level: Any) -> Int:
    """The grid that a level asks of a method: integers with 16-bit scales.

    Raises:
        UserError: it is another level.
    """
    if not isinstance(level, Int) or level.scale != "f16" or level.hadamard:
        raise UserError(f"{name} was asked for {level}; it takes integers with 16-bit scales, like 4b/g64")
    return level


class _OnGrid(Function):
    """Keeps the input and what is trained alone: codes, weight and its gradient are made as they are used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frame: OnGrid, gain: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        scale, whole, _ = frame.snapped(gain, a, b)
        weight = whole * frame.spread(scale)
        ctx.frame = frame
        ctx.save_for_backward(x, gain, a, b)
        y = nn.functional.linear(x, weight.to(x.dtype))
        return y if frame.bias is None else y.add_(frame.bias.to(x.dtype))  # as a packed linear adds it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, a, b = ctx.saved_tensors
        frame = ctx.frame
        scale, whole, below = frame.snapped(gain, a, b)
        wide = frame.spread(scale)
        g = grad.reshape(-1, grad.shape[-1])
        g_weight = (g.T @ x.reshape(-1, x.shape[-1])).to(wide.dtype)
        slope, g_a, g_b = whole, None, None
        if below is not None:
            ratio = below / wide
            low, high = frame.limits()
            inside = (ratio >= low) & (ratio <= high)
            slope = torch.where(inside, whole - ratio, whole)
            moved = g_weight * inside
            g_b = (frame.factor * (moved @ a.to(wide.dtype).T)).to(b.dtype)
            g_a = (frame.factor * (b.to(wide.dtype).T @ moved)).to(a.dtype)
        g_gain = (frame.summed(g_weight * slope) * frame.start).to(gain.dtype)
        g_x = grad @ (whole * wide).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return g_x, None, g_gain, g_a, g_b


def _product(x: Tensor, frame: OnGrid, gain: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    call: Callable[..., Tensor] = _OnGrid.apply
    return derived(call(x, frame, gain, a, b), _product, x, frame, gain, a, b)


class OnGrid(Frame):
    """A linear whose matrix is codes times scales at every step of a training, and packed afterwards.

    The matrix is `q * s` with s = start * (1 + gain), as 16 bits hold it. Without factors q stays as it is; with them
    q = round((W + factor * B A) / s) within the codes' range, whose gradient passes the rounding by and is zero beyond
    the range: with r = (W + factor * B A) / s, d(q s)/ds is q - r inside, and q outside.

    Args:
        module: the linear. A packed one keeps its own codes, scales and level; another is rounded to nearest.
        level: the grid of a matrix that is not packed.
        a, b: factors `[r, in]` and `[out, r]` below the rounding; None: the codes stay.
        factor: what their product is multiplied by.

    Raises:
        UserError: the module is packed at a level that has no such scales.
    """

    def __init__(
        self, module: nn.Module, level: Int, a: Tensor | None = None, b: Tensor | None = None, factor: float = 1.0
    ) -> None:
        super().__init__(module)
        packed = self.frozen.packed
        if packed is None:
            weight = self.frozen.weight().float()
            grid = grid_for(weight, level)
            packed = grid.pack(grid.round(weight)[0], tuple(weight.shape))
        self.stored, self.level, self.factor = packed, grid_of("a trained grid", packed.level), factor
        self.start = load_scale(packed.tensors, "f16")
        self.gain = nn.Parameter(torch.zeros_like(self.start))
        self.a = None if a is None else nn.Parameter(a)
        self.b = None if b is None else nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        return _product(x, self, self.gain, self.a, self.b)

    def spread(self, per_group: Tensor) -> Tensor:
        """Values of each group `[out, groups]` over the columns `[out, in]`."""
        return spread(per_group, self.level.group, self.in_features)

    def summed(self, values: Tensor) -> Tensor:
        """Sums `[out, groups]` over each group's columns."""
        group = self.level.group or self.in_features
        padded = nn.functional.pad(values, (0, -self.in_features % group))
        return padded.reshape(self.out_features, -1, group).sum(2)

    def limits(self) -> tuple[Tensor | float, Tensor | float]:
        """The least and the largest whole number that a column's codes stand for."""
        zero, top = self._zero(), float((1 << self.level.bits) - 1)
        return -zero, top - zero

    def _zero(self) -> Tensor | float:
        if self.level.symmetric:
            return float(1 << (self.level.bits - 1))
        return self.spread(self.stored.tensors["zero"].float())

    def snapped(self, gain: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales `[out, groups]` as they are stored, whole numbers `[out, in]`, and what was rounded to them."""
        scale = store_scale(self.start * (1 + gain.detach().float()), "f16")[0]
        if a is None or b is None:
            codes = unpack_bits(self.stored.tensors["codes"], self.level.bits, self.out_features * self.in_features)
            return scale, codes.view(self.out_features, -1).float() - self._zero(), None
        below = self.frozen.weight().float() + self.factor * (b.detach().float() @ a.detach().float())
        low, high = self.limits()
        whole = (below / self.spread(scale)).round()
        return scale, torch.minimum(torch.maximum(whole, torch.as_tensor(low)), torch.as_tensor(high)), below

    @torch.no_grad()
    def packed(self) -> Packed:
        """The matrix as it is stored: the forward pass computes with the very same values."""
        scale, whole, below = self.snapped(self.gain, self.a, self.b)
        stored = store_scale(scale, "f16")[1]
        if below is None:
            return Packed(self.level, self.stored.shape, {**self.stored.tensors, **stored})
        return pack_int(whole + self._zero(), stored, self.stored.tensors.get("zero"), self.level, self.stored.shape)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What became of the matrix `[out, in]` less what it was, fp32."""
        return self.packed().dense() - self.frozen.weight().float()

    def merged(self) -> nn.Module:
        """The plain linear of the same function; `packed()` is what is stored."""
        return self.frozen.linear(self.packed().dense())
