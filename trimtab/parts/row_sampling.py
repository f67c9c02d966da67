"""Products whose backward pass sees a sample of their input's rows: the matrix's gradient is right in the mean."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def chosen(norms: Tensor, keep: int, winners: bool, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places of the rows to keep `[keep]`, and what each is multiplied by.

    Args:
        norms: a number for each row, to whose share the row is drawn.
        winners: the largest are kept surely, as many as make the variance least.

    >>> places, scale = chosen(torch.tensor([5.0, 1.0, 1.0, 1.0]), 2, True, torch.Generator().manual_seed(0))
    >>> int(places[0]), float(scale[0]), round(float(scale[1]), 3)
    (0, 1.0, 3.0)
    """
    share = norms.double().clamp_min(1e-30)
    share = share / share.sum()
    if keep >= len(share):
        return torch.arange(len(share)), torch.ones(len(share))
    ranked, order = share.sort(descending=True, stable=True)
    sure = 0
    if winners:
        left = 1 - torch.cat((ranked.new_zeros(1), ranked[: keep - 1].cumsum(0)))
        sure = int((left / torch.arange(keep, 0, -1)).argmin())
    rest = ranked[sure:]
    drawn = torch.multinomial(rest, keep - sure, replacement=True, generator=rng)
    scale = rest.sum() / ((keep - sure) * rest[drawn])
    return torch.cat((order[:sure], order[sure:][drawn])), torch.cat((scale.new_ones(sure), scale)).float()


class _Sampled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, places: Tensor) -> Tensor:
        ctx.bias = bias is not None
        ctx.save_for_backward(rows, places, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, places, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        g_x = grad @ weight if ctx.needs_input_grad[0] else None
        g_w = flat[places].T @ rows if ctx.needs_input_grad[1] else None
        return g_x, g_w, flat.sum(0) if ctx.bias else None, None, None


class _Sampler:
    """Draws rows of an input, once for all linears that read it."""

    def __init__(self, share: float, winners: bool, rng: torch.Generator) -> None:
        self.share, self.winners, self.rng = share, winners, rng
        self._of: Any = lambda: None
        self._version, self._kept = -1, (torch.empty(0), torch.empty(0))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._of() is not x or self._version != x._version:
            flat = x.detach().reshape(-1, x.shape[-1])
            keep = max(1, round(self.share * len(flat)))
            places, scale = chosen(flat.float().norm(dim=1), keep, self.winners, self.rng)
            self._kept = (flat[places] * scale[:, None].to(flat.dtype), places.int())
            self._of, self._version = weakref.ref(x), x._version
        return self._kept


def _forward(module: nn.Linear, sampler: _Sampler, x: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and module.weight.requires_grad):
        return nn.functional.linear(x, module.weight, module.bias)
    rows, places = sampler.rows(x)
    out: Tensor = _Sampled.apply(x, module.weight, module.bias, rows, places)
    return out


@contextmanager
def sampled(model: nn.Module, share: float, winners: bool, rng: torch.Generator) -> Iterator[None]:
    """Have the linears of a model keep a share of their inputs' rows, but for those whose weight an embedding shares
    and those whose forward is replaced.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sampler = _Sampler(share, winners, rng)
    found = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear) and id(m.weight) not in shared and "forward" not in vars(m)
    ]
    for module in found:
        module.forward = partial(_forward, module, sampler)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in found:
            del module.forward
