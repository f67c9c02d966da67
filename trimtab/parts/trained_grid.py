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


def rounded_rows(x: Tensor, bits: int) -> Tensor:
    """Every row of `x [..., in]` on a grid of so many bits that reaches its largest magnitude; 0 and 16: as it is.

    Where nothing is negative, as behind a ReLU, all codes stand for what is not.

    >>> rounded_rows(torch.tensor([[-1.0, 0.3, 7.0], [0.0, 0.2, -0.7]]), 4)
    tensor([[-1.0000,  0.0000,  7.0000],
            [ 0.0000,  0.2000, -0.7000]])
    """
    if not 0 < bits < 16:
        return x
    top = (1 << bits) - 1 if bool((x >= 0).all()) else (1 << (bits - 1)) - 1
    step = x.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / top
    return ((x / step).round() * step).to(x.dtype)


class _OnGrid(Function):
    """Keeps the input and what is trained alone: codes, weight and its gradient are made as they are used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, frame: OnGrid, gain: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
        scale, whole, _ = frame.snapped(gain, a, b)
        weight = whole * frame.spread(scale)
        ctx.frame = frame
        ctx.save_for_backward(x, gain, a, b)
        y = nn.functional.linear(rounded_rows(x, frame.inputs), weight.to(x.dtype))
        return y if frame.bias is None else y.add_(frame.bias.to(x.dtype))  # as a packed linear adds it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, a, b = ctx.saved_tensors
        frame = ctx.frame
        scale, whole, below = frame.snapped(gain, a, b)
        wide = frame.spread(scale)
        g = grad.reshape(-1, grad.shape[-1])
        g_weight = (g.T @ rounded_rows(x, frame.inputs).reshape(-1, x.shape[-1])).to(wide.dtype)
        slope, g_gain, g_a, g_b = whole, None, None, None
        if b is not None and a is None:
            g_b = g_weight.to(b.dtype)
        elif below is not None:
            ratio = below / wide
            low, high = frame.limits()
            inside = (ratio >= low) & (ratio <= high)
            slope = torch.where(inside, whole - ratio, whole)
            moved = g_weight * inside
            g_b = (frame.factor * (moved @ a.to(wide.dtype).T)).to(b.dtype)
            g_a = (frame.factor * (b.to(wide.dtype).T @ moved)).to(a.dtype)
        if gain is not None:
            g_gain = (frame.summed(g_weight * slope) * frame.start).to(gain.dtype)
        g_x = grad @ (whole * wide).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return g_x, None, g_gain, g_a, g_b


def _product(x: Tensor, frame: OnGrid, gain: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    call: Callable[..., Tensor] = _OnGrid.apply
    return derived(call(x, frame, gain, a, b), _product, x, frame, gain, a, b)


class OnGrid(Frame):
    """A linear whose matrix is codes times scales at every step of a training, and packed afterwards.

    The matrix is `q * s` with s = start * (1 + gain), as 16 bits hold it. Without factors q stays as it is; with them
    q = round((W + factor * B A) / s) within the codes' range, whose gradient passes the rounding by and is zero beyond
    the range: with r = (W + factor * B A) / s, d(q s)/ds is q - r inside, and q outside.

    With B alone `[out, in]` all of the matrix is trained below the rounding, q = round((W + B) / s), and the scales are
    not: each follows the largest magnitude of its group, s = start * max|W + B| / max|W|, so that the gradient of B is
    that of the matrix.

    Args:
        module: the linear. A packed one keeps its own codes, scales and level; another is rounded to nearest.
        level: the grid of a matrix that is not packed.
        a, b: factors `[r, in]` and `[out, r]` below the rounding, or b alone `[out, in]`; None: the codes stay.
        factor: what their product is multiplied by.
        inputs: bits that every row of the inputs is rounded to, past which the gradient goes; 0: it is not.

    Raises:
        UserError: the module is packed at a level that has no such scales.
    """

    def __init__(
        self,
        module: nn.Module,
        level: Int,
        a: Tensor | None = None,
        b: Tensor | None = None,
        factor: float = 1.0,
        inputs: int = 0,
    ) -> None:
        super().__init__(module)
        packed = self.frozen.packed
        if packed is None:
            weight = self.frozen.weight().float()
            grid = grid_for(weight, level)
            packed = grid.pack(grid.round(weight)[0], tuple(weight.shape))
        self.stored, self.level, self.factor = packed, grid_of("a trained grid", packed.level), factor
        self.start, self.inputs = load_scale(packed.tensors, "f16"), inputs
        self.gain = None if a is None and b is not None else nn.Parameter(torch.zeros_like(self.start))
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
        return self._grouped(values).sum(2)

    def _grouped(self, values: Tensor) -> Tensor:
        group = self.level.group or self.in_features
        padded = nn.functional.pad(values, (0, -self.in_features % group))
        return padded.reshape(self.out_features, -1, group)

    def limits(self) -> tuple[Tensor | float, Tensor | float]:
        """The least and the largest whole number that a column's codes stand for."""
        zero, top = self._zero(), float((1 << self.level.bits) - 1)
        return -zero, top - zero

    def _zero(self) -> Tensor | float:
        if self.level.symmetric:
            return float(1 << (self.level.bits - 1))
        return self.spread(self.stored.tensors["zero"].float())

    def snapped(self, gain: Tensor | None, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scales `[out, groups]` as they are stored, whole numbers `[out, in]`, and what was rounded to them."""
        if b is None:
            assert gain is not None
            scale = store_scale(self.start * (1 + gain.detach().float()), "f16")[0]
            codes = unpack_bits(self.stored.tensors["codes"], self.level.bits, self.out_features * self.in_features)
            return scale, codes.view(self.out_features, -1).float() - self._zero(), None
        weight, b = self.frozen.weight().float(), b.detach().float()
        below = weight + (b if a is None else self.factor * (b @ a.detach().float()))
        growth = self._growth(weight, below) if gain is None else 1 + gain.detach().float()
        scale = store_scale(self.start * growth, "f16")[0]
        low, high = self.limits()
        whole = (below / self.spread(scale)).round()
        return scale, torch.minimum(torch.maximum(whole, torch.as_tensor(low)), torch.as_tensor(high)), below

    def _growth(self, weight: Tensor, below: Tensor) -> Tensor:
        """What the largest magnitude of each group `[out, groups]` became, as a multiple of what it was."""
        was, now = (self._grouped(t).abs().amax(2) for t in (weight, below))
        return torch.where(was > 0, now / was, 1.0)

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
