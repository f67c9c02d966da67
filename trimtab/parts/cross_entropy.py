"""Cross-entropy over a large vocabulary in chunks: the logits are never there all at once, nor kept.

A dense head goes through the rows of the inputs in chunks. A packed one goes through its own rows, so that each is
unpacked but twice however many inputs there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from trimtab.core.level import rows_cols
from trimtab.formats.packed import Packed

IGNORED = -100
CHUNK = 1 << 25  # bytes of logits at a time: fewer rows make a product slower
AT_ONCE = 1 << 22  # weights of a packed head that are unpacked together, 16 MB


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
        ctx.save_for_backward(g_x, g_w, g_b, None if bool(keep.all()) else keep)
        return total / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g_x, g_w, g_b, keep = ctx.saved_tensors
        g_x = None if g_x is None else _spread(g_x * grad.to(g_x.dtype), keep, ctx.shape)
        return g_x, *(None if g is None else g * grad.to(g.dtype) for g in (g_w, g_b)), None, None


def _spread(rows: Tensor, keep: Tensor | None, shape: torch.Size) -> Tensor:
    """The rows at their places among those that count for nothing."""
    if keep is None:
        return rows.view(shape)
    whole = rows.new_zeros(shape)
    whole[keep] = rows
    return whole


class _PackedCrossEntropy(Function):
    """The sum of the exponentials in a first pass over the head's rows, the gradient of the inputs in a second one."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Packed, bias: Tensor | None, labels: Tensor, count: int | Tensor | None
    ) -> Tensor:
        keep = labels != IGNORED
        rows, wanted = hidden[keep], labels[keep]
        n = len(wanted) if count is None else count
        most = CHUNK // (4 * max(1, len(rows))) * rows_cols(head.shape)[1]

        def parts() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
            """Some rows of the head, the logits that they give, which labels are among them, and their places."""
            for first, part in head.parts(min(AT_ONCE, most)):
                weight, here = part.to(rows.dtype), (wanted >= first) & (wanted < first + len(part))
                shift = None if bias is None else bias[first : first + len(part)].to(rows.dtype)
                logits = torch.nn.functional.linear(rows, weight, shift).float()
                yield weight, logits, here, wanted[here] - first

        sums, chosen = rows.new_full((len(rows),), -math.inf, dtype=torch.float32), rows.new_zeros(len(rows)).float()
        for _, logits, here, place in parts():
            sums = torch.logaddexp(sums, logits.logsumexp(1))
            chosen[here] = logits[here, place]
        g_x = torch.zeros_like(rows) if ctx.needs_input_grad[0] else None
        if g_x is not None:
            for weight, logits, here, place in parts():
                shares = logits.sub_(sums[:, None]).exp_()
                shares[here, place] -= 1
                g_x.addmm_(shares.to(rows.dtype), weight)
            g_x.div_(n)
        ctx.shape = hidden.shape
        ctx.save_for_backward(g_x, None if bool(keep.all()) else keep)
        return (sums - chosen).sum() / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        g_x, keep = ctx.saved_tensors
        return _spread(g_x * grad.to(g_x.dtype), keep, ctx.shape), None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor | Packed, bias: Tensor | None, labels: Tensor, count: int | Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood of `labels` under the logits `hidden W^T + bias`.

    Args:
        hidden: `[n, width]`.
        weight: `[vocabulary, width]`; trained ones get their gradient too, packed ones and their bias have none.
        labels: `[n]`, -100 where nothing is to be predicted.
        count: what the sum is divided by; None: the labels that count.

    >>> h, w, y = torch.randn(9, 4), torch.randn(7, 4), torch.tensor([1, 2, -100, 0, 3, 6, 5, 4, 1])
    >>> plain = torch.nn.functional.cross_entropy(h @ w.T, y)
    >>> bool((chunked_cross_entropy(h, w, None, y) - plain).abs() < 1e-6)
    True
    """
    function = _PackedCrossEntropy if isinstance(weight, Packed) else _ChunkedCrossEntropy
    call: Callable[..., Tensor] = function.apply
    return call(hidden, weight, bias, labels, count)
