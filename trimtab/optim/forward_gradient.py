"""Forward gradient: the exact slope along a random direction, by forward-mode differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from trimtab.core.method import Card, Estimator
from trimtab.parts.perturbing import Losses, along, draw, shift, trained


@dataclass(frozen=True)
class ForwardGradient(Estimator):
    """g = (dL/dw . z) z, z standard normal: one forward pass with a tangent, no backward pass, and nothing is kept.

    Reference: Baydin et al. 2022, arXiv:2202.08587, algorithm 1; as in Zhang et al. 2024, arXiv:2402.11592 (ZO-Bench).
    Departures: attention runs as plain products, since its fused kernels know no tangents.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> losses = [lambda: model(torch.ones(2, 3)).square().sum(1)]
    >>> loss, grads = ForwardGradient().estimate(model, losses, rng=torch.Generator().manual_seed(0))
    >>> [name for name, _ in grads]
    ['weight']
    """

    streams: ClassVar[bool] = True
    card = Card(
        "forward-gradient",
        paper="arXiv:2202.08587",
        claim="An unbiased gradient from one forward pass, at twice the memory of inference.",
        keeps=frozenset({"deterministic"}),
    )

    def estimate(
        self, model: nn.Module, losses: Losses, *, rng: torch.Generator
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients parameter by parameter."""
        named, seed = trained(model), draw(rng)
        tangents = [torch.zeros_like(param.detach()) for param in named.values()]
        shift(tangents, seed, 1.0)
        values, slopes = [], []
        model.eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _dual(model, named, tangents):
            for part in losses:
                value, tangent = forward_ad.unpack_dual(part())
                values.append(value.detach())
                slopes.append(torch.zeros_like(values[-1]) if tangent is None else tangent.detach())
        model.train()
        del tangents
        found = [(seed, float(torch.cat(slopes).mean()))]
        return float(torch.cat(values).mean()), along(named, found)  # type: ignore[arg-type]


@contextmanager
def _dual(model: nn.Module, named: dict[str, nn.Parameter], tangents: Sequence[Tensor]) -> Iterator[None]:
    """Parameters with tangents for a while, each shared one with one tangent."""
    pairs = list(zip(named.values(), tangents, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what torch imports at its first tangent
        duals = {id(param): forward_ad.make_dual(param.detach(), tangent) for param, tangent in pairs}
    changed = []
    for module in model.modules():
        kept = dict(module._parameters)
        if any(id(param) in duals for param in kept.values()):
            changed.append((module, kept))
            for name, param in kept.items():
                if id(param) in duals:
                    del module._parameters[name]
                    setattr(module, name, duals[id(param)])
    try:
        yield
    finally:
        for module, kept in changed:
            for name, param in kept.items():
                if id(param) in duals:
                    delattr(module, name)
            module._parameters.clear()
            module._parameters.update(kept)
