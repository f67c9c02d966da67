"""DARE: drop most of what the parents changed at random, and rescale the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.method import Card, Merger
from trimtab.parts.merging import coin, combine


@dataclass(frozen=True)
class DARE(Merger):
    """Keep each entry of a task vector with probability 1 - p and divide it by 1 - p, then add the vectors up.

    tau_i = m_i (W_i - W_0) / (1 - p), m_i Bernoulli(1 - p); W = W_0 + lambda sum_i w_i tau_i.

    Args:
        density: 1 - p, the share of a task vector that stays (0.1: the paper drops 90 % and more).
        scale: lambda (1).
        weight: w_i, one a parent (1).
        rescale: divide what stays by 1 - p; else the drop shortens the vectors.
        elect: elect signs as TIES does and leave out what disagrees.
        normalise: divide by the weights that went in.

    Reference: Yu et al. 2023, arXiv:2311.03099, section 3.2.
    Departures: probabilities are rounded to 16 bits.

    >>> import torch
    >>> base, one = torch.zeros(10_000), torch.ones(10_000)
    >>> rng = (torch.Generator().manual_seed(0),)
    >>> merged = DARE().merge([one], base, weight=(1.0,), density=(0.1,), rng=rng)
    >>> merged.unique().tolist(), abs(float(merged.mean()) - 1) < 0.1
    ([0.0, 10.0], True)
    """

    density: float = 0.1
    scale: float = 1.0
    weight: float = 1.0
    rescale: bool = True
    elect: bool = False
    normalise: bool = False

    card = Card(
        "dare",
        paper="arXiv:2311.03099",
        claim="A baseline: nine tenths of a task vector can be dropped at random, the rest rescaled.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(
        self,
        tensors: list[Tensor],
        base: Tensor,
        *,
        weight: tuple[float, ...],
        density: tuple[float, ...],
        rng: tuple[torch.Generator, ...],
    ) -> Tensor:
        """The base and the weighted sum of the thinned changes."""
        thinned = [
            (tensor - base).mul_(coin(base.shape, share, generator)).div_(share if self.rescale else 1.0)
            for tensor, share, generator in zip(tensors, density, rng, strict=True)
        ]
        return base + combine(thinned, weight, elect=self.elect, normalise=self.normalise).mul_(self.scale)
