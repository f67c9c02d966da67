"""Hybrid steps: backward through the last blocks alone, forward passes for all that lies before them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Estimator
from trimtab.optim.mezo import blocks
from trimtab.parts.perturbing import Losses, along, draw, slope, trained


@dataclass(frozen=True)
class ZOHybrid(Estimator):
    """The gradient of the last k blocks and of what follows them by backward, which goes no deeper; MeZO's of the rest.

    Args:
        last: k (1).
        eps: step to either side of the rest (1e-3).
        gain: what the exact gradient is multiplied by (1): one rate serves both, and forward passes bear a far smaller.

    Raises:
        UserError: k below 1, or no block is left for forward passes; eps is not above 0.

    Reference: Zhang et al. 2024, arXiv:2402.11592 (ZO-Bench), section 5: hybrid training.
    Departures: the two gradients are of one batch and applied in one step. A tensor that is used before the last
        blocks too, as a tied embedding is, belongs to the rest.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    >>> losses = [lambda: model(torch.ones(2, 4)).square().sum(1)]
    >>> loss, grads = ZOHybrid().estimate(model, losses, rng=torch.Generator().manual_seed(0))
    >>> sorted(name for name, _ in grads)
    ['0.bias', '0.weight', '1.bias', '1.weight']
    """

    last: int = 1
    eps: float = 1e-3
    gain: float = 1.0

    streams: ClassVar[bool] = True
    card = Card(
        "zo-hybrid",
        paper="arXiv:2402.11592",
        claim="A short backward pass and a forward one do better than forward passes alone.",
        keeps=frozenset({"deterministic"}),
    )

    def estimate(
        self, model: nn.Module, losses: Losses, *, rng: torch.Generator
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients parameter by parameter."""
        named = trained(model)
        groups = [group for group in blocks(named) if _numbered(group)]
        if not self.eps > 0 or not 1 <= self.last < len(groups):
            raise UserError(
                f"zo-hybrid was asked for the last {self.last} blocks and eps={self.eps}; the model has {len(groups)} "
                f"blocks, of which 1 to {len(groups) - 1} can go through backward, and eps is above 0"
            )
        near = {name: param for group in groups[-self.last :] for name, param in group.items()}
        rest = {name: param for name, param in named.items() if name not in near}
        for param in rest.values():
            param.requires_grad_(False)
        try:
            parts = [part() for part in losses]
            mean = torch.cat(parts).mean()
            exact = torch.autograd.grad(mean, list(near.values()))
        finally:
            for param in rest.values():
                param.requires_grad_(True)
        loss = float(mean.detach())
        exact = tuple(grad.mul_(self.gain) for grad in exact)
        del parts, mean
        model.eval()  # a loss must not hang on what dropout draws
        seed = draw(rng)
        _, steep = slope(losses, list(rest.values()), seed, self.eps)
        model.train()
        return loss, _both(dict(zip(near, exact, strict=True)), rest, seed, steep)  # type: ignore[arg-type]


def _numbered(group: dict[str, Tensor]) -> bool:
    return any(part.isdigit() for part in next(iter(group)).split("."))


def _both(exact: dict[str, Tensor], rest: dict[str, Tensor], seed: int, steep: float) -> Iterable[tuple[str, Tensor]]:
    yield from along(rest, [(seed, steep)])
    yield from exact.items()
