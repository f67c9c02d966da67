"""SN-Net: a small and a large trained model stitched together, block by block, into many models between the two."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Joiner, Scene
from trimtab.parts.stitching import Leg, Route, Stitch, Stitched, least_squares, seam


@dataclass(frozen=True)
class SNNet(Joiner):
    """Begin in the small anchor, go over to the large one: F = H_b . B_b[m:] . S . B_a[:l], S the best linear map.

    S x = W x + b is the least-squares map from what block l of the small anchor reads to what block m of the large
    one reads, m = round(l depth_b / depth_a), for l from 1 to depth_a - 1. The routes are the small anchor, the
    stitched ones by falling l, and the large anchor: from cheap to dear. Then all are trained together, a route a step.

    Reference: Pan et al. 2023, arXiv:2302.06586, sections 3.2 and 3.3.
    Departures: training is outside of this verb; one stitch a place, where the authors share some between neighbouring
        places (a sliding window of two blocks); two anchors.

    >>> [[tuple(leg) for leg in route] for route in SNNet().routes(2, 4)]
    [[(0, 0, 2)], [(0, 0, 1), (1, 2, 4)], [(1, 0, 4)]]
    """

    card = Card(
        "sn-net",
        catalogue=(57,),
        paper="arXiv:2302.06586",
        claim="Stitched models lie between their anchors, and least squares are a better start than random maps.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float"}),
        keeps=frozenset({"deterministic"}),
    )

    def routes(self, small: int, large: int) -> tuple[Route, ...]:
        """All routes, given how many blocks the anchors have."""
        inner = [(Leg(0, 0, i), Leg(1, round(i * large / small), large)) for i in range(small - 1, 0, -1)]
        return ((Leg(0, 0, small),), *inner, (Leg(1, 0, large),))

    def places(self, scenes: Sequence[Scene]) -> tuple[tuple[str, ...], ...]:
        """The blocks on both sides of every stitch.

        Raises:
            UserError: there are not two anchors with two blocks at least, and a state of one width.
        """
        return tuple(seams(scenes, self.routes(*depths(scenes))).values())

    def join(self, scenes: Sequence[Scene], *, moments: Mapping[tuple[str, ...], Tensor]) -> nn.Module:
        """The stitched anchors, on the smallest route; `Stitched.place` chooses another."""
        return stitched(scenes, self.routes(*depths(scenes)), moments)


def depths(scenes: Sequence[Scene]) -> tuple[int, int]:
    """How many blocks the small and the large anchor have."""
    counts = [len(scene.modelmap.blocks) for scene in scenes]
    if len(counts) != 2 or min(counts) < 2 or counts[0] > counts[1]:
        said = ", ".join(map(str, counts))
        raise UserError(
            f"models of {said} blocks were to be stitched; give two, of two blocks at least, the smaller first"
        )
    if any(scene.modelmap.residual is None for scene in scenes):
        raise UserError(
            "a model whose state changes its width from block to block was to be stitched; give transformers"
        )
    return counts[0], counts[1]


def seams(scenes: Sequence[Scene], routes: Sequence[Route]) -> dict[str, tuple[str, ...]]:
    """For each stitch the blocks that it leads from and to, the first anchor's first."""
    found = {}
    for route in routes:
        for one, other in itertools.pairwise(route):
            pair = {one.anchor: one.stop, other.anchor: other.start}
            found[seam(one, other)] = tuple(scenes[a].modelmap.blocks[pair[a]] for a in (0, 1))
    return found


def stitched(
    scenes: Sequence[Scene], routes: Sequence[Route], moments: Mapping[tuple[str, ...], Tensor], rank: int = 0
) -> Stitched:
    """Anchors with a least-squares stitch for every change of anchor on the routes."""
    stitches = {}
    for name, places in seams(scenes, routes).items():
        joint, width = moments[places], scenes[0].modelmap.residual.width
        if name.startswith("1_"):  # from the second anchor to the first: the two change places
            order = [*range(width, len(joint) - 1), *range(width), len(joint) - 1]
            joint, width = joint[order][:, order], len(joint) - 1 - width
        stitches[name] = Stitch(*least_squares(joint, width), rank)
    return Stitched([s.model for s in scenes], [s.modelmap.blocks for s in scenes], routes, stitches)
