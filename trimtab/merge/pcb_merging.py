"""PCB-Merging: parameters compete within a task and between tasks, and the losers are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.method import Card, Merger
from trimtab.parts.merging import changes
from trimtab.parts.selection import count_for, kth_largest

TAIL = 1e-4  # share of the largest, and of the smallest, magnitudes that are clipped


@dataclass(frozen=True)
class PCBMerging(Merger):
    """Score entries by size within a task and agreement between tasks; drop low scores, and weight by the rest.

    beta_i = exp(n N(|d_i|)^2) * tanh(d_i * sum_j d_j), d_i = W_i - W_0, N onto [0, 1] over the tensor; what is below
    the `density` largest scores counts as that limit; s_i = N(beta_i); W = W_0 + lambda sum_i w_i s_i d_i / sum_i s_i.

    Args:
        density: r, the share of the scores that is kept (0.1).
        scale: lambda (1; the paper searches from 1 to 1.3).
        weight: w_i, one a parent (1).

    Reference: Du et al. 2024, arXiv:2410.02396, section 3, equations 2 to 6.
    Departures: scores are compared within each tensor and not over the whole model; where all scores of a tensor are
        equal, its changes are averaged.

    >>> import torch
    >>> base = torch.zeros(4)
    >>> one, two = torch.tensor([4.0, 0.1, 3.0, 0.0]), torch.tensor([4.0, 0.1, -3.0, 0.0])
    >>> PCBMerging(density=0.5).merge([one, two], base, weight=(1.0, 1.0), density=(0.5, 0.5)).round(decimals=3)
    tensor([4., 0., 0., 0.])
    """

    density: float = 0.1
    scale: float = 1.0
    weight: float = 1.0

    tiled: ClassVar[bool] = False

    card = Card(
        "pcb-merging",
        catalogue=(226,),
        paper="arXiv:2410.02396",
        claim="Above averaging, task arithmetic and TIES on several tasks, at the size of one model.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(
        self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...], density: tuple[float, ...]
    ) -> Tensor:
        """The base and the balanced mean of the changes."""
        vectors = changes(tensors, base)
        total = torch.stack(vectors).sum(0)
        numerator, divisor = torch.zeros_like(base), torch.zeros_like(base)
        for vector, w, share in zip(vectors, weight, density, strict=True):
            size = _clipped(vector.abs())
            score = (len(vectors) * _onto_unit(size).square()).exp() * (vector * total).tanh()
            flat = score.reshape(-1)
            least = flat.kthvalue(flat.numel() - count_for(share, flat.numel()) + 1).values
            balance = _onto_unit(score.clamp_min(least))
            numerator += w * balance * size.copysign(vector)
            divisor += balance
        return base + numerator.div_(divisor.clamp_min(1e-12)).mul_(self.scale)


def _clipped(size: Tensor) -> Tensor:
    count = size.numel()
    high = kth_largest(size, int(count * TAIL) + 1)
    low = kth_largest(size, count - int(count * TAIL))
    return size.clamp(low, high)


def _onto_unit(x: Tensor) -> Tensor:
    """From 0, the least, to 1, the largest; ones where all are equal."""
    low, high = x.amin(), x.amax()
    return (x - low) / (high - low) if high > low else torch.ones_like(x)
