"""The one low-rank wrapper: y = base(x) + s (x A^T) B^T, or the same with rows of the matrix scaled, as DoRA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.core.errors import UserError
from trimtab.core.level import Rank
from trimtab.parts.frozen import Frame, Frozen
from trimtab.parts.saving import derived


def rank_of(name: str, level: Any, module: nn.Module) -> int:
    """The rank that a level asks of a method at a module.

    Raises:
        UserError: it is no rank, or the matrix has fewer rows or columns.
    """
    if not isinstance(level, Rank) or level.bias:
        raise UserError(f"{name} was asked for {level}; it takes a rank, like r16")
    base = Frozen(module)
    if level.rank > min(base.out_features, base.in_features):
        raise UserError(
            f"{name} was asked for rank {level.rank} at a matrix of {base.out_features} x {base.in_features}; "
            f"a rank up to {min(base.out_features, base.in_features)} can be had"
        )
    return level.rank


def scale_of(alpha: float, rank: int, scaling: str) -> float:
    """What a product of rank r is multiplied by.

    Raises:
        UserError: the scaling is not known.
    """
    if scaling not in ("rank", "root"):
        raise UserError(f"scaling={scaling!r} was asked for at rank {rank}; it is 'rank' or 'root'")
    return alpha / (rank if scaling == "rank" else rank**0.5)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Delta(Function):
    """Two products and two accumulations in place: no tensor of the output's size is made beside the output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Frozen, a: Tensor, b: Tensor, gain: Tensor | None, scale: float) -> Tensor:
        weight = base.weight(x.dtype)
        rows = _rows(x)
        inner = rows @ a.to(x.dtype).T
        bias, factor = base.bias, b.to(x.dtype).T * scale
        # the thin product first: the large one adds to it as it goes
        out = inner @ factor if bias is None or gain is not None else torch.addmm(bias.to(x.dtype), inner, factor)
        out.addmm_(rows, weight.T)
        if gain is not None:
            out.mul_(gain.to(x.dtype))
            if bias is not None:
                out.add_(bias.to(x.dtype))
        out = out.view(*x.shape[:-1], base.out_features)
        ctx.base, ctx.scale = base, scale
        ctx.save_for_backward(x, inner, a, b, gain, out if gain is not None else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b, gain, out = ctx.saved_tensors
        base, scale = ctx.base, ctx.scale
        g = _rows(grad)
        g_gain = None
        if gain is not None:
            rows = _rows(out) if base.bias is None else _rows(out) - base.bias.to(out.dtype)
            if ctx.needs_input_grad[4]:
                g_gain = (g * rows).sum(0, dtype=torch.float32).to(gain.dtype) / gain
            g = g * gain.to(g.dtype)
        inward = (g @ b.to(g.dtype)).mul_(scale)
        g_b = (g.T @ inner).mul_(scale).to(b.dtype) if ctx.needs_input_grad[3] else None
        g_a = (inward.T @ _rows(x)).to(a.dtype) if ctx.needs_input_grad[2] else None
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = (inward @ a.to(g.dtype)).addmm_(g, base.weight(g.dtype)).view(*grad.shape[:-1], base.in_features)
        return g_x, None, g_a, g_b, g_gain, None


def delta_linear(x: Tensor, base: Frozen, a: Tensor, b: Tensor, gain: Tensor | None, scale: float) -> Tensor:
    """`gain * (x W^T + scale (x A^T) B^T) + bias`, with gradients for x, A `[r, in]`, B `[out, r]` and the gain."""
    call: Callable[..., Tensor] = _Delta.apply
    return derived(call(x, base, a, b, gain, scale), delta_linear, x, base, a, b, gain, scale)


class LowRank(Frame):
    """A linear with a trained low-rank delta.

    Args:
        module: the linear; its weight is frozen and shared.
        a, b: factors `[r, in]` and `[out, r]`, as training begins.
        scale: what their product is multiplied by.
        start: the product that training begins with is taken off the matrix, so that the function is the module's:
            for factors that are not zero. Two frozen factors hold it.
        magnitude: rows of the matrix are scaled to trained lengths, which begin as they are.
    """

    a0: Tensor
    b0: Tensor

    def __init__(
        self, module: nn.Module, a: Tensor, b: Tensor, scale: float, start: bool = False, magnitude: bool = False
    ) -> None:
        super().__init__(module)
        self.a, self.b, self.scale = nn.Parameter(a.contiguous()), nn.Parameter(b.contiguous()), scale
        self.start = start
        if start:
            self.register_buffer("a0", a.detach().clone())
            self.register_buffer("b0", b.detach().clone())
        self.magnitude = nn.Parameter(self.frozen.weight().float().norm(dim=1).to(a.dtype)) if magnitude else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Both factors, with what training began with taken off."""
        if not self.start:
            return self.a, self.b
        return torch.cat((self.a, self.a0)), torch.cat((self.b, -self.b0), 1)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        a, b = self.factors()
        gain = None if self.magnitude is None else self.magnitude / self._lengths(a, b).to(self.magnitude.dtype)
        return delta_linear(x, self.frozen, a, b, gain, self.scale)

    @torch.no_grad()
    def _lengths(self, a: Tensor, b: Tensor) -> Tensor:
        """Lengths of the rows of W + s B A, without that matrix being made; a constant to the gradient."""
        weight, a, b = self.frozen.weight().float(), a.float(), b.float()
        if not hasattr(self, "_squares"):
            self._squares = weight.square().sum(1)
        cross = (b * (weight @ a.T)).sum(1)
        own = (b * (b @ (a @ a.T))).sum(1)
        return (self._squares + 2 * self.scale * cross + self.scale**2 * own).clamp_min(1e-24).sqrt()

    @torch.no_grad()
    def factored(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Both factors, the scale in B, and the rows' lengths where these are trained."""
        a, b = self.factors()
        return a.float(), self.scale * b.float(), None if self.magnitude is None else self.magnitude.detach().float()

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What training added to the matrix `[out, in]`, fp32."""
        a, b = self.factors()
        added = self.scale * (b.float() @ a.float())
        if self.magnitude is None:
            return added
        weight = self.frozen.weight().float()
        return (weight + added) * (self.magnitude.float() / self._lengths(a, b))[:, None] - weight


def gaussian(rows: int, cols: int, rng: torch.Generator) -> Tensor:
    """A factor A `[rows, cols]` as LoRA's authors draw it: uniform within +-1/sqrt(cols) (Kaiming with a = sqrt 5)."""
    return (torch.rand(rows, cols, generator=rng) * 2 - 1) / cols**0.5
