"""Weights that are not packed, as the compiled kernels hold them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense_weight(module: Any, weight: Tensor) -> Any:
    """The matrix `[out, in]` in the narrowest of bf16, fp16 and fp32 that holds it exactly.

    Args:
        module: the compiled kernels, of `native()`.
    """
    weight = weight.detach().contiguous()
    narrow = exact_type(weight)
    if narrow == torch.float32:
        return module.dense_fp32(weight.float().numpy())
    make = module.dense_bf16 if narrow == torch.bfloat16 else module.dense_fp16
    return make(weight.to(narrow).view(torch.uint16).numpy())


def exact_type(weight: Tensor) -> torch.dtype:
    """The narrowest of bf16, fp16 and fp32 that holds every value."""
    for kind in (torch.bfloat16, torch.float16):
        if weight.dtype == kind or torch.equal(weight.to(kind).to(weight.dtype), weight):
            return kind
    return torch.float32
