"""The column sweep: decide the columns of a weight in order, and let the columns to come make good each error.

GPTQ, SparseGPT, MR-GPTQ and vector quantisers are this one sweep with another rule for what may stand in a column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.core.errors import UserError

PANEL = 512  # columns of the factor of a gram that are worked out together
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
        weight, gram, place = weight[:, by], gram[by[:, None], by], by.tolist()

    m = _factor(gram, damp)
    diagonal = m.diagonal()
    d = 1 / diagonal
    span = span or cols
    run = span if span <= block else step  # a block holds whole runs, or else whole steps
    width = max(block // run * run, run)
    chosen, error = torch.empty_like(weight), torch.empty_like(weight)

    def compensated(j0: int, j1: int) -> tuple[Tensor, Tensor, Tensor]:
        """Columns `j0 .. j1` given all that was chosen before `j0`, and U and M of those columns."""
        above = m.columns(j0, j1)
        u = torch.linalg.solve_triangular(above[j0:], torch.eye(j1 - j0), upper=True)
        return weight[:, j0:j1] + (error[:, :j0] @ above[:j0]) @ u, u, above[j0:]

    j0 = 0
    while j0 < cols:
        j1 = min(j0 + width, cols, (j0 // span + 1) * span if span > width else cols)
        if begin and j0 % span == 0 and span > width:
            end = min(j0 + span, cols)
            begin(compensated(j0, end)[0], j0, d[j0:end])
        columns, u, triangle = compensated(j0, j1)
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
                scaled = missed.mul_(diagonal[j]) if k == 1 else triangle[i : i + k, i : i + k].t() @ missed
                now[i + k :].addmm_(u[i : i + k, i + k :].t(), scaled, alpha=-1)
        chosen[:, j0:j1] = stands.t()
        error[:, j0:j1] = weight[:, j0:j1] - chosen[:, j0:j1]
        j0 = j1

    if order == "activation":
        return torch.empty_like(chosen).index_copy_(1, by, chosen)
    return chosen


@dataclass(frozen=True)
class _Upper:
    """An upper triangular matrix as panels of neighbouring columns, each down to its own diagonal: half a square.

    Of 8,192 inputs the square takes 268 MB.
    """

    panels: tuple[Tensor, ...]

    def columns(self, a: int, b: int) -> Tensor:
        """Columns `a .. b`, down to row `b`."""
        found = []
        for panel in self.panels:
            last, width = panel.shape
            first = last - width
            if first < b and a < last:
                part = panel[:b, max(a - first, 0) : b - first]
                found.append(pad(part, (0, 0, 0, b - len(part))))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def diagonal(self) -> Tensor:
        """The diagonal."""
        return torch.cat([p[-p.shape[1] :].diagonal() for p in self.panels])


def _factor(gram: Tensor, damp: float) -> _Upper:
    """Upper triangular M with M M^T = gram + lambda I."""
    diagonal = gram.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise UserError("the gram is not finite: look for infinities in the activations of the calibration data")
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else torch.ones(())
    for _ in range(8):
        panels = []
        for start in range(0, len(gram), PANEL):
            panels.append(gram[: start + PANEL, start : start + PANEL].div(mean))
            edge = panels[-1][start:].diagonal()
            edge[dead[start : start + PANEL]] = 1.0
            edge += damp
        if _cholesky(panels):
            return _Upper(tuple(p.mul_(mean.sqrt()) for p in panels))
        damp = max(10 * damp, 1e-4)
    raise UserError(f"the gram is not positive definite, even damped by {damp / 10:g} times its mean diagonal")


def _cholesky(panels: list[Tensor]) -> bool:
    """Factor a symmetric matrix, of which the panels of the upper triangle are given, into M M^T, in place and from
    the last panel to the first; whether it was positive definite.
    """
    for i in reversed(range(len(panels))):
        panel = panels[i]
        start = len(panel) - panel.shape[1]
        corner, info = torch.linalg.cholesky_ex(panel[start:].flip(0, 1))
        if int(info) or not bool(corner.diagonal().isfinite().all()):
            return False
        panel[start:] = corner.flip(0, 1)  # read backwards, the lower triangular factor is the upper triangular one
        panel[:start] = torch.linalg.solve_triangular(panel[start:].t(), panel[:start], upper=False, left=False)
        for other in panels[:i]:
            rows = len(other)
            other.addmm_(panel[:rows], panel[rows - other.shape[1] : rows].t(), alpha=-1)
    return True
