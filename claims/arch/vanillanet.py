"""VanillaNet: trained deep and merged, against the shallow network trained as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.arch.vanillanet import SeriesActivation, VanillaNet
from trimtab.core.claim import Check, Claim
from trimtab.parts.convolving import ConvNorm
from trimtab.tasks.contest import Contest, forward, in_turns, network

SHAPES = ((32, 64, 2), (64, 64, 1), (64, 96, 2))
SERIES = 1

CLAIM = Claim(
    method="vanillanet",
    statement="A network whose inner activations fade while it is trained becomes one of half the convolutions, of the "
    "same function, faster, and better than the shallow one trained as it is.",
    source="Chen et al. 2023, arXiv:2305.12972, section 3.1 and table 3 (deep training)",
    figure="VanillaNet-6 on ImageNet: 59.58 without and 60.53 with deep training; with the series of activations 75.23 "
    "and 76.36",
    setting="Three blocks, 32 to 96 channels, series of 1, pooled twice, on 2,000 of CIFAR-10's images in patches of "
    "2 x 2, 200 steps, t = step / steps; the shallow network has one convolution and norm in place of each two. Timed "
    "on 64 images, the processor's seconds, one thread, in turns.",
    metric="accuracy on 2,000 test images; seconds; gap: largest difference of merged and unmerged outputs over the "
    "largest output; dense: pointwise convolutions of the blocks",
    checks=(
        Check("the merged network computes the same", "gap", "<", 1e-4),
        Check("with half the convolutions", "merged_dense", "<=", "half_dense"),
        Check("in less time", "merged_seconds", "<", "deep_seconds"),
        Check("it is more accurate than the shallow one", "merged", ">", "shallow"),
    ),
    seeds=tuple(range(5)),
    needs=("data",),
)


def deep() -> nn.Module:
    """The network as it is trained."""
    return network(32, [VanillaNet(SERIES, pool).build(i, o) for i, o, pool in SHAPES], 96)


def shallow() -> nn.Module:
    """One convolution and norm a block."""
    blocks = [nn.Sequential(ConvNorm(i, o), nn.MaxPool2d(pool), SeriesActivation(o, SERIES)) for i, o, pool in SHAPES]
    return network(32, blocks, 96)


def fade(net: nn.Module, done: float) -> None:
    """Set t of all blocks to the share of the steps that is done."""
    for module in net.modules():
        if hasattr(module, "fade"):
            module.fade(done)


def dense(net: nn.Module) -> int:
    """Convolutions that mix channels, but for the patches'."""
    return sum(isinstance(m, nn.Conv2d) and m.groups == 1 for m in net.modules()) - 1


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest = Contest(lab.data, seed)
    trained: Any = contest.train(deep, fade)
    merged = nn.Sequential(*(m.merged() if hasattr(m, "merged") else m for m in trained)).eval()
    x = contest.data[0][:64]
    with torch.no_grad():
        one, other = merged(x), trained(x)
    times = in_turns({"merged": forward(merged, x), "deep": forward(trained, x)}, seconds=0.05)
    return {
        "gap": float((one - other).abs().max() / other.abs().max()),
        "merged_dense": dense(merged),
        "half_dense": dense(trained) / 2,
        "merged": contest.accuracy(merged),
        "shallow": contest.accuracy(contest.train(shallow)),
    } | {f"{name}_seconds": value for name, value in times.items()}
