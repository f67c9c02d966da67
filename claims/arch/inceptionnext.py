"""InceptionNeXt: the mixer in branches against one depthwise kernel of 7x7."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.arch.inceptionnext import InceptionNeXt, MetaNeXtBlock
from trimtab.core.claim import Check, Claim
from trimtab.tasks.contest import Contest, forward, in_turns, network

WIDTH, DEPTH = 32, 2

CLAIM = Claim(
    method="inceptionnext",
    statement="A large depthwise kernel taken apart into a square and two bands on part of the channels is faster than "
    "one of 7x7 on all, and as accurate.",
    source="Yu et al. 2023, arXiv:2303.16900, tables 1 and 3",
    figure="InceptionNeXt-T against ConvNeXt-T: 1.6 times the training throughput, 82.3 against 82.1 top-1",
    setting="Two blocks of 32 channels on 2,000 of CIFAR-10's images in patches of 2 x 2, 200 steps, scale 1 at the "
    "start; the twin has a 7x7 depthwise convolution in place of the mixer, and all else is the same. Timed: a block "
    "of 96 channels on 8 images of 56 x 56 places, as in the paper's first stage; the processor's seconds, one thread.",
    metric="accuracy on 2,000 test images; seconds of a block's forward, of its forward and backward, and of the mixer "
    "alone",
    checks=(
        Check("the block's forward takes less time", "inception_seconds", "<", "large_seconds"),
        Check("so does its forward and backward", "inception_step_seconds", "<", "large_step_seconds"),
        Check("the accuracy is not lower", "inception", ">=", "large"),
    ),
    seeds=tuple(range(4)),
    needs=("data",),
)


def twin(channels: int, scale: float) -> nn.Module:
    """The same block with a 7x7 depthwise convolution for the mixer."""
    mixer = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    return MetaNeXtBlock(mixer, channels, 4 * channels, scale)


def ours(channels: int, scale: float) -> nn.Module:
    """The method's block."""
    return InceptionNeXt(scale=scale).build(channels, channels)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest, found = Contest(lab.data, seed), {}
    makes = {"inception": ours, "large": twin}
    for name, make in makes.items():
        made = contest.train(lambda make=make: network(WIDTH, [make(WIDTH, 1.0) for _ in range(DEPTH)]))
        found[name] = contest.accuracy(made)
    x = torch.randn(8, 96, 56, 56)
    blocks = {name: make(96, 1e-6) for name, make in makes.items()}
    runs = {name: forward(block.eval(), x) for name, block in blocks.items()}
    runs |= {f"{name}_mixer": forward(block.mixer, x) for name, block in blocks.items()}
    runs |= {f"{name}_step": lambda block=block: block(x).sum().backward() for name, block in blocks.items()}
    return found | {f"{name}_seconds": value for name, value in in_turns(runs, rounds=7).items()}
