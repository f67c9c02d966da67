"""The column sweep: decide the columns of a weight in order, and let the columns to come make good each error.

GPTQ, SparseGPT, MR-GPTQ and vector quantisers are this one sweep with another rule for what may stand in a column.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import UserError

Choose = Callable[[Tensor, int, Tensor], Tensor]
Begin = Callable[[Tensor, int, Tensor], None]


def obs_sweep(
    weight: Tensor,
    gram: Tensor,
    choose: Choose,
    *,
    begin: Begin | None = None,
    span: int | None = None,
    step: int = 1,
    damp: float = 0.01,
    block: int = 128,
    order: Literal["activation"] | None = None,
) -> Tensor:
    """Replace the columns of a weight one by one, each time moving the columns to come to the least output error.

    With H = gram + lambda I, H^-1 = U^T U (U upper triangular) and q_j what `choose` puts in place of column w_j:
    W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:]. With `step` columns J at a time the division is by the triangle U[J, J].

    H^-1 is never formed. H = M M^T with M upper triangular gives U = M^-1; the columns B of a block, compensated for
    all columns before it, are W_B + (W - Q)[:, :B] M[:B, B] M[B, B]^-1, so that each block costs one matrix product,
    and only a block's own triangle is inverted.

    Args:
        weight: `[out, in]`.
        gram: X^T X / n, `[in, in]`.
        choose: `(columns [out, k], j, u [k, k]) -> values [out, k]`: what stands in the columns from j on, given their
            compensated values and U[J, J]; k is `step`, less at the end of the row.
        begin: `(columns [out, k], j, d [k]) -> None`, called before each run of `span` columns is swept, with their
            compensated values and d = diag(U): where a method fits the grid of a group or picks the mask of a block.
            The last run may be short.
        span: columns of such a run; all of them when None.
        step: columns that are decided together; divides `span`.
        damp: lambda as a share of the mean diagonal of the gram, over inputs that were ever non-zero. If H is not
            positive definite even so, lambda is raised tenfold until it is.
        block: columns that are compensated one by one; the others wait for the end of the block. It changes speed, not
            results.
        order: `"activation"` takes the columns with the largest diagonal of the gram first; `j` is still the column's
            place in `weight`. Wants `step` 1 and no `begin`.

    Returns:
        The chosen values `[out, in]`. Inputs that are always zero (dead columns) get a diagonal of the mean and are
        compensated by none.

    Raises:
        UserError: the gram holds values that are not finite, or no damping makes it positive definite.

    >>> weight, x = torch.tensor([[0.6, 0.6]]), torch.tensor([[1.0, 1.0], [1.0, 0.9]])
    >>> obs_sweep(weight, x.T @ x / 2, lambda columns, j, u: columns.round())
    tensor([[1., 0.]])
    """
    assert (span or step) % step == 0, "a run must hold whole steps"
    assert order is None or (step == 1 and begin is None), "a permuted sweep has no runs of neighbours"
    weight, gram = weight.float(), gram.float()
    cols = weight.shape[1]
    place = list(range(cols))
    if order == "activation":
        by = gram.diagonal().argsort(descending=True, stable=True)
        weight, gram, place = weight[:, by], gram[by][:, by], by.tolist()

    m = _factor(gram, damp)
    d = 1 / m.diagonal()
    span = span or cols
    run = span if span <= block else step  # a block holds whole runs, or else whole steps
    width = max(block // run * run, run)
    chosen, error = torch.empty_like(weight), torch.empty_like(weight)

    def compensated(j0: int, j1: int) -> tuple[Tensor, Tensor]:
        """Columns `j0 .. j1` given all that was chosen before `j0`, and U of those columns."""
        eye = torch.eye(j1 - j0)
        u = torch.linalg.solve_triangular(m[j0:j1, j0:j1], eye, upper=True)
        return weight[:, j0:j1] + (error[:, :j0] @ m[:j0, j0:j1]) @ u, u

    j0 = 0
    while j0 < cols:
        j1 = min(j0 + width, cols, (j0 // span + 1) * span if span > width else cols)
        if begin and j0 % span == 0 and span > width:
            end = min(j0 + span, cols)
            begin(compensated(j0, end)[0], j0, d[j0:end])
        columns, u = compensated(j0, j1)
        now = columns.t().contiguous()  # a column a row: what the loop below touches lies together
        stands = torch.empty_like(now)
        for i in range(0, j1 - j0, step):
            j, k = j0 + i, min(step, j1 - j0 - i)
            if begin and j % span == 0 and span <= width:
                end = min(i + span, j1 - j0)
                begin(now[i:end].t(), j, d[j : j0 + end])
            here = now[i : i + k]
            value = choose(here.t(), place[j], u[i : i + k, i : i + k]).t()
            stands[i : i + k] = value
            if i + k < j1 - j0:
                missed = here - value
                # (w - q) U[J, J]^-1 = (w - q) M[J, J]
                scaled = missed.mul_(m[j, j]) if k == 1 else m[j : j + k, j : j + k].t() @ missed
                now[i + k :].addmm_(u[i : i + k, i + k :].t(), scaled, alpha=-1)
        chosen[:, j0:j1] = stands.t()
        error[:, j0:j1] = weight[:, j0:j1] - chosen[:, j0:j1]
        j0 = j1

    if order == "activation":
        return torch.empty_like(chosen).index_copy_(1, by, chosen)
    return chosen


def _factor(gram: Tensor, damp: float) -> Tensor:
    """Upper triangular M with M M^T = gram + lambda I: the Cholesky factor of the matrix read backwards."""
    diagonal = gram.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise UserError("the gram is not finite: look for infinities in the activations of the calibration data")
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones(())
    for _ in range(8):
        h = _flip(gram.div(mean))
        edge = h.diagonal()
        edge[dead.flip(0)] = 1.0
        edge += damp
        factor, info = torch.linalg.cholesky_ex(h)
        del h
        if int(info) == 0 and bool(factor.diagonal().isfinite().all()):
            return _flip(factor).mul_(mean.sqrt())
        damp = max(10 * damp, 1e-4)
    raise UserError(f"the gram is not positive definite, even damped by {damp / 10:g} times its mean diagonal")


def _flip(matrix: Tensor) -> Tensor:
    """Read a square matrix backwards, in place: a gram of 8,192 inputs and each copy of it take 268 MB."""
    n = len(matrix)
    for a in range(0, n // 2, 256):
        b = min(a + 256, n // 2)
        top = matrix[a:b].flip(0, 1)
        matrix[a:b] = matrix[n - b : n - a].flip(0, 1)
        matrix[n - b : n - a] = top
    if n % 2:
        matrix[n // 2] = matrix[n // 2].flip(0)
    return matrix
