"""MeZO: fine-tuning with forward passes alone, in the memory of inference."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Estimator
from trimtab.parts.perturbing import Losses, along, draw, slope, trained


@dataclass(frozen=True)
class MeZO(Estimator):
    """g = mean over q directions of (L(w + eps z) - L(w - eps z)) / (2 eps) z, z standard normal, drawn from a seed.

    No z is kept: it is drawn anew for each of the four times that it is needed. The update rule makes of it ZO-SGD
    (`sgd`), its sign or momentum, or ZO-Adam (`adamw`).

    Args:
        eps: step to either side (1e-3).
        queries: q, directions of a step (1).
        blockwise: a direction for each block alone, with two losses of its own, in place of one for all.

    Raises:
        UserError: eps or q is not above 0.

    Reference: Malladi et al. 2023, arXiv:2305.17333, algorithm 1; block-wise, sign, momentum and Adam: Zhang et al.
        2024, arXiv:2402.11592 (ZO-Bench), sections 3 and 5.
    Departures: the blocks are those of the model, and what lies outside of them is one more; the paper splits modules.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    >>> losses = [lambda: model(x).square().sum(1)]
    >>> loss, grads = MeZO().estimate(model, losses, rng=torch.Generator().manual_seed(0))
    >>> [name for name, _ in grads], loss > 0
    (['weight'], True)
    """

    eps: float = 1e-3
    queries: int = 1
    blockwise: bool = False

    streams: ClassVar[bool] = True
    card = Card(
        "mezo",
        catalogue=(259,),
        paper="arXiv:2402.11592",
        claim="Fine-tuning with forward passes alone; block-wise and hybrid estimates do better for as many of them.",
        keeps=frozenset({"deterministic"}),
    )

    def estimate(
        self, model: nn.Module, losses: Losses, *, rng: torch.Generator
    ) -> tuple[float, Iterable[tuple[str, Tensor]]]:
        """The mean loss, and the gradients parameter by parameter."""
        if not self.eps > 0 or self.queries < 1:
            raise UserError(f"mezo was asked for eps={self.eps} and queries={self.queries}; both are above 0")
        named = trained(model)
        groups = blocks(named) if self.blockwise else [named]
        model.eval()  # a loss must not hang on what dropout draws
        means: list[float] = []
        found: list[tuple[dict[str, Any], list[tuple[int, float]]]] = []
        for group in groups:
            pairs = []
            for _ in range(self.queries):
                seed = draw(rng)
                mean, steep = slope(losses, list(group.values()), seed, self.eps)
                means.append(mean)
                pairs.append((seed, steep))
            found.append((group, pairs))
        model.train()
        return sum(means) / len(means), _each(found)


def _each(found: list[tuple[dict[str, Any], list[tuple[int, float]]]]) -> Iterator[tuple[str, Tensor]]:
    for group, pairs in found:
        yield from along(group, pairs)


def blocks(named: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters by the block that they lie in: the first number in their name tells; the rest is a group too.

    >>> [list(group) for group in blocks({"a.0.w": 1, "a.1.w": 2, "a.1.v": 3, "head.w": 4})]
    [['a.0.w'], ['a.1.w', 'a.1.v'], ['head.w']]
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, param in named.items():
        inside = re.match(r"(?:[^.]+\.)*?\d+\.", name)
        groups.setdefault(inside[0] if inside else "", {})[name] = param
    return list(groups.values())
