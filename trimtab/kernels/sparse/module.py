"""Linears and convolutions with sparse weights, on the kernels where those are at least as fast as torch.

Both compute in fp32. Where the kernels win is what docs/sparse-speed.md says of AVX-512; what it does not say is left
to torch, as is whatever is trained, compiled or moved to another device or type, and weights that were changed since
(but not through `.data`, where torch does not count changes).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.level import NM, Level, Sparse, rows_cols
from trimtab.formats.packed import Packed
from trimtab.kernels.native import native
from trimtab.kernels.sparse.pack import kept_of
from trimtab.kernels.weight import weight_of

SIZES = 4  # sizes of images for which the kernel's lists are kept; a network sees one or two
LEAST, OF_MANY = 0.5, 0.7  # zeros from which on the kernels win; the second in a convolution of several images
# Weights from which on a linear wins with 8 inputs or more, and with fewer: the page's matrices have more, and smaller
# ones were tried.
IN_CACHE, STREAMED = 1 << 16, 1 << 21


class SparseLinear(nn.Linear):
    """A linear with a sparse weight.

    Args:
        packed: the stored weight `[out, in]`.
        like: the linear that it stands for, whose parameters it takes over.
    """

    def __init__(self, packed: Packed, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, like.bias is not None, "meta")
        self.weight, self.bias = like.weight, like.bias
        self.packed, self.held = packed, _held(self)
        self._kernel: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`."""
        fast = _may(self, x) and self.pays(x.numel() // x.shape[-1])
        return self.on_kernels(x) if fast else super().forward(x)

    def pays(self, inputs: int) -> bool:
        """Whether the kernel is at least as fast as torch for so many inputs."""
        level, size = self.packed.level, self.weight.numel()
        if isinstance(level, NM):
            known, least = level.m == 4, IN_CACHE
        else:
            known, least = True, IN_CACHE if inputs >= 8 else STREAMED
        return known and size >= least and zeros(level) >= LEAST

    def on_kernels(self, x: Tensor) -> Tensor:
        """The same, in any case on the kernels."""
        if self._kernel is None:
            self._kernel = weight_of(native(), [self.packed])
        y = torch.from_numpy(self._kernel.apply(x.detach().reshape(-1, self.in_features).contiguous().numpy()))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y.add_(self.bias.detach())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": None}  # a copy makes its own when it is used


class SparseConv2d(nn.Conv2d):
    """A convolution with a sparse weight, padded by a number of zeros.

    Args:
        packed: the stored weight `[out, in / groups, kernel height, kernel width]`.
        like: the convolution that it stands for, whose parameters it takes over.
    """

    def __init__(self, packed: Packed, like: nn.Conv2d) -> None:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        shape: dict[str, Any] = {name: getattr(like, name) for name in names}
        super().__init__(**shape, bias=like.bias is not None, device="meta")
        self.weight, self.bias = like.weight, like.bias
        self.packed, self.held = packed, _held(self)
        self._kernels: dict[tuple[int, int], Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        """`x [images, in, height, width]` to `[images, out, height', width']`."""
        fast = x.ndim == 4 and _may(self, x) and self.pays(len(x))
        return self.on_kernels(x) if fast else super().forward(x)

    def pays(self, images: int) -> bool:
        """Whether the kernel is at least as fast as torch for so many images."""
        share = zeros(self.packed.level)
        many = share >= OF_MANY and max(self.kernel_size) > 1
        return self.groups == 1 and (share >= LEAST if images == 1 else many)

    def on_kernels(self, x: Tensor) -> Tensor:
        """The same, in any case on the kernels."""
        size = (x.shape[2], x.shape[3])
        if size not in self._kernels:
            if len(self._kernels) >= SIZES:
                self._kernels.pop(next(iter(self._kernels)))
            self._kernels[size] = self.kernel(native(), size)
        return torch.from_numpy(self._kernels[size].apply(x.detach().contiguous().numpy()))

    def kernel(self, module: Any, size: tuple[int, int]) -> Any:
        """What the compiled kernels hold for images of one height and width."""
        mask, values = kept_of(self.packed)
        bits = np.packbits(mask.reshape(rows_cols(self.packed.shape)).numpy(), axis=1, bitorder="little")
        bias = None if self.bias is None else self.bias.detach().float().contiguous().numpy()
        where = (self.kernel_size, self.stride, self.padding, self.dilation, size)
        return module.sparse_conv(bits, values.numpy().view(np.uint16), bias, self.in_channels, self.groups, *where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": {}}  # a copy makes its own when it is used


def stand_in(module: nn.Module, packed: Packed) -> nn.Module | None:
    """What may run this module, whose weight is sparse, on the kernels; None where it is of another kind."""
    if type(module) is nn.Linear:
        return SparseLinear(packed, module)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return SparseConv2d(packed, module)
    return None


def zeros(level: Level) -> float:
    """The share of weights that a sparse level does not keep."""
    assert isinstance(level, Sparse | NM)
    return level.ratio if isinstance(level, Sparse) else 1 - level.n / level.m


def _may(module: SparseLinear | SparseConv2d, x: Tensor) -> bool:
    """Whether the kernels compute what torch would: fp32 on the CPU, no gradients, and the weights as they were."""
    kernels, held = native(), [p for p, _ in module.held]
    same = _unchanged(module) and all(t.dtype == torch.float32 for t in (x, *held))
    here = type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *held))
    measured = kernels is not None and kernels.__name__.endswith(("_vnni", "_avx512"))
    return same and here and measured and not learns


def _held(module: nn.Linear | nn.Conv2d) -> list[tuple[Tensor, int]]:
    """Each parameter, and how often it was changed in place; an inference tensor does not count."""
    return [(p, 0 if p.is_inference() else p._version) for p in (module.weight, module.bias) if p is not None]


def _unchanged(module: SparseLinear | SparseConv2d) -> bool:
    found = _held(module)
    pairs = zip(module.held, found, strict=False)
    return len(found) == len(module.held) and all(p is q and then == now for (p, then), (q, now) in pairs)
