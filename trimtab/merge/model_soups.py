"""Model soups: the mean of models that were tuned from one base with different settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.method import Card, Merger
from trimtab.parts.merging import average


@dataclass(frozen=True)
class ModelSoups(Merger):
    """The mean of the members: W = (1 / |S|) sum_{i in S} W_i.

    Uniform: S is all models. Greedy: models come in the order of their held-out score, and each stays in S if the
    soup with it scores no worse than the soup without; `parts.merging.greedy_members` finds S, and
    `trimtab merge --search` uses it.

    Args:
        weight: of a member; 0 leaves a model out (1).

    Raises:
        UserError: no model is left in.

    Reference: Wortsman et al. 2022, arXiv:2203.05482, section 2, recipe 1.
    Departures: none; the learned soup is not here.

    >>> import torch
    >>> ModelSoups().merge([torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([9.0])], None, weight=(1, 1, 0))
    tensor([2.])
    """

    weight: float = 1.0

    card = Card(
        "model-soups",
        catalogue=(273,),
        paper="arXiv:2203.05482",
        claim="A greedy soup is no worse than the best member on held-out data, and better on shifted data.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic", "symmetric"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor | None, *, weight: tuple[float, ...]) -> Tensor:
        """The mean of the members."""
        members = [(tensor, w) for tensor, w in zip(tensors, weight, strict=True) if w]
        return average([t for t, _ in members] or tensors, [w for _, w in members] or weight)
