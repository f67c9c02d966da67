"""A packed weight whose stored numbers are trained: scales, kept values, factors, codewords; codes and places stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.formats.packed import Packed
from trimtab.parts.saving import cheap


def movable(packed: Packed) -> tuple[str, ...]:
    """Names of the stored tensors that can be trained: those of 16-bit numbers, but for a bias."""
    return tuple(k for k, t in packed.tensors.items() if t.dtype == torch.float16 and not k.endswith("bias"))


class _Dense(Function):
    """The weight in fp32; only the trained numbers are kept, and it is unpacked again for their gradients."""

    @staticmethod
    def forward(ctx: Any, moving: Moving, *changes: Tensor) -> Tensor:
        ctx.moving = moving
        ctx.save_for_backward(*changes)
        return moving.packed_at(changes).dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        moving: Moving = ctx.moving
        held = [t.detach().requires_grad_(True) for t in moving.numbers(ctx.saved_tensors).values()]
        with torch.enable_grad():
            dense = moving.with_numbers(dict(zip(moving.names, held, strict=True))).dense()
        grads = torch.autograd.grad(dense, held, grad)
        return None, *(g * moving.unit(name) for name, g in zip(moving.names, grads, strict=True))


class Moving(nn.Module):
    """A module with a packed weight, of which what is stored in 16 bits is trained.

    What is trained is each number's change: of scales relative to the scale, of all else relative to the tensor's root
    mean square, so that one rate suits all. The forward pass uses the numbers as 16 bits hold them, past which the
    gradient goes; what is packed afterwards is, bit for bit, what was trained.

    Args:
        module: a linear or convolution in fp32, with the weight that `packed` stands for.
        packed: the weight.
        transposed: the module stores it as `[in, out]`.
    """

    def __init__(self, module: nn.Module, packed: Packed, transposed: bool = False) -> None:
        super().__init__()
        self.module, self.stored, self.transposed = module.requires_grad_(False), packed, transposed
        self.names = movable(packed)
        self.changes = nn.ParameterList([nn.Parameter(torch.zeros(packed.tensors[n].shape)) for n in self.names])

    def unit(self, name: str) -> Tensor:
        """What a change of 1 adds to the numbers of that name."""
        start = self.stored.tensors[name].float()
        return start if name == "scale" else start.square().mean().sqrt()

    def numbers(self, changes: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        """The trained numbers as 16 bits hold them, fp32."""
        pairs = zip(self.names, changes, strict=True)
        whole = {n: self.stored.tensors[n].float() + self.unit(n) * c.detach().float() for n, c in pairs}
        if "scale" in whole:
            whole["scale"] = whole["scale"].clamp_min(2.0**-24)
        return {n: t.clamp(-65504.0, 65504.0).half().float() for n, t in whole.items()}

    def with_numbers(self, numbers: Mapping[str, Tensor]) -> Packed:
        """The packed weight with other numbers."""
        return Packed(self.stored.level, self.stored.shape, {**self.stored.tensors, **numbers})

    def packed_at(self, changes: tuple[Tensor, ...]) -> Packed:
        """The packed weight after these changes, its numbers in fp32."""
        return self.with_numbers(self.numbers(changes))

    @torch.no_grad()
    def packed(self) -> Packed:
        """The weight as it is stored now."""
        numbers = self.numbers(tuple(self.changes))
        return self.with_numbers({n: t.half() for n, t in numbers.items()})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with the weight as it is now."""
        dense = _dense(self, *self.changes)
        weight = (dense.T if self.transposed else dense).reshape(self.module.get_parameter("weight").shape)
        return torch.func.functional_call(self.module, {"weight": weight}, args, kwargs)


def _dense(moving: Moving, *changes: Tensor) -> Tensor:
    call: Callable[..., Tensor] = _Dense.apply
    return cheap(call(moving, *changes), _dense, moving, *changes)
