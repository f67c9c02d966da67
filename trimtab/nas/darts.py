"""DARTS: all options at once, weighted by a softmax whose numbers are trained by gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trimtab.core.method import Card, Relaxer
from trimtab.parts.mixing import Vote, Weighted, strongest


@dataclass(frozen=True)
class DARTS(Relaxer):
    """o(x) = sum_i softmax(a)_i o_i(x); steps of the weights and of a alternate, and the largest a_i is taken.

    A node of a cell keeps the edges whose best option has the largest weight.

    Reference: Liu et al. 2018, arXiv:1806.09055, section 2, of first order.
    Departures: none.

    >>> import torch
    >>> mixed = DARTS().mix([nn.Identity, nn.ReLU], ())
    >>> float(mixed(torch.tensor([-1.0])).detach().round(decimals=2))
    -0.5
    """

    card = Card(
        "darts",
        paper="arXiv:1806.09055",
        claim="The baseline of differentiable search: better than the mean random architecture.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )

    def mix(self, makers: Sequence[Callable[..., nn.Module]], given: tuple[Any, ...], vote: Any = None) -> nn.Module:
        """All options, weighted."""
        return Weighted([make(*given) for make in makers], vote or Vote(len(makers)))

    def weigh(self, loss: Tensor, seconds: Tensor, plain: float) -> Tensor:
        """The loss."""
        return loss

    def choose(self, votes: Mapping[str, Any]) -> dict[str, int | None]:
        """The largest weights."""
        return strongest(votes)
