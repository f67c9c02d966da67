"""Sparse MeZO: forward passes alone, along directions of the small weights alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Estimator
from trimtab.parts.perturbing import PIECE, Losses, along, bits, draw, slope, trained

SAMPLE = 1 << 14  # weights of a tensor that its threshold is found on


@dataclass(frozen=True)
class SparseMeZO(Estimator):
    """MeZO with z <- m z, m_i = [|w_i| <= h], h the quantile of |w| in its tensor below which a share of them lies.

    The mask is held as bits, an eighth of a byte a weight.

    Args:
        share: of the weights that are moved (0.25; paper: sparsity 0.75 to 0.8).
        eps: step to either side (1e-3).
        select: `small` (paper), or `random`: as many weights drawn once, its baseline.

    Raises:
        UserError: a share outside of 0 to 1, eps not above 0, or an unknown selection.

    Reference: Liu et al. 2024, arXiv:2402.15751, section 3 and algorithms 1 to 3.
    Departures: the threshold is of the current weights at each step, on a sample of them; the paper's is of the first.

    >>> model = nn.Linear(40, 1, bias=False)
    >>> losses = [lambda: model(torch.ones(2, 40)).sum(1)]
    >>> _, grads = SparseMeZO(share=0.25).estimate(model, losses, rng=torch.Generator().manual_seed(0))
    >>> int((dict(grads)["weight"] != 0).sum())
    10
    """

    share: float = 0.25
    eps: float = 1e-3
    select: Literal["small", "random"] = "small"

    streams: ClassVar[bool] = True
    card = Card(
        "sparse-mezo",
        catalogue=(311,),
        paper="arXiv:2402.15751",
        claim="MeZO's loss in fewer steps, along the small weights alone and in the memory of inference.",
        keeps=frozenset({"deterministic"}),
    )

    def estimate(
        self, model: nn.Module, losses: Losses, *, rng: torch.Generator
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients parameter by parameter."""
        if not 0 < self.share <= 1 or not self.eps > 0:
            raise UserError(
                f"sparse-mezo was asked for share={self.share} and eps={self.eps}; the share is above 0 up to 1, "
                "eps above 0"
            )
        if self.select not in ("small", "random"):
            raise UserError(f"sparse-mezo was asked for select={self.select!r}; it is 'small' or 'random'")
        named = trained(model)
        masks = [self._mask(param.detach(), i) for i, param in enumerate(named.values())]
        seed = draw(rng)
        model.eval()  # a loss must not hang on what dropout draws
        loss, steep = slope(losses, list(named.values()), seed, self.eps, masks)
        model.train()
        return loss, along(named, [(seed, steep)], masks)  # type: ignore[arg-type]

    def _mask(self, param: Tensor, place: int) -> Tensor:
        flat = param.view(-1)
        pieces = flat.split(PIECE)
        if self.select == "random":
            rng = torch.Generator().manual_seed(place)
            return torch.cat([bits(torch.rand(len(piece), generator=rng) < self.share) for piece in pieces])
        sample = flat[:: -(-len(flat) // SAMPLE)].abs().float()
        limit = sample.kthvalue(max(1, round(self.share * len(sample)))).values
        return torch.cat([bits(piece.abs() <= limit) for piece in pieces])
