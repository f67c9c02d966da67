"""Differentiable search: one network with all options of every choice of blocks, trained by steps in turns.

Half of the data trains the weights, half the votes. A search is of the blocks of `OneOf` alone; other choices of a
space stand at their largest.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Relaxer
from trimtab.parts.mixing import Node
from trimtab.parts.saving import Saver

NOTHING = "none"
"""Name of the option that gives nothing."""


@dataclass(frozen=True)
class Course:
    """How the network of all options is trained.

    Fields:
        steps: of the weights; after each, past the method's warm-up, one of the votes.
        batch: images a step.
        rate: largest of the weights, which falls along a half cosine; SGD with momentum 0.9, gradients clipped at 5.
        votes: rate of the votes; Adam with betas 0.5 and 0.999 and decay 1e-3.
        tune: steps after a choice has been fixed, at a tenth of the rate.
        seed: of the first weights, the order of the data and what is drawn.
    """

    steps: int = 200
    batch: int = 64
    rate: float = 0.05
    votes: float = 0.02
    tune: int = 5
    seed: int = 0


@dataclass
class Relaxed:
    """A network with all options, and its training so far.

    Fields:
        space: what is searched (`trimtab.space.Space`).
        method: how options are mixed and chosen.
        images, labels: the data, halved in its order.
        course: how it is trained.
        seconds: of each step, the weights' and the votes' together.
        saved_bytes: most kept for a backward pass, of a step of the weights and of one of the votes.
    """

    space: Any
    method: Relaxer
    images: Tensor
    labels: Tensor
    course: Course = Course()
    seconds: list[float] = field(default_factory=list)
    saved_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.course.seed)
        self.rng = torch.Generator().manual_seed(self.course.seed)
        self.votes: dict[str, Any] = {}
        self._made: list[tuple[str, nn.Module, Sequence[Callable[..., nn.Module]], tuple[Any, ...]]] = []
        self.network = self.space.mixed(self._mixed).train()
        if not self.votes:
            raise UserError(
                f"the space {self.space.name} has no choice of blocks; differentiable search takes those of OneOf, and "
                "other choices stand at their largest"
            )
        for knob in self.space.domain.knobs:
            if knob.name in self.votes and NOTHING in knob.options:
                self.votes[knob.name].nothing = knob.options.index(NOTHING)
        for node in self.network.modules():
            if isinstance(node, Node):
                beside: list[Any] = [edge.vote for edge in node.edges]
                for vote in beside:
                    vote.beside, vote.keep = beside, node.keep
        architecture = [p for vote in self.votes.values() for p in vote.architecture()]
        theirs = set(map(id, architecture))
        self.weights = [p for p in self.network.parameters() if id(p) not in theirs]
        self._sgd = torch.optim.SGD(self.weights, lr=self.course.rate, momentum=0.9, weight_decay=3e-4)
        self._adam = torch.optim.Adam(architecture, lr=self.course.votes, betas=(0.5, 0.999), weight_decay=1e-3)
        self._steps = 0
        self.costs = self._timed()
        self.plain = float(self.expected().detach())

    def _mixed(self, name: str, makers: Sequence[Callable[..., nn.Module]], given: tuple[Any, ...]) -> nn.Module:
        block = self.method.mix(makers, given, self.votes.get(name))
        self.votes.setdefault(name, block.vote)
        self._made.append((name, block, makers, given))
        return block

    def _timed(self) -> dict[str, Tensor]:
        """Seconds of every option of every choice, summed over the places where it stands, each by itself."""
        seen: dict[int, Tensor] = {}
        hooks = [b.register_forward_pre_hook(lambda m, x: seen.setdefault(id(m), x[0])) for _, b, _, _ in self._made]
        with torch.no_grad():
            self.network(self.images[: self.course.batch])
        for hook in hooks:
            hook.remove()
        found: dict[str, Tensor] = {}
        for name, block, makers, given in self._made:
            times = torch.tensor([_seconds(make(*given).eval(), seen[id(block)]) for make in makers])
            found[name] = found.get(name, 0) + times
        return found

    def expected(self) -> Tensor:
        """Seconds of the blocks as the votes stand, with a gradient for them."""
        return torch.stack([(vote.weights() * self.costs[name]).sum() for name, vote in self.votes.items()]).sum()

    def train(self) -> Relaxed:
        """All steps of the course."""
        quiet = round(self.method.warmup * self.course.steps)
        for step in range(self.course.steps):
            rate = self.course.rate * (1 + math.cos(math.pi * step / self.course.steps)) / 2
            self.step(rate, learning=step >= quiet)
        return self

    def step(self, rate: float, learning: bool) -> None:
        """One step of the weights, and with `learning` one of the votes."""
        start = time.process_time()
        self._weights_step(rate, learning)
        if learning and self.method.bilevel:
            self._votes_step()
        self.seconds.append(time.process_time() - start)
        self._steps += 1

    def _weights_step(self, rate: float, learning: bool) -> None:
        for vote in self.votes.values():
            vote.draw(self.rng, False)
        self._sgd.param_groups[0]["lr"] = rate
        joint = learning and not self.method.bilevel
        with Saver() as saver:
            loss = self.loss(self._batch(0))
            if joint:
                loss = self.method.weigh(loss, self.expected(), self.plain)
        self._keep("weights", saver.peak)
        self.network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 5.0)
        self._sgd.step()
        if joint:
            self._adam.step()

    def _votes_step(self) -> None:
        for vote in self.votes.values():
            vote.draw(self.rng, True)
        with Saver() as saver:
            loss = self.method.weigh(self.loss(self._batch(1)), self.expected(), self.plain)
        self._keep("votes", saver.peak)
        self.network.zero_grad()
        loss.backward()
        self._adam.step()
        for vote in self.votes.values():
            vote.settle()

    def _keep(self, what: str, peak: int) -> None:
        self.saved_bytes[what] = max(self.saved_bytes.get(what, 0), peak)

    def _batch(self, half: int) -> Tensor:
        """Places of a step's images in one half of the data."""
        size = len(self.labels) // 2
        return torch.randint(size, (self.course.batch,), generator=self.rng) + half * size

    def loss(self, places: Tensor) -> Tensor:
        """Mean cross-entropy of images."""
        return nn.functional.cross_entropy(self.network(self.images[places]), self.labels[places])

    def choose(self) -> Genome:
        """The genome that the method makes of the trained network."""
        given = {"harm": self.harm, "take": self.take, "rng": self.rng}
        chosen = self.method.choose(self.votes, **{name: given[name] for name in self.method.needs()})
        return self.genome(chosen)

    def genome(self, chosen: dict[str, int | None]) -> Genome:
        """Places of all choices, those of no option at the option called `none`."""
        places = []
        for knob, largest in zip(self.space.domain.knobs, self.space.domain.largest(), strict=True):
            place = chosen.get(knob.name, largest)
            if place is None:
                if NOTHING not in knob.options:
                    raise UserError(
                        f"the choice {knob.name} was to have no option and has none of that name; it may be "
                        f"{', '.join(map(str, knob.options))}: give it one called {NOTHING}"
                    )
                place = knob.options.index(NOTHING)
            places.append(place)
        return self.space.domain.canonical(places)

    def harm(self, name: str, place: int | None) -> float:
        """Mean loss on the votes' half without an option, or without all of a choice; norms see each batch alone."""
        vote = self.votes[name]
        kept = vote.kept.clone()
        vote.kept[slice(None) if place is None else place] = 0
        half = torch.arange(len(self.labels) // 2, len(self.labels))
        with torch.no_grad():
            found = [float(self.loss(part)) * len(part) for part in half.split(250)]
        vote.kept.copy_(kept)
        return sum(found) / len(half)

    def take(self, name: str, place: int | None) -> None:
        """Fix a choice in the network, and train on for a few steps."""
        vote = self.votes[name]
        keep = torch.zeros_like(vote.kept)
        if place is not None:
            keep[place] = 1 / vote.logits.detach().softmax(0)[place]
            vote.logits.requires_grad_(False)
        vote.kept.copy_(keep)
        for _ in range(self.course.tune):
            self.step(self.course.rate / 10, learning=True)


def _seconds(block: nn.Module, x: Tensor, repeats: int = 5) -> float:
    """Median processor seconds of a forward."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.process_time()
            block(x)
            times.append(time.process_time() - start)
    return statistics.median(times)
