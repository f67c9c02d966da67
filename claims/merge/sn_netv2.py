"""SN-Netv2: two ways give more models, drawing by cost evens out their quality, and low rank is steadier."""

from __future__ import annotations

import copy
from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.engine.joining import Batch, join
from trimtab.merge.sn_net import SNNet
from trimtab.merge.sn_netv2 import SNNetv2
from trimtab.parts.stitching import Stitched
from trimtab.tasks import domains as d
from trimtab.tasks.anchors import accuracies, small_anchor, train

CLAIM = Claim(
    method="sn-netv2",
    statement="Stitching both ways gives more than twice the models of one way; trained for ten epochs in the new "
    "domain, routes drawn by cost end more even over their costs than routes drawn alike, and stitches of low rank "
    "end above stitches that are trained whole.",
    source="Pan et al. 2023, arXiv:2307.00154, sections 3 and 4.3",
    setting="The shipped image transformer (4 blocks, 64 wide) and one of 3 blocks, 24 wide, trained for 15 epochs on "
    "a quarter of the digits; least squares from 256 training images; ten epochs, a route a step; 300 test images.",
    metric="accuracy, mean over routes; spread: largest less smallest mean accuracy of four shares of the costs",
    checks=(
        Check("two ways give more than twice the models", "share_of_models", ">", 2.0),
        Check("drawn by cost, accuracy is more even over costs", "spread", "<", "spread_alike"),
        Check("stitches of low rank are above stitches trained whole", "mean", ">", "mean_whole"),
        Check("the worst model is better with stitches of low rank", "worst", ">", "worst_whole"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one small anchor and three joint trainings."""
    lab.hashes |= {"pocket-vit": d.base_hash()}
    small, images = small_anchor(seed), d.data("plain", "train")[0]
    batches: list[Batch] = [{"pixel_values": part} for part in images[:256].split(128)]

    def trained(method: SNNetv2) -> tuple[list[float], list[int]]:
        model = join(method, [copy.deepcopy(small), copy.deepcopy(d.base_model()).requires_grad_(True)], batches)
        assert isinstance(model, Stitched)
        rng, costs = torch.Generator().manual_seed(seed), [model.cost(i) for i in range(len(model.routes))]
        train(model, seed, 10, 3e-4, lambda: method.draw(costs, rng))
        return accuracies(model), costs

    ours, costs = trained(SNNetv2(rank=4))
    alike, _ = trained(SNNetv2(rank=4, bins=1))
    whole, _ = trained(SNNetv2(rank=0))
    one_way = len(SNNet().routes(3, 4))
    return {
        "share_of_models": len(costs) / one_way,
        "mean": sum(ours) / len(ours),
        "worst": min(ours),
        "spread": spread(ours, costs),
        "mean_alike": sum(alike) / len(alike),
        "spread_alike": spread(alike, costs),
        "mean_whole": sum(whole) / len(whole),
        "worst_whole": min(whole),
    }


def spread(found: list[float], costs: list[int]) -> float:
    """Largest less smallest mean over four equal shares of the range of costs, those without a route left out."""
    low, span = min(costs), max(costs) - min(costs)
    shares = [min(3, int(4 * (cost - low) / span)) for cost in costs]
    means = [[f for f, s in zip(found, shares, strict=True) if s == share] for share in set(shares)]
    mean = [sum(part) / len(part) for part in means]
    return max(mean) - min(mean)
