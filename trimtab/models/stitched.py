"""Networks stitched of two models, as artifacts: both configurations, the routes and the stitches, and no code."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.parts.stitching import Stitched

MOST = 1 << 12  # routes; more come from a damaged description


def describe(model: Stitched, configs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a manifest says of a stitched network under `stitched`.

    Args:
        configs: of its anchors.
    """
    made: dict[str, Any] = dict(model.stitches.items())
    stitches = {name: {"shape": list(stitch.weight.shape), "rank": stitch.rank} for name, stitch in made.items()}
    routes = [[list(leg) for leg in route] for route in model.routes]
    blocks = [list(paths) for paths in model.blocks]
    return {"anchors": configs, "blocks": blocks, "routes": routes, "stitches": stitches, "place": model.place}


def skeleton_of_stitched(said: Mapping[str, Any], where: str) -> Stitched:
    """The network that such a description makes, on the meta device.

    Raises:
        UserError: the description contradicts itself, or a configuration makes no model.
    """
    import torch

    from trimtab.models.source import skeleton_of
    from trimtab.parts.stitching import Leg, Stitch, Stitched, seam

    def damaged(what: str) -> UserError:
        return UserError(f"{where} is damaged: {what}; join the models again")

    try:
        anchors, routes = said["anchors"], [[tuple(leg) for leg in route] for route in said["routes"]]
        blocks = [[str(path) for path in paths] for paths in said["blocks"]]
        sizes = {str(k): (*v["shape"], v["rank"]) for k, v in said["stitches"].items()}
        place = said["place"]
    except (KeyError, TypeError, AttributeError):
        raise damaged("it does not say how its models are stitched") from None
    whole = [n for route in routes for leg in route for n in leg] + [n for size in sizes.values() for n in size]
    if len(anchors) != 2 or len(blocks) != 2 or not all(isinstance(a, dict) for a in anchors):
        raise damaged("a network is stitched of two models")
    if any(type(n) is not int or n < 0 for n in (*whole, place)) or not place < len(routes) <= MOST:
        raise damaged("its routes are no whole numbers from 0 on")
    models = [skeleton_of(config, where) for config in anchors]
    for model, paths in zip(models, blocks, strict=True):
        known = {name for name, _ in model.named_modules()}
        if lost := [path for path in paths if path not in known]:
            raise damaged(f"a model has no block {lost[0]!r}")
    legs = []
    for route in routes:
        if not route or any(len(n) != 3 or n[0] > 1 or not n[1] < n[2] <= len(blocks[n[0]]) for n in route):
            raise damaged(f"{route!r:.80} is no route through its blocks")
        legs.append(tuple(Leg(*n) for n in route))
        absent = {seam(a, b) for a, b in itertools.pairwise(legs[-1])} - set(sizes)
        if absent or any(a.stop >= len(blocks[a.anchor]) for a in legs[-1][:-1]):
            raise damaged(f"{route!r:.80} has no stitch, or ends behind all blocks")
    with torch.device("meta"):
        stitches = {
            name: Stitch(torch.empty(out, into), torch.empty(out), rank) for name, (out, into, rank) in sizes.items()
        }
    made = Stitched(models, blocks, legs, stitches)
    made.place = place
    return made.eval()
