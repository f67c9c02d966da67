"""Folding a norm's scale, a mean or a rotation of the residual into the weights around it, the function kept.

Shapes are those of `[out, in]` weights; a reader is a weight whose input is the norm's output, a writer one whose
output is added to the residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.parts.factors import top_eigenvectors


def fold_norm(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move a norm's scale g and shift s into a reader: W (g * x + s) + b = (W diag(g)) x + (b + W s).

    Args:
        weight: W `[out, in]`.
        bias: b `[out]` or None.
        scale: g `[in]`.
        shift: s `[in]`, or None where the norm has none.

    Returns:
        W diag(g), and b + W s (None where neither b nor s exists).

    >>> fold_norm(torch.ones(1, 2), None, torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]))
    (tensor([[2., 3.]]), tensor([2.]))
    """
    if shift is not None:
        moved = weight @ shift
        bias = moved if bias is None else bias + moved
    return weight * scale, bias


def centred(weight: Tensor, dim: int) -> Tensor:
    """Take the mean over one dimension away: what a layer norm would subtract is then never written into the residual.

    With every writer centred, LayerNorm(x) = RMSNorm(x) up to scale and shift, for the mean of x is zero.
    """
    return weight - weight.mean(dim, keepdim=True)


def normalised_moment(gram: Tensor, mean: Tensor | None, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Second moment of a norm's output before its scale and shift, from the second moment of what its readers see.

    y = g * z + s, so E[z z^T] = diag(g)^-1 (E[y y^T] - s E[y]^T - E[y] s^T + s s^T) diag(g)^-1. Where g is zero nothing
    of z can be seen, and its moment is taken as zero.

    Args:
        gram: E[y y^T] `[width, width]`.
        mean: E[y] `[width]`; needed where there is a shift.
        scale: g `[width]`.
        shift: s `[width]` or None.
    """
    moment = gram.double()
    if shift is not None:
        assert mean is not None, "a shift needs the mean"
        s, m = shift.double(), mean.double()
        cross = torch.outer(s, m)
        moment = moment - cross - cross.T + torch.outer(s, s)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale).double()
    return moment * torch.outer(inverse, inverse)


def principal_axes(moment: Tensor, damp: float = 0.01) -> Tensor:
    """Orthogonal Q `[width, width]`, double, whose columns are the principal axes of a second moment, strongest first.

    Args:
        moment: `[width, width]`, symmetric.
        damp: share of the mean diagonal added to the diagonal before the decomposition.
    """
    m = moment.double()
    m = (m + m.T) / 2
    return top_eigenvectors(m + damp * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype), len(m))


def least_squares_refit(weight: Tensor, gram: Tensor, keep: Tensor, damp: float = 0.01) -> Tensor:
    """The weight of the kept inputs that best gives the old outputs: V = W G[:, keep] G[keep, keep]^-1.

    V is the argmin of E |W x - V x_keep|^2.

    Args:
        weight: W `[out, in]`.
        gram: G = E[x x^T] `[in, in]`.
        keep: indices of the inputs that stay.
        damp: share of the mean diagonal of G[keep, keep] that pulls the kept columns towards their old values.

    Returns:
        V `[out, kept]` in the dtype of W.

    Reference: He et al. 2017, arXiv:1707.06168, section 3.1 (reconstruction step).
    """
    g, w = gram.double(), weight.double()
    inside = g[keep][:, keep]
    energy = inside.diagonal().mean()
    # The ridge is centred on the old columns, so that with nothing to learn from they stay as they are.
    ridge = damp * energy if energy > 0 else torch.ones_like(energy)
    target = w @ g[:, keep] + ridge * w[:, keep]
    inside = inside + ridge * torch.eye(len(keep), dtype=g.dtype)
    return torch.linalg.solve(inside, target.T).T.to(weight.dtype)
