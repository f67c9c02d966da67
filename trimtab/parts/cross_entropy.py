"""Cross-entropy over a large vocabulary in chunks: the logits are never there all at once, nor kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

IGNORED = -100
CHUNK = 1 << 25  # bytes of logits at a time: fewer rows make a product slower


class _ChunkedCrossEntropy(Function):
    """The gradient of the inputs is worked out with the loss, so that neither logits nor inputs are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, count: Tensor | None
    ) -> Tensor:
        keep = labels != IGNORED
        rows, wanted = hidden[keep], labels[keep]
        n = len(wanted) if count is None else count
        wants_x, wants_w, wants_b = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=torch.float32)
        g_x = torch.empty_like(rows) if wants_x else None
        g_w = torch.zeros_like(weight) if wants_w else None
        g_b = torch.zeros_like(bias) if wants_b and bias is not None else None
        matrix = weight.T
        step = max(64, CHUNK // (4 * len(weight)))
        for i in range(0, len(wanted), step):
            x, y = rows[i : i + step], wanted[i : i + step, None]
            logits = (x @ matrix if bias is None else torch.addmm(bias, x, matrix)).float()
            top = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, y) - top
            powers = logits.sub_(top).exp_()
            sums = powers.sum(1, keepdim=True)
            total += (sums.log() - chosen).sum()
            # softmax less the label's one, with the division and the difference made in the small product
            powers = powers.to(x.dtype)
            if g_x is not None:
                torch.mm(powers, weight, out=g_x[i : i + step])
                g_x[i : i + step].div_(sums.to(x.dtype)).sub_(weight[y[:, 0]])
            if g_w is not None:
                g_w.addmm_(powers.T, x / sums.to(x.dtype)).index_add_(0, y[:, 0], x, alpha=-1)
            if g_b is not None:
                g_b += (powers / sums.to(x.dtype)).sum(0)
                g_b.index_add_(0, y[:, 0], torch.ones_like(y[:, 0], dtype=g_b.dtype), alpha=-1)
        for g in (g_x, g_w, g_b):
            if g is not None:
                g.div_(n)
        ctx.shape = hidden.shape
        whole = bool(keep.all())
        ctx.save_for_backward(g_x, g_w, g_b, None if whole else keep)
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g_x, g_w, g_b, keep = ctx.saved_tensors
        if g_x is not None:
            if keep is not None:
                spread = g_x.new_zeros(ctx.shape)
                spread[keep] = g_x
                g_x = spread
            g_x = (g_x * grad.to(g_x.dtype)).view(ctx.shape)
        return g_x, *(None if g is None else g * grad.to(g.dtype) for g in (g_w, g_b)), None, None


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, count: int | Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood of `labels` under the logits `hidden W^T + bias`.

    Args:
        hidden: `[n, width]`.
        weight: `[vocabulary, width]`; trained ones get their gradient too.
        labels: `[n]`, -100 where nothing is to be predicted.
        count: what the sum is divided by; None: the labels that count.

    >>> h, w, y = torch.randn(9, 4), torch.randn(7, 4), torch.tensor([1, 2, -100, 0, 3, 6, 5, 4, 1])
    >>> plain = torch.nn.functional.cross_entropy(h @ w.T, y)
    >>> bool((chunked_cross_entropy(h, w, None, y) - plain).abs() < 1e-6)
    True
    """
    call: Callable[..., Tensor] = _ChunkedCrossEntropy.apply
    return call(hidden, weight, bias, labels, count)
