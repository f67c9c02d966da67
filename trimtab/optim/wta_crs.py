"""WTA-CRS: a linear keeps a share of its input rows for the backward pass, the largest surely and others by chance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Estimator
from trimtab.parts.perturbing import Losses
from trimtab.parts.row_sampling import sampled


@dataclass(frozen=True)
class WTACRS(Estimator):
    """G_W = sum over kept rows of s_i g_i x_i^T, an unbiased estimate of sum_i g_i x_i^T from k of n rows.

    p_i = |x_i| / sum |x|. The c rows of largest p are kept with s = 1; of the others k - c are drawn with replacement
    in proportion to p, with s_i = (1 - P_c) / ((k - c) p_i), P_c being the sum of the c largest; c has the least
    (1 - P_c) / (k - c). The gradient that goes on to the inputs is exact.

    Args:
        share: k / n (0.3).
        winners: keep the largest surely; without, every row is drawn (plain column-row sampling, the baseline).

    Raises:
        UserError: a share outside of above 0 to 1.

    Reference: Liu et al. 2023, arXiv:2305.15265, section 3.2 and theorems 1 to 3.
    Departures: p hangs on the rows of x alone; the authors multiply by the norms of the rows of g that the same item
        had an epoch before. Linears that read one tensor keep the same rows of it once.

    >>> model = nn.Linear(8, 2)
    >>> losses = [lambda: model(torch.ones(5, 8)).sum(1)]
    >>> loss, grads = WTACRS(share=1.0).estimate(model, losses, rng=torch.Generator().manual_seed(0))
    >>> [name for name, _ in grads]
    ['weight', 'bias']
    """

    share: float = 0.3
    winners: bool = True

    card = Card(
        "wta-crs",
        catalogue=(378,),
        paper="arXiv:2305.15265",
        claim="Unbiased gradients of less variance than plain sampling, from a share of the kept inputs.",
        keeps=frozenset({"deterministic"}),
    )

    def estimate(
        self, model: nn.Module, losses: Losses, *, rng: torch.Generator
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients of all parameters."""
        if not 0 < self.share <= 1:
            raise UserError(f"wta-crs was asked to keep a share of {self.share} of the rows; it is above 0 up to 1")
        total, count = 0.0, 0
        for part in losses:
            with sampled(model, self.share, self.winners, rng):
                values = part()
            values.sum().backward()
            total, count = total + float(values.detach().sum()), count + len(values)
        found = {name: p.grad.div_(count) for name, p in model.named_parameters() if p.grad is not None}
        return total / count, found.items()
