"""A linear whose matrix is never kept: two thin factors and a few single entries, W = s B A + S."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _dense(a: Tensor, b: Tensor, values: Tensor, index: Tensor, scale: float) -> Tensor:
    matrix = (b @ a).mul_(scale)
    matrix.view(-1).index_add_(0, index, values)
    return matrix


class _Product(Function):
    """The matrix is made for a use, forward and backward, and let go."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        ctx.scale, ctx.bias = scale, bias is not None
        ctx.save_for_backward(x, a, b, values, index)
        return nn.functional.linear(x, _dense(a, b, values, index, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, values, index = ctx.saved_tensors
        g_x = grad @ _dense(a, b, values, index, ctx.scale) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        whole = rows.T @ x.reshape(-1, x.shape[-1])
        g_values = whole.view(-1)[index]
        g_a, g_b = (b.T @ whole).mul_(ctx.scale), (whole @ a.T).mul_(ctx.scale)
        return g_x, g_a, g_b, g_values, None, rows.sum(0) if ctx.bias else None, None


class SparseFactors(nn.Module):
    """A linear of trained factors A `[r, in]` and B `[out, r]` and trained values of S at places that are fixed.

    Args:
        module: the linear whose shape and bias it takes.
        a, b: the factors as training begins.
        values, index: of S, and where they lie in the flat matrix, 32-bit.
        scale: s.
    """

    index: Tensor

    def __init__(self, module: nn.Linear, a: Tensor, b: Tensor, values: Tensor, index: Tensor, scale: float) -> None:
        super().__init__()
        self.out_features, self.in_features = module.weight.shape
        self.a, self.b, self.values = nn.Parameter(a), nn.Parameter(b), nn.Parameter(values)
        self.bias, self.scale = module.bias, scale
        self.register_buffer("index", index.int())

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        out: Tensor = _Product.apply(x, self.a, self.b, self.values, self.index, self.bias, self.scale)
        return out

    @property
    def weight(self) -> Tensor:
        """The matrix `[out, in]`."""
        return _dense(self.a.detach(), self.b.detach(), self.values.detach(), self.index, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept in place of the matrix."""
        return self.a.nbytes + self.b.nbytes + self.values.nbytes + self.index.nbytes

    def merged(self) -> nn.Linear:
        """An ordinary linear of the same function."""
        out = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        out.weight, out.bias = nn.Parameter(self.weight), self.bias
        return out
