"""PC-DARTS: the options see some of the channels, and edges are weighed beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Relaxer
from trimtab.parts.mixing import Vote, Weighted, strongest


@dataclass(frozen=True)
class PCDARTS(Relaxer):
    """o(x) = softmax(b)_e shuffle[sum_i softmax(a)_i o_i(x_1), x_2], x_1 the first 1/K of the channels.

    The other channels go through, and all are shuffled, so that the next node's first 1/K are others: memory and time
    fall about K times. b weighs an edge beside the others of its node and moves less than a, which hangs on the
    channels that it saw; of an edge, softmax(b) softmax(a) decides.

    Args:
        share: K (paper: 4 for CIFAR-10).

    Reference: Xu et al. 2019, arXiv:1907.05737, section 3: partial channels, edge normalisation; votes stand still for
        the first 15 of 50 epochs.
    Departures: the options keep the image's size; blocks that halve it are no choice here.

    >>> mixed = PCDARTS(share=2).mix([lambda width: nn.Identity(), lambda width: nn.Conv2d(width, width, 1)], (8,))
    >>> mixed(torch.zeros(1, 8, 4, 4)).shape, [p.shape[0] for p in mixed.options.parameters()]
    (torch.Size([1, 8, 4, 4]), [4, 4])
    """

    share: int = 4

    card = Card(
        "pc-darts",
        catalogue=(85,),
        paper="arXiv:1907.05737",
        claim="Memory and time of a step fall well below DARTS's, and what is found is not worse.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )
    warmup: ClassVar[float] = 0.3

    def mix(self, makers: Sequence[Callable[..., nn.Module]], given: tuple[Any, ...], vote: Any = None) -> nn.Module:
        """All options on part of the channels.

        Raises:
            UserError: the options are not called with a number of channels that K divides.
        """
        if len(given) != 1 or not isinstance(given[0], int) or self.share < 1 or given[0] % self.share:
            raise UserError(
                f"pc-darts was asked for 1/{self.share} of the channels of options called with {given}; it takes "
                "options called with one number, the channels, which K divides"
            )
        some = given[0] // self.share
        vote = vote or Vote(len(makers))
        return Partial(Weighted([make(some) for make in makers], vote), some, self.share)

    def weigh(self, loss: Tensor, seconds: Tensor, plain: float) -> Tensor:
        """The loss."""
        return loss

    def choose(self, votes: Mapping[str, Any]) -> dict[str, int | None]:
        """The largest products of an edge's and an option's weight."""
        return strongest(votes, lambda vote, place: (vote.weights()[place] * vote.share()).item())


class Partial(nn.Module):
    """A mixture of the first channels, beside the others, see `PCDARTS`; it keeps the shape `[n, channels, h, w]`."""

    def __init__(self, mixed: Weighted, some: int, share: int) -> None:
        super().__init__()
        self.mixed, self.some, self.share, self.vote = mixed, some, share, mixed.vote

    @property
    def options(self) -> nn.ModuleList:
        """The options, on part of the channels."""
        return self.mixed.options

    def forward(self, x: Tensor) -> Tensor:
        """The mixed and the other channels, shuffled, by the edge's share of its node."""
        first, rest = x[:, : self.some], x[:, self.some :]
        y = torch.cat([self.mixed(first), rest], 1)
        return self.vote.share() * y.unflatten(1, (self.share, -1)).transpose(1, 2).flatten(1, 2)
