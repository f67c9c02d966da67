"""Weights that are trained while only their 8-bit codes are kept: w = scale code + low, in groups of a row.

No copy in floating point stays between two steps. A linear that is held so unpacks its matrix for a use, forward and
backward; an update unpacks it once, and rounds the result up or down at random, so that updates smaller than a step of
the grid still count in the mean.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.core.errors import UserError

GROUP = 256  # neighbours in a row that share a scale
Rounding = Literal["stochastic", "nearest"]


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, held: Held) -> Tensor:
        ctx.held, ctx.bias = held, bias is not None
        ctx.save_for_backward(x)
        return nn.functional.linear(x, held.dense().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        g_x = grad @ ctx.held.dense().to(grad.dtype) if ctx.needs_input_grad[0] else None
        g_w = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return g_x, g_w, rows.sum(0) if ctx.bias else None, None


class Held(nn.Module):
    """A linear whose weight is kept in 8 bits.

    `weight` has the matrix's shape and four bytes: it receives the gradient, and `dense` gives the values.

    Args:
        module: the linear; its bias is shared.
        rounding: how an updated matrix comes back onto the grid.

    >>> layer = nn.Linear(300, 20)
    >>> held = Held(layer)
    >>> float((held.dense() - layer.weight.detach()).abs().max()) < 0.5 / 255 * 2 * 300**-0.5 * 1.01
    True
    >>> held.nbytes, held.weight.shape
    (6320, torch.Size([20, 300]))
    """

    codes: Tensor
    scale: Tensor
    low: Tensor

    def __init__(self, module: nn.Linear, rounding: Rounding = "stochastic") -> None:
        super().__init__()
        if rounding not in ("stochastic", "nearest"):
            raise UserError(f"rounding={rounding!r} was asked for; a weight of 8 bits is rounded stochastic or nearest")
        self.out_features, self.in_features = module.weight.shape
        self.rounding = rounding
        self.weight = nn.Parameter(torch.zeros(1).expand(self.out_features, self.in_features))
        self.bias = module.bias
        groups = -(-self.in_features // GROUP)
        self.register_buffer("codes", torch.zeros(self.out_features, self.in_features, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(self.out_features, groups))
        self.register_buffer("low", torch.zeros(self.out_features, groups))
        self.store(module.weight.detach().float(), None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and lows."""
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes

    def dense(self) -> Tensor:
        """The matrix `[out, in]` in fp32."""
        scale, low = (t.repeat_interleave(GROUP, 1)[:, : self.in_features] for t in (self.scale, self.low))
        return torch.addcmul(low, self.codes.float(), scale)

    @torch.no_grad()
    def store(self, matrix: Tensor, rng: torch.Generator | None) -> None:
        """Put a matrix onto a grid of its own; without a generator each number goes to the nearest point."""
        for i in range(self.scale.shape[1]):
            part = matrix[:, i * GROUP : (i + 1) * GROUP]
            low, high = torch.aminmax(part, dim=1, keepdim=True)
            scale = ((high - low) / 255).clamp_min_(1e-12)
            places = (part - low) / scale
            if rng is None or self.rounding == "nearest":
                places.round_()
            else:
                places.add_(torch.rand(places.shape, generator=rng)).floor_()
            self.codes[:, i * GROUP : (i + 1) * GROUP] = places.clamp_(0, 255).to(torch.uint8)
            self.scale[:, i : i + 1], self.low[:, i : i + 1] = scale, low

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        out: Tensor = _Product.apply(x, self.weight, self.bias, self)
        return out

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """An ordinary linear of the same function."""
        out = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        out.weight, out.bias = nn.Parameter(self.dense()), self.bias
        return out


def hold(model: nn.Module, rounding: Rounding = "stochastic") -> dict[nn.Parameter, Held]:
    """Keep the weights of a model's linears in 8 bits, in place, but for those that share them with an embedding; the
    parameters that stand for them.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[nn.Parameter, Held] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and id(module.weight) not in shared:
            held = Held(module, rounding)
            model.set_submodule(path, held)
            found[held.weight] = held
    return found


def release(model: nn.Module) -> None:
    """Make held linears ordinary ones again, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Held):
            model.set_submodule(path, module.plain())
