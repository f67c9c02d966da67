"""SN-Net: stitched models lie between their anchors, and least squares are a better start than random maps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trimtab.core.claim import Check, Claim
from trimtab.engine.joining import Batch, join
from trimtab.merge.sn_net import SNNet
from trimtab.parts.stitching import Stitched
from trimtab.tasks import domains as d
from trimtab.tasks.anchors import accuracies, small_anchor, train

CLAIM = Claim(
    method="sn-net",
    statement="After ten epochs of joint training stitched models are more accurate than their small anchor and rise "
    "with their cost; maps from least squares begin, and end, above random ones; routes that are anchors run them "
    "bit for bit.",
    source="Pan et al. 2023, arXiv:2302.06586, sections 4.1 and 4.3",
    figure="stitched DeiTs of Ti, S and B interpolate between their accuracies",
    setting="The shipped image transformer (4 blocks, 64 wide) and one of 3 blocks, 24 wide, trained for 15 epochs on "
    "a quarter of the digits; least squares from 256 training images; every step trains a route drawn at random; 300 "
    "test images.",
    metric="accuracy; stitched: mean over the stitched routes; start: before joint training",
    checks=(
        Check("least squares start above random maps", "start_stitched", ">", "start_random"),
        Check("trained, they are above random maps", "stitched", ">", "random"),
        Check("stitched models are above the small anchor", "stitched", ">", "small"),
        Check("stitched models are below the large anchor", "stitched", "<", "large"),
        Check("the dearer half is at least as good as the cheaper", "dear", ">=", "cheap"),
        Check("the anchors' routes are the anchors, bit for bit", "different", "<=", 0.0),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one small anchor and one joint training."""
    lab.hashes |= {"pocket-vit": d.base_hash()}
    small, images = small_anchor(seed), d.data("plain", "train")[0]
    batches: list[Batch] = [{"pixel_values": part} for part in images[:256].split(128)]

    def fresh() -> Stitched:
        made = join(SNNet(), [copy.deepcopy(small), copy.deepcopy(d.base_model()).requires_grad_(True)], batches)
        assert isinstance(made, Stitched)
        return made

    model, blank = fresh(), fresh()
    with torch.no_grad():
        for stitch in blank.stitches.values():
            nn.Linear.reset_parameters(stitch)  # type: ignore[arg-type]
    different = 0.0
    for place, anchor in ((0, small), (len(model.routes) - 1, d.base_model())):
        model.place = place
        same = torch.equal(model(pixel_values=images[:64]).logits, anchor(pixel_values=images[:64]).logits)
        different += float(not same)
    inner = range(1, len(model.routes) - 1)
    starts = {name: accuracies(m) for name, m in (("start_stitched", model), ("start_random", blank))}
    for made in (model, blank):
        rng = torch.Generator().manual_seed(seed)
        train(made, seed, 10, 3e-4, lambda made=made, rng=rng: int(torch.randint(len(made.routes), (), generator=rng)))
    ours, others = accuracies(model), accuracies(blank)
    half = (len(inner) + 1) // 2
    return {
        **{name: sum(found[i] for i in inner) / len(inner) for name, found in starts.items()},
        "stitched": sum(ours[i] for i in inner) / len(inner),
        "random": sum(others[i] for i in inner) / len(inner),
        "small": ours[0],
        "large": ours[-1],
        "cheap": sum(ours[i] for i in inner[:half]) / half,
        "dear": sum(ours[i] for i in inner[-half:]) / half,
        "different": different,
    }
