"""Conservative zeroth-order steps: one is taken only where the loss says that it helps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Estimator
from trimtab.parts.perturbing import Losses, along, draw, mean_loss, shift, slope, trained


@dataclass(frozen=True)
class ZOConservative(Estimator):
    """g = s MeZO's g, with s of 1, 0 and -1 the one whose step w - rate s g has the least loss on the batch.

    It takes two more losses, and one at w.

    Args:
        eps: step to either side (1e-3).

    Raises:
        UserError: eps is not above 0.

    Reference: Zhang et al. 2024, arXiv:2402.11592 (ZO-Bench), section 3: ZO-SGD-Cons.
    Departures: none; the step that is tried is that of plain `sgd`.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> losses = [lambda: model(torch.ones(2, 3)).square().sum(1)]
    >>> loss, grads = ZOConservative().estimate(model, losses, rng=torch.Generator().manual_seed(0), rate=1e-3)
    >>> [name for name, _ in grads]
    ['weight']
    """

    eps: float = 1e-3

    streams: ClassVar[bool] = True
    card = Card(
        "zo-conservative",
        paper="arXiv:2402.11592",
        claim="A zeroth-order step that makes the batch's loss worse is not taken.",
        keeps=frozenset({"deterministic"}),
    )

    def estimate(
        self, model: nn.Module, losses: Losses, *, rng: torch.Generator, rate: float
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients parameter by parameter."""
        if not self.eps > 0:
            raise UserError(f"zo-conservative was asked for eps={self.eps}; it is above 0")
        named, seed = trained(model), draw(rng)
        params = list(named.values())
        model.eval()  # a loss must not hang on what dropout draws
        loss = mean_loss(losses)
        _, steep = slope(losses, params, seed, self.eps)
        shift(params, seed, -rate * steep)
        down = mean_loss(losses)
        shift(params, seed, 2 * rate * steep)
        up = mean_loss(losses)
        shift(params, seed, -rate * steep)
        model.train()
        sign = min((down, 1.0), (loss, 0.0), (up, -1.0))[1]
        return loss, along(named, [(seed, sign * steep)])  # type: ignore[arg-type]
