"""A convolution whose weight stays packed: sparse levels on the kernels, everything else unpacked for each use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.level import NM, Sparse, rows_cols
from trimtab.formats.packed import Packed
from trimtab.kernels.native import native
from trimtab.kernels.sparse.pack import kept_of

SIZES = 4  # sizes of images for which the kernel's lists are kept; a network sees one or two


class PackedConv2d(nn.Module):
    """A `Conv2d` with a packed weight; zero padding only.

    Args:
        packed: the stored weight `[out, in / groups, kernel height, kernel width]`.
        like: the convolution that it stands for: its channels, kernel, stride, padding, dilation, groups and bias.

    Raises:
        ValueError: the padding is not a number of zeros.
    """

    bias: Tensor | None

    def __init__(self, packed: Packed, like: nn.Conv2d) -> None:
        super().__init__()
        if isinstance(like.padding, str) or like.padding_mode != "zeros":
            raise ValueError(f"padding {like.padding!r} of mode {like.padding_mode!r} is not a number of zeros")
        self.packed, self.channels, self.groups = packed, like.in_channels, like.groups
        self.kernel, self.stride = _pair(like.kernel_size), _pair(like.stride)
        self.padding, self.dilation = _pair(like.padding), _pair(like.dilation)
        shift = packed.bias()
        bias = None if like.bias is None else like.bias.detach()
        self.register_buffer("bias", bias if shift is None else shift if bias is None else bias + shift)
        self._kernels: dict[tuple[int, int], Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        """`x [images, in, height, width]` to `[images, out, height', width']`."""
        module = native()
        fits = x.dtype == torch.float32 and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())
        if module is None or not fits or not isinstance(self.packed.level, Sparse | NM):
            weight = self.packed.dense().to(x.device, x.dtype)
            return nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        size = (x.shape[2], x.shape[3])
        if size not in self._kernels:
            if len(self._kernels) >= SIZES:
                self._kernels.pop(next(iter(self._kernels)))
            self._kernels[size] = self._kernel(module, size)
        return torch.from_numpy(self._kernels[size].apply(x.detach().contiguous().numpy()))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": {}}  # a copy makes its own when it is used

    def _kernel(self, module: Any, size: tuple[int, int]) -> Any:
        mask, values = kept_of(self.packed)
        bits = np.packbits(mask.reshape(rows_cols(self.packed.shape)).numpy(), axis=1, bitorder="little")
        bias = None if self.bias is None else self.bias.float().contiguous().numpy()
        where = (self.kernel, self.stride, self.padding, self.dilation, size)
        return module.sparse_conv(bits, values.numpy().view(np.uint16), bias, self.channels, self.groups, *where)


def _pair(of: Any) -> tuple[int, int]:
    return (int(of[0]), int(of[1]))
