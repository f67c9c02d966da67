"""DARTS-PT: the option that the trained network misses most is taken, not the one with the largest number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.method import Card, Relaxer
from trimtab.parts.mixing import Vote, Weighted


@dataclass(frozen=True)
class DARTSPT(Relaxer):
    """Train as DARTS does; then, choice by choice in random order, take argmax_i L(without o_i), and train on a little.

    L is the loss on the votes' data of the network in which only that option is left out. Once every edge has its
    option, each node keeps the edges without which L is largest.

    Reference: Wang et al. 2021, arXiv:2108.04392, section 4, algorithm 1.
    Departures: the loss on the votes' data decides, rather than the accuracy, which many removals leave equal on few
        images.

    >>> mixed = DARTSPT().mix([nn.Identity, nn.ReLU], ())
    >>> harms = {0: 0.7, 1: 0.2, None: 0.9}
    >>> told = {"harm": lambda name, place: harms[place], "take": lambda name, place: None}
    >>> DARTSPT().choose({"edge": mixed.vote}, **told, rng=torch.Generator())
    {'edge': 0}
    """

    card = Card(
        "darts-pt",
        catalogue=(118,),
        paper="arXiv:2108.04392",
        claim="Of one trained network, what it misses most makes a better architecture than what has the largest "
        "number, with fewer skips.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )

    def mix(self, makers: Sequence[Callable[..., nn.Module]], given: tuple[Any, ...], vote: Any = None) -> nn.Module:
        """All options, weighted as DARTS does."""
        return Weighted([make(*given) for make in makers], vote or Vote(len(makers)))

    def weigh(self, loss: Tensor, seconds: Tensor, plain: float) -> Tensor:
        """The loss."""
        return loss

    def choose(
        self, votes: Mapping[str, Any], *, harm: Callable[..., float], take: Callable[..., None], rng: torch.Generator
    ) -> dict[str, int | None]:
        """What each choice misses most, and then the edges that each node misses most."""
        names = list(votes)
        chosen: dict[str, int | None] = {}
        for i in torch.randperm(len(names), generator=rng).tolist():
            vote = votes[names[i]]
            places = [p for p in range(len(vote.kept)) if p != vote.nothing]
            chosen[names[i]] = max(places, key=lambda place: harm(names[i], place))
            take(names[i], chosen[names[i]])
        named = {id(vote): name for name, vote in votes.items()}
        for node in {tuple(map(id, vote.beside)): vote for vote in votes.values()}.values():
            edges = sorted((named[id(vote)] for vote in node.beside), key=lambda name: harm(name, None))
            for name in edges[: len(edges) - node.keep]:
                chosen[name] = None
                take(name, None)
        return chosen
