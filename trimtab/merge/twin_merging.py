"""Twin-Merging: what all share as one model, and what is each one's own as a small residual that a router weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, TaskMerger
from trimtab.parts.merging import changes, combine


@dataclass(frozen=True)
class TwinMerging(TaskMerger):
    """The shared expert and the compressed residuals of the tasks, weighted as the router says of an input.

    W* = W_0 + lambda sum_t (W_t - W_0); v_t = SVD_r(W_t - W*); W(x) = W* + sum_t w_t(x) v_t, sum_t w_t = 1.

    Args:
        keep: the share of singular values that stays of a residual (0.1); vectors stay whole.
        scale: lambda of the shared expert (0.3).
        weight: w_t, one a parent, divided by their sum (1: all alike).

    Raises:
        UserError: the weights cancel out, or the share is not in (0, 1].

    Reference: Lu et al. 2024, arXiv:2406.15479, section 4, equations 3 to 5.
    Departures: the router is outside of this verb: it gives the weights, and a model is merged for them.

    >>> import torch
    >>> base, one, two = torch.zeros(4, 4), torch.eye(4), 2 * torch.eye(4)
    >>> TwinMerging(keep=1.0).merge([one, two], base, weight=(0.0, 1.0)).diagonal()
    tensor([2., 2., 2., 2.])
    """

    keep: float = 0.1
    scale: float = 0.3
    weight: float = 1.0

    tiled: ClassVar[bool] = False

    card = Card(
        "twin-merging",
        catalogue=(246,),
        paper="arXiv:2406.15479",
        claim="Shared model and routed residuals are above static merging, and near the tuned models.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...]) -> Tensor:
        """The shared expert and the weighted residuals."""
        if abs(whole := sum(weight)) < 1e-8:
            raise UserError(f"the weights {weight} add up to {whole:g}, and are divided by that; change one")
        shared = self.shared(tensors, base)
        result = shared.clone()
        for tensor, w in zip(tensors, weight, strict=True):
            if w:
                result.add_(_joined(self.residual(tensor - shared)).reshape(shared.shape), alpha=w / whole)
        return result

    def split(
        self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...]
    ) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The shared expert, and the residual of each task; the weights are those of `merge`."""
        shared = self.shared(tensors, base)
        return {"expert": shared}, [self.residual(tensor - shared) for tensor in tensors]

    def restore(self, base: None, shared: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Tensor:
        """The shared expert and one task's residual."""
        expert = shared["expert"]
        return expert + _joined(own).reshape(expert.shape)

    def shared(self, tensors: list[Tensor], base: Tensor) -> Tensor:
        """The shared expert W*."""
        if not 0 < self.keep <= 1:
            raise UserError(f"twin-merging was given keep={self.keep:g}; it is a share in (0, 1]")
        return base + combine(changes(tensors, base), (self.scale,) * len(tensors))

    def residual(self, own: Tensor) -> dict[str, Tensor]:
        """What is stored of a task's difference from the shared expert: thin factors, or all of it where they would not
        be smaller.
        """
        if own.dim() < 2 or self.keep >= 1 or not own.any():
            return {"whole": own}
        left, values, right = torch.linalg.svd(own.flatten(1), full_matrices=False)
        rank = max(1, int(self.keep * len(values)))
        factors = {"left": left[:, :rank] * values[:rank], "right": right[:rank]}
        small = sum(t.numel() for t in factors.values()) < own.numel()
        return factors if small else {"whole": _joined(factors).reshape(own.shape)}


def _joined(residual: Mapping[str, Tensor]) -> Tensor:
    return residual["whole"] if "whole" in residual else residual["left"] @ residual["right"]
