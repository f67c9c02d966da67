"""ProxylessNAS: one path of all is there at a time, two while the votes learn, and seconds are part of the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trimtab.core.method import Card, Relaxer
from trimtab.parts.mixing import Vote, strongest


@dataclass(frozen=True)
class ProxylessNAS(Relaxer):
    """o(x) = g_i o_i(x) + g_j o_j(x), g binary: one path in a step of the weights, two drawn by p in one of the votes.

    Of the two one is open, drawn by p renormalised over the pair; the gradient of the closed gate is that of a small
    opening, <dL/do, o_j(x)>, whose output needs no gradient of its own. dL/da_i = sum_j dL/dg_j p_j (d_ij - p_i) over
    the pair, and after the step the pair is shifted so that all other options keep their probability. The votes
    minimise CE + l E[seconds] / E_0, with E[seconds] = sum_i p_i t_i over the blocks and E_0 its value at the start.

    Args:
        latency: l; 0 for none.

    Reference: Cai et al. 2018, arXiv:1812.00332, sections 3.2 (binarised paths) and 3.3 (latency), equations 3 to 6.
    Departures: seconds are measured of every option on this machine rather than predicted by a model; they are over
        their value at the start, so that l has no unit. The votes stand still for the first third of the steps, where
        the paper trains the weights for 40 epochs before.

    >>> mixed = ProxylessNAS().mix([nn.Identity, nn.ReLU], ())
    >>> mixed.vote.draw(torch.Generator().manual_seed(0), learning=True)
    >>> len(mixed.vote.drawn), float(mixed(torch.ones(())).detach())
    (2, 1.0)
    """

    latency: float = 0.0

    card = Card(
        "proxylessnas",
        catalogue=(60,),
        paper="arXiv:1812.00332",
        claim="Memory of a step stays near that of one path as options are added, and a larger weight of latency "
        "finds faster networks.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"block"}),
    )
    warmup: ClassVar[float] = 1 / 3

    def mix(self, makers: Sequence[Callable[..., nn.Module]], given: tuple[Any, ...], vote: Any = None) -> nn.Module:
        """One or two options at a time."""
        return Gated([make(*given) for make in makers], vote or Gates(len(makers)))

    def weigh(self, loss: Tensor, seconds: Tensor, plain: float) -> Tensor:
        """The loss and the expected seconds."""
        return loss + self.latency * seconds / plain

    def choose(self, votes: Mapping[str, Any]) -> dict[str, int | None]:
        """The most probable paths."""
        return strongest(votes)


class Gates(Vote):
    """A vote of which paths are drawn, see `ProxylessNAS`."""

    before: Tensor

    def draw(self, rng: torch.Generator, learning: bool) -> None:
        """One path, or two with the open one first."""
        p = self.weights().detach()
        count = 2 if learning and len(p) > 1 else 1
        pair = torch.multinomial(p, count, generator=rng)
        if count == 2:
            first = int(torch.multinomial(p[pair], 1, generator=rng))
            pair = pair[[first, 1 - first]]
        self.drawn = tuple(pair.tolist())
        self.before = self.logits.detach().clone()

    def gates(self) -> Tensor:
        """1 for the open and 0 for the closed path, with the gradient of the pair's probabilities."""
        p = self.logits[list(self.drawn)].softmax(0)
        hard = torch.zeros_like(p)
        hard[0] = 1
        return hard + p - p.detach()

    def settle(self) -> None:
        """Give the other options their probability back."""
        pair = list(self.drawn)
        with torch.no_grad():
            self.logits[pair] += self.before[pair].logsumexp(0) - self.logits[pair].logsumexp(0)


class Gated(nn.Module):
    """Options of which the drawn ones are computed, see `ProxylessNAS`."""

    def __init__(self, options: Sequence[nn.Module], vote: Gates) -> None:
        super().__init__()
        self.options, self.vote = nn.ModuleList(options), vote

    def forward(self, x: Tensor) -> Tensor:
        """The open path's output."""
        drawn = self.vote.drawn or (int(self.vote.weights().argmax()),)
        out = self.options[drawn[0]](x)
        if len(drawn) == 1:
            return out
        gates = self.vote.gates()
        with torch.no_grad():
            closed = self.options[drawn[1]](x)
        return gates[0] * out + gates[1] * closed
