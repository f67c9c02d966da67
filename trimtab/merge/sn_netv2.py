"""SN-Netv2: stitches both ways, routes drawn evenly over their costs, and stitches trained at low rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Joiner, Scene
from trimtab.merge.sn_net import depths, seams, stitched
from trimtab.parts.stitching import Leg, Route


@dataclass(frozen=True)
class SNNetv2(Joiner):
    """Stitch small to large and large to small, once or there and back; each S x = W x + b + B A x, W frozen.

    W and b are least squares as in SN-Net, A and B of rank r are trained, B from zero on. In a step of the training
    a share of the range of costs is drawn, each alike, and then a route among those whose cost lies in it.

    Args:
        rank: r (16); 0: W itself is trained, as in SN-Net.
        bins: how many shares the range of costs is cut into for `draw` (10); 1: every route alike, as in SN-Net.

    Reference: Pan et al. 2023, arXiv:2307.00154, sections 3.2 to 3.4.
    Departures: training is outside of this verb; b is trained along; the authors give the bins operations counted for
        each, here the weights that a state is multiplied with, `Stitched.cost`.

    >>> [[tuple(leg) for leg in route] for route in SNNetv2().routes(2, 2)]
    [[(0, 0, 2)], [(1, 0, 2)], [(0, 0, 1), (1, 1, 2)], [(1, 0, 1), (0, 1, 2)]]
    >>> rng = torch.Generator().manual_seed(0)
    >>> drawn = [SNNetv2(bins=2).draw([1, 1, 1, 1, 9], rng) for _ in range(1000)]
    >>> 0.4 < drawn.count(4) / 1000 < 0.6
    True
    """

    rank: int = 16
    bins: int = 10

    card = Card(
        "sn-netv2",
        catalogue=(72,),
        paper="arXiv:2307.00154",
        claim="Two ways give more models, drawing by cost evens out their quality, and low rank is steadier.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float"}),
        keeps=frozenset({"deterministic"}),
    )

    def routes(self, small: int, large: int) -> tuple[Route, ...]:
        """All routes, given how many blocks the anchors have: anchors, one change, then there and back."""
        place = {i: round(i * large / small) for i in range(1, small)}
        up = [(Leg(0, 0, i), Leg(1, j, large)) for i, j in place.items()]
        down = [(Leg(1, 0, j), Leg(0, i, small)) for i, j in place.items()]
        pairs = [(i, k) for i in place for k in place if i < k]
        back = [(Leg(1, 0, place[i]), Leg(0, i, k), Leg(1, place[k], large)) for i, k in pairs]
        forth = [(Leg(0, 0, i), Leg(1, place[i], place[k]), Leg(0, k, small)) for i, k in pairs]
        return ((Leg(0, 0, small),), (Leg(1, 0, large),), *up, *down, *back, *forth)

    def places(self, scenes: Sequence[Scene]) -> tuple[tuple[str, ...], ...]:
        """The blocks on both sides of every stitch.

        Raises:
            UserError: there are not two anchors with two blocks at least, or a rank or number of bins makes no sense.
        """
        if self.rank < 0 or self.bins < 1:
            raise UserError(
                f"sn-netv2 was given rank={self.rank} and bins={self.bins}; give ranks from 0, bins from 1 on"
            )
        return tuple(dict.fromkeys(seams(scenes, self.routes(*depths(scenes))).values()))

    def join(self, scenes: Sequence[Scene], *, moments: Mapping[tuple[str, ...], Tensor]) -> nn.Module:
        """The stitched anchors, on the small anchor; `Stitched.place` chooses another route."""
        return stitched(scenes, self.routes(*depths(scenes)), moments, self.rank)

    def draw(self, costs: Sequence[float], rng: torch.Generator) -> int:
        """The place of a route for the next step of a training, given the cost of each."""
        low, span = min(costs), max(max(costs) - min(costs), 1e-12)
        shares = [min(int((cost - low) / span * self.bins), self.bins - 1) for cost in costs]
        filled = sorted(set(shares))
        chosen = filled[int(torch.randint(len(filled), (), generator=rng))]
        inside = [i for i, share in enumerate(shares) if share == chosen]
        return inside[int(torch.randint(len(inside), (), generator=rng))]
