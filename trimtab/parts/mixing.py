"""Choices among blocks as numbers with gradients: votes, the blocks that stand for all options, and what is chosen.

A vote is shared by all places of a network where the same choice stands. `trimtab.core.method.Relaxer` says what the
engine calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

INITIAL = 1e-3
"""Deviation of the votes at the start."""


class Node(nn.Module):
    """A sum over several blocks, each of its own input: a node of a cell, and its edges.

    Args:
        edges: the blocks, in the order of their inputs.
        keep: how many of them a network that was chosen has; the others give nothing.
    """

    def __init__(self, edges: Sequence[nn.Module], keep: int) -> None:
        super().__init__()
        self.edges, self.keep = nn.ModuleList(edges), keep

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The sum, of inputs of one shape."""
        return torch.stack([edge(x) for edge, x in zip(self.edges, inputs, strict=True)]).sum(0)


class Vote(nn.Module):
    """p = softmax(a), a number a_i for each option; options that were taken out have none of it.

    Fields:
        kept: 1 for each option that is there, `[options]`.
        edge: b, what an edge is worth beside the others of its node.
        beside: votes of the edges of the same node, its own among them; the engine tells.
        keep: how many of these a chosen network has; the engine tells.
        nothing: place of the option that gives nothing, or None; the engine tells.
        drawn: places that the next passes go through, the one that counts first; () for all.
    """

    kept: Tensor

    def __init__(self, options: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(INITIAL * torch.randn(options))
        self.edge = nn.Parameter(INITIAL * torch.randn(()))
        self.register_buffer("kept", torch.ones(options))
        self.beside: list[Vote] = [self]
        self.keep = 1
        self.nothing: int | None = None
        self.drawn: tuple[int, ...] = ()

    def architecture(self) -> list[nn.Parameter]:
        """Its parameters."""
        return [self.logits, self.edge]

    def weights(self) -> Tensor:
        """p, `[options]`."""
        return self.logits.softmax(0) * self.kept

    def share(self) -> Tensor:
        """Of the node, softmax(b) over its edges."""
        return torch.stack([vote.edge for vote in self.beside]).softmax(0)[self.beside.index(self)]

    def draw(self, rng: torch.Generator, learning: bool) -> None:
        """Nothing is drawn."""

    def settle(self) -> None:
        """Nothing is to be done."""


class Weighted(nn.Module):
    """sum_i p_i o_i(x) over all options, each as its own network would have it."""

    def __init__(self, options: Sequence[nn.Module], vote: Vote) -> None:
        super().__init__()
        self.options, self.vote = nn.ModuleList(options), vote

    def forward(self, x: Tensor) -> Tensor:
        """The mixed output; options that were taken out are not computed."""
        weights = self.vote.weights()
        there = [i for i, kept in enumerate(self.vote.kept.tolist()) if kept]
        parts = [weights[i] * self.options[i](x) for i in there]
        return torch.stack(parts).sum(0) if parts else self.options[0](x) * 0


def best_option(vote: Vote, weights: Sequence[float]) -> int:
    """The place with the largest weight, of those that give something."""
    places = [i for i in range(len(weights)) if i != vote.nothing] or [0]
    return max(places, key=lambda i: weights[i])


def strongest(
    votes: Mapping[str, Vote], strength: Callable[[Vote, int], float] = lambda vote, place: vote.weights()[place].item()
) -> dict[str, int | None]:
    """The best option of every choice; of a node with more edges than it keeps, those whose best option is strongest.

    Args:
        votes: by name.
        strength: of an option of a vote.
    """
    chosen: dict[str, int | None] = {}
    found: dict[int, float] = {}
    for name, vote in votes.items():
        weights = [strength(vote, i) for i in range(len(vote.logits))]
        place = best_option(vote, weights)
        chosen[name], found[id(vote)] = place, weights[place]
    for name, vote in votes.items():
        better = sum(found[id(other)] > found[id(vote)] for other in vote.beside)
        if better >= vote.keep:
            chosen[name] = None
    return chosen
