"""LoRA: a frozen matrix and two trained thin factors; rsLoRA is its field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frozen
from trimtab.parts.lowrank_delta import LowRank, gaussian, rank_of, scale_of


@dataclass(frozen=True)
class LoRA(Wrapper):
    """h = W0 x + s B A x, with A random, B zero at first, and s = alpha / r; W0 stays as it is.

    A `[r, in]` and B `[out, r]` are trained; r is the level.

    Args:
        alpha: scale of the product, divided by r or its root (paper: the first r that is tried).
        scaling: `rank` divides alpha by r (LoRA); `root` by sqrt(r), so that a larger r does not learn more slowly
            (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2).

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4.1, equation 3.
    Departures: A is drawn as the authors' code draws it (uniform, within 1/sqrt(in)); the paper says Gaussian. No
        dropout.

    >>> from trimtab.core.level import Rank
    >>> layer = nn.Linear(32, 16)
    >>> wrapped = LoRA().wrap(layer, Rank(4), rng=torch.Generator().manual_seed(0))
    >>> x = torch.randn(3, 32)
    >>> bool(torch.allclose(wrapped(x), layer(x), atol=1e-6)), sum(p.numel() for p in (wrapped.a, wrapped.b))
    (True, 192)
    """

    alpha: float = 16.0
    scaling: Literal["rank", "root"] = "rank"

    card = Card(
        "lora",
        paper="arXiv:2106.09685",
        claim="The baseline: a trained model's quality on other data comes near full fine-tuning's at a share of its "
        "trained bytes.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear with a low-rank delta of the level's rank.

        Raises:
            UserError: the level is no rank or above the matrix's, or a field has an unknown value.
        """
        rank, base = rank_of("lora", level, module), Frozen(module)
        a = gaussian(rank, base.in_features, rng)
        return LowRank(module, a, torch.zeros(base.out_features, rank), scale_of(self.alpha, rank, self.scaling))
