"""The frozen matrix below an adapter: a linear, a transposed one as GPT-2's, or a packed weight unpacked as used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.core.errors import UserError
from trimtab.formats.packed import Packed
from trimtab.parts.saving import derived

AT_ONCE = 1 << 22  # weights of a packed matrix that are unpacked together, 16 MB


class Frozen:
    """A module's matrix `[out, in]` and bias, read and never trained; a packed one is unpacked for a use and let go.

    Raises:
        UserError: the module is no linear.
    """

    def __init__(self, module: nn.Module) -> None:
        self.packed = getattr(module, "packed", None)
        weight: Any = getattr(module, "weight", None)
        # transformers' Conv1D, known by its face: it holds its weight [in, out] and says how many outputs there are
        self.transposed = self.packed is None and not isinstance(module, nn.Linear) and hasattr(module, "nf")
        if self.packed is None and not (self.transposed or isinstance(module, nn.Linear)):
            raise UserError(f"a {type(module).__name__} was to be adapted; a linear is needed")
        self._weight = weight
        bias = getattr(module, "bias", None)
        self.bias = None if bias is None else bias.detach()
        if self.packed is not None:
            self.out_features, self.in_features = self.packed.shape
        else:
            self.out_features, self.in_features = self.weight(torch.float32).shape

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix `[out, in]`: the stored one itself where it is dense and of that type."""
        if self.packed is not None:
            return self.packed.dense().to(dtype or torch.float32)
        weight = self._weight.detach()
        weight = weight.T if self.transposed else weight
        return weight if dtype is None else weight.to(dtype)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
        """A plain linear with another weight, in the type of this one."""
        bias = self.bias if bias is None else bias
        out = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        out.weight = nn.Parameter(weight.to(self.dtype), requires_grad=False)
        if bias is not None:
            out.bias = nn.Parameter(bias.to(self.dtype).clone(), requires_grad=False)
        return out

    @property
    def dtype(self) -> torch.dtype:
        """The type that the stored matrix is used in."""
        return torch.float32 if self.packed is not None else self._weight.dtype


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Frozen) -> Tensor:
        ctx.base = base
        if base.packed is not None:
            return unpacked_linear(x, base.packed, base.bias)
        return nn.functional.linear(x, base.weight(x.dtype), base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.base.packed is None:
            return grad @ ctx.base.weight(grad.dtype), None
        total = grad.new_zeros(*grad.shape[:-1], ctx.base.in_features)
        for first, weight in ctx.base.packed.parts(AT_ONCE):
            total += grad[..., first : first + len(weight)] @ weight.to(grad.dtype)
        return total, None


def unpacked_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, W unpacked a few rows at a time: no more of it is in memory than a product needs to be fast."""
    parts = [nn.functional.linear(x, weight.to(x.dtype)) for _, weight in packed.parts(AT_ONCE)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if bias is None else y.add_(bias)


def product(x: Tensor, base: Frozen) -> Tensor:
    """`x W^T + b`; nothing is kept for the backward pass, which unpacks W again where it is packed."""
    call: Callable[..., Tensor] = _Product.apply
    return derived(call(x, base), product, x, base)


class Frame(nn.Module):
    """A frozen linear with something trained around it: it keeps the face of what it wraps.

    Subclasses give `forward`, and `merged` where that is possible.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base = module.requires_grad_(False)
        self.frozen = Frozen(module)
        self.in_features, self.out_features = self.frozen.in_features, self.frozen.out_features

    @property
    def weight(self) -> Tensor:
        """The matrix below, as it is without what is trained."""
        return self.frozen.weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias below."""
        return self.frozen.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        done = super()._apply(fn, recurse)
        self.frozen = Frozen(self.base)  # a cast or a move gives the module other tensors
        return done

    def delta(self) -> Tensor:
        """What training added to the matrix `[out, in]`, fp32."""
        raise NotImplementedError

    def factored(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The delta as A `[r, in]`, B `[out, r]` with its scale in it, and the rows' trained lengths; None where it is
        none.
        """
        return None

    def merged(self) -> nn.Module:
        """The plain linear of the same function."""
        return self.frozen.linear(self.frozen.weight().float() + self.delta())
