"""Ghost clipping: every example's gradient is clipped to a length, and none of them is ever there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Estimator
from trimtab.parts.ghost import Ghosts
from trimtab.parts.perturbing import Losses


@dataclass(frozen=True)
class GhostClipping(Estimator):
    """g = (sum_i min(1, C / |g_i|) g_i + sigma C z) / n, z standard normal: DP-SGD's gradient.

    A first backward pass gives |g_i| of each example from what every module reads and what comes back to it, a second
    one of the losses times their factors gives the sum.

    Args:
        limit: C (0.1).
        noise: sigma (0: clipping alone, and no privacy).

    Raises:
        UserError: C is not above 0, sigma is below 0, or a module mixes examples or is used twice in a pass.

    Reference: Li et al. 2022, arXiv:2110.05679, section 4 and appendix F.
    Departures: a matrix that embedding and head share is clipped exactly, with the product of its two gradients. Sigma
        is given, and no accountant of privacy is here.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(3, 1)
    >>> losses = [lambda: model(torch.ones(2, 1, 3)).square().sum((1, 2))]
    >>> loss, grads = GhostClipping(limit=0.5).estimate(model, losses, rng=torch.Generator().manual_seed(0))
    >>> round(float(torch.cat([g.flatten() for _, g in grads]).norm()), 4)
    0.5
    """

    limit: float = 0.1
    noise: float = 0.0

    card = Card(
        "ghost-clipping",
        catalogue=(262,),
        paper="arXiv:2110.05679",
        claim="The sum of clipped gradients of examples, at about the memory of plain training.",
        keeps=frozenset({"deterministic"}),
    )

    def estimate(
        self, model: nn.Module, losses: Losses, *, rng: torch.Generator
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients of all parameters."""
        if not self.limit > 0 or self.noise < 0:
            raise UserError(
                f"ghost-clipping was asked for limit={self.limit} and noise={self.noise}; the limit is above 0, "
                "the noise not below"
            )
        ghosts, total, count = Ghosts(model), 0.0, 0
        for part in losses:
            with ghosts.watching():
                values = part()
            first = next(p for p in model.parameters() if p.requires_grad)  # its gradient lies behind all others
            torch.autograd.grad(values.sum(), first, retain_graph=True)
            (values * (self.limit / ghosts.norms()).clamp_max(1.0)).sum().backward()
            total, count = total + float(values.detach().sum()), count + len(values)
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for grad in found.values():
            if self.noise:
                grad.add_(torch.randn(grad.shape, generator=rng), alpha=self.noise * self.limit)
            grad.div_(count)
        return total / count, found.items()
