"""Composable sparse fine-tuning: the few weights that change most are tuned alone, and such changes add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Merger
from trimtab.parts.merging import combine, kept


@dataclass(frozen=True)
class ComposableSFT(Merger):
    """Add sparse changes to the base: W = W_0 + sum_i w_i m_i (W_i - W_0).

    LT-SFT makes a parent in two trainings: the base is tuned whole, `mask` marks the k weights of the model that
    changed most, and the base is tuned again, these weights alone. Such a parent's change is sparse as it is, and m_i
    is 1 everywhere (`density` 1). For a parent that was tuned whole, m_i is 1 at the `density` largest changes of a
    tensor.

    Args:
        density: share of each parent's changes that is added (1).
        weight: w_i, one a parent (1).

    Reference: Ansell et al. 2022, arXiv:2110.07560, sections 3.1 and 3.2, algorithm 1.
    Departures: training is outside of this verb, and is that of one round; the L1 penalty of the authors on the
        change is left out.

    >>> base, language, task = torch.zeros(3), torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.5, 0.0, 3.0])
    >>> ComposableSFT().merge([language, task], base, weight=(1.0, 1.0), threshold=(0.0, 0.0))
    tensor([2.5000, 0.0000, 3.0000])
    >>> ComposableSFT().mask({"w": base}, {"w": task}, 1)
    {'w': tensor([False, False,  True])}
    """

    density: float = 1.0
    weight: float = 1.0

    card = Card(
        "composable-sft",
        catalogue=(62,),
        paper="arXiv:2110.07560",
        claim="The sparse changes of a task and a domain add up, and clash less than whole ones.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(
        self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...], threshold: tuple[float, ...]
    ) -> Tensor:
        """The base and the sum of the sparse changes."""
        changes = [kept(tensor - base, least) for tensor, least in zip(tensors, threshold, strict=True)]
        return base + combine(changes, weight)

    def mask(self, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """Where the `count` largest changes of a whole model lie, which the second training may touch.

        Raises:
            UserError: there are not so many weights.
        """
        sizes = torch.cat([(tuned[name] - base[name]).abs().flatten() for name in base])
        if not 1 <= count <= len(sizes):
            raise UserError(
                f"{count} weights were to be tuned; give a number from 1 to {len(sizes)}, as many as there are"
            )
        marked = torch.zeros(len(sizes), dtype=torch.bool)
        marked[sizes.topk(count).indices] = True
        parts = marked.split([t.numel() for t in base.values()])
        return {name: part.reshape(t.shape) for (name, t), part in zip(base.items(), parts, strict=True)}
