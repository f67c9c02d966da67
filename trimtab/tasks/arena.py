"""What a search of blocks is worth: its network beside random ones of the same space, all trained alike from nothing.

Relative improvement is (accuracy - mean) / mean, the mean being that of random networks (Yang et al. 2020,
arXiv:1912.12522, section 3). The best of the random networks on images that are neither trained on nor tested is what a
search that only draws would hand over.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, partial
from random import Random
from typing import TYPE_CHECKING, Any

from trimtab.tasks.contest import Contest, photographs

if TYPE_CHECKING:
    from trimtab.core.knob import Genome
    from trimtab.engine.relaxing import Course, Relaxed

CHOOSING = 1000
"""Images that the search which only draws chooses on: the last of the training images, which no seed trains on."""

CELL = tuple((tuple(f"edge{i}{node}" for i in range(node)), 2) for node in (1, 2, 3))
"""Edges of the space `cell`, and how many a node keeps."""


@dataclass(frozen=True)
class Arena:
    """A space, and how its networks are trained.

    Fields:
        contest: data and training.
        name: of the space.
        edges: of each node, names of its edges' choices and how many a network has; () where there are no nodes.
        drawn: how many random networks there are.
        arguments: of the space's function.
    """

    contest: Contest
    name: str
    edges: tuple[tuple[tuple[str, ...], int], ...] = ()
    drawn: int = 5
    arguments: tuple[tuple[str, int], ...] = ()

    @cached_property
    def space(self) -> Any:
        """The space."""
        from trimtab.space import open_space

        return open_space(self.name, **dict(self.arguments))

    def random(self, rng: Random) -> Genome:
        """A network drawn evenly among those that a search may find: no node has other than its number of edges."""
        places = list(self.space.domain.random(rng))
        names = [knob.name for knob in self.space.domain.knobs]
        for edges, keep in self.edges:
            kept = rng.sample(edges, min(keep, len(edges)))
            for name in edges:
                knob = self.space.domain.knobs[names.index(name)]
                nothing = knob.options.index("none")
                some = [i for i in range(len(knob.options)) if i != nothing]
                places[names.index(name)] = rng.choice(some) if name in kept else nothing
        return self.space.domain.canonical(places)

    def accuracy(self, genome: Genome) -> float:
        """On test images, of a network trained from nothing."""
        return self.contest.accuracy(self.contest.train(lambda: self.space.network(genome)))

    @cached_property
    def randoms(self) -> list[tuple[Genome, float, float]]:
        """Random networks, each with its accuracy on the images to choose on and on the test images."""
        import torch

        rng, found = Random(self.contest.seed), []
        images, labels = photographs(self.contest.folder, "train", CHOOSING, 50_000 - CHOOSING)
        for _ in range(self.drawn):
            genome = self.random(rng)
            net = self.contest.train(partial(self.space.network, genome))
            with torch.no_grad():
                chosen = float((net(images).argmax(1) == labels).float().mean())
            found.append((genome, chosen, self.contest.accuracy(net)))
        return found

    def random_figures(self) -> dict[str, float]:
        """Mean accuracy of the random networks, and that of the one that drawing alone would hand over."""
        return {
            "random": sum(test for _, _, test in self.randoms) / len(self.randoms),
            "drawing": max(self.randoms, key=lambda found: found[1])[2],
        }

    def relaxed(self, method: Any, course: Course) -> Relaxed:
        """The network of all options, trained."""
        from trimtab.engine.relaxing import Relaxed

        images, labels = self.contest.data
        course = dataclasses.replace(course, seed=self.contest.seed)
        return Relaxed(self.space, method, images, labels, course).train()
