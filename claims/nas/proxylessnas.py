"""ProxylessNAS: memory as options are added, what is found, and what a weight of latency does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.core.claim import Check, Claim
from trimtab.engine.relaxing import Course, Relaxed
from trimtab.nas.darts import DARTS
from trimtab.nas.proxylessnas import ProxylessNAS
from trimtab.parts.convolving import ConvNorm
from trimtab.space import OneOf, Space
from trimtab.tasks.arena import Arena
from trimtab.tasks.contest import Contest, forward, in_turns

FEW, MANY = 2, 6

CLAIM = Claim(
    method="proxylessnas",
    statement="Binary paths keep memory near that of one network as options are added, and a weight of latency finds "
    "faster networks.",
    source="Cai et al. 2018, arXiv:1812.00332, sections 3 and 4",
    figure="CIFAR-10: 2.08 % error with a sixth of AmoebaNet-B's weights; ImageNet: 1.2 times as fast as MobileNetV2",
    setting="Memory: four convolutions of 16 channels, each one of 2 or of 6 alike, batch of 64. Search: the space "
    "`kernel-chain` (four blocks, kernels 3 and 5, factors 2 and 4), 16 channels, on 2,000 of CIFAR-10's images in "
    "patches of 4 x 4, 100 steps of 32, without and with latency (l = 1); the found and five random networks trained "
    "from nothing, 100 steps of 64. Timed on 64 images, the processor's seconds, one thread, in turns.",
    metric="growth: most bytes kept for a backward pass with 6 options over those with 2; accuracy on 2,000 test "
    "images; seconds of a forward of the found networks; improvement: over the mean random network's, relative",
    checks=(
        Check("three times the options, less than a tenth more memory", "growth", "<", 1.1),
        Check("DARTS needs more than twice as much", "darts_growth", ">", 2.0),
        Check("with a weight of latency the network is faster", "fast_seconds", "<", "seconds"),
        Check("above the mean random network", "found", ">", "random"),
        Check("not below what drawing hands over", "found", ">=", "drawing"),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def convolution(width: int) -> nn.Module:
    """One option."""
    return nn.Sequential(ConvNorm(width, width, 3), nn.ReLU())


def alike(options: int) -> nn.Module:
    """A network of choices among so many options that are all alike."""
    makers = [partial(convolution) for _ in range(options)]
    body = [OneOf(*makers, name=f"layer{i}")(16) for i in range(4)]
    return nn.Sequential(nn.Conv2d(3, 16, 2, 2), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def most_bytes(contest: Contest, method: Any, options: int) -> int:
    """Most kept for a backward pass in a step of weights or votes."""
    search = Relaxed(Space(partial(alike, options), "alike"), method, *contest.data, Course(1, 64))
    search.step(0.01, learning=True)
    return max(search.saved_bytes.values())


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest = Contest(lab.data, seed, steps=100)
    figures = {
        name: most_bytes(contest, method, MANY) / most_bytes(contest, method, FEW)
        for name, method in (("growth", ProxylessNAS()), ("darts_growth", DARTS()))
    }
    arena = Arena(contest, "kernel-chain")
    figures |= arena.random_figures()
    genomes = {
        name: arena.relaxed(ProxylessNAS(latency), Course(100, 32)).choose()
        for name, latency in (("found", 0.0), ("fast", 1.0))
    }
    figures |= {name: arena.accuracy(genome) for name, genome in genomes.items()}
    x = torch.randn(64, 3, 32, 32)
    nets = {name: arena.space.network(genome).eval() for name, genome in genomes.items()}
    times = in_turns({name: forward(net, x) for name, net in nets.items()}, seconds=0.02)
    figures |= {"seconds": times["found"], "fast_seconds": times["fast"]}
    return figures | {"improvement": figures["found"] / figures["random"] - 1}
