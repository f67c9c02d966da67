"""The one column-subset wrapper: some input columns of a frozen matrix are trained, the rest stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.parts.frozen import Frame, Frozen
from trimtab.parts.saving import derived


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """The columns of `rows` that an index names, in a storage of their own."""
    return rows.index_select(1, index)


class _Columns(Function):
    """Keeps the chosen columns of the input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Frozen, columns: Tensor, index: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        picked = _pick(rows, index)
        weight = base.weight(x.dtype).T
        out = rows @ weight if base.bias is None else torch.addmm(base.bias.to(x.dtype), rows, weight)
        out.addmm_(picked, columns.to(x.dtype).T)
        ctx.base, ctx.index = base, index
        ctx.save_for_backward(picked, columns)
        return out.view(*x.shape[:-1], base.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        picked, columns = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        g_columns = (g.T @ picked).to(columns.dtype) if ctx.needs_input_grad[2] else None
        g_x = None
        if ctx.needs_input_grad[0]:
            g_x = g @ ctx.base.weight(g.dtype)
            g_x.index_add_(1, ctx.index, g @ columns.to(g.dtype))
            g_x = g_x.view(*grad.shape[:-1], ctx.base.in_features)
        return g_x, None, g_columns, None


def column_linear(x: Tensor, base: Frozen, columns: Tensor, index: Tensor) -> Tensor:
    """`x W^T + x[:, index] D^T + bias`, with gradients for x and the columns D `[out, r]`."""
    call: Callable[..., Tensor] = _Columns.apply
    return derived(call(x, base, columns, index), column_linear, x, base, columns, index)


class Columns(Frame):
    """A linear of which some input columns are trained; what is stored and trained is their change, 0 at first.

    Args:
        module: the linear; its weight is frozen and shared.
        index: the columns, int64 `[r]`, each once.
        dtype: of the trained change.
    """

    index: Tensor

    def __init__(self, module: nn.Module, index: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(module)
        self.columns = nn.Parameter(torch.zeros(self.out_features, len(index), dtype=dtype))
        self.register_buffer("index", index.sort().values)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        return column_linear(x, self.frozen, self.columns, self.index)

    @torch.no_grad()
    def factored(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """A picks the columns, B is their change."""
        pick = torch.zeros(len(self.index), self.in_features)
        pick[torch.arange(len(self.index)), self.index] = 1.0
        return pick, self.columns.float(), None

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What training added to the matrix `[out, in]`, fp32."""
        added = torch.zeros(self.out_features, self.in_features)
        added[:, self.index] = self.columns.float()
        return added
