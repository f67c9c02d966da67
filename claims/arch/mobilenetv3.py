"""MobileNetV3: the hard swish against the swish, in time and in accuracy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trimtab.arch.mobilenetv3 import MobileNetV3
from trimtab.core.claim import Check, Claim
from trimtab.tasks.contest import Contest, forward, in_turns, network

CLAIM = Claim(
    method="mobilenetv3",
    statement="The hard swish is as good as the swish and takes less time.",
    source="Howard et al. 2019, arXiv:1905.02244, section 5.2 (nonlinearities)",
    figure="of the whole network: V3-Large 3.2 points of top-1 above V2 at 15 % less latency",
    setting="Four blocks, 16 to 64 channels, strides 2 and 1, on 2,000 of CIFAR-10's images, 200 steps; the same with "
    "swish, x sigmoid(x), in place of every hard swish. Seconds of the processor, one thread, medians of runs in "
    "turns: of an activation of 16,384 numbers, forward and with its gradient, and of the network on 64 images.",
    metric="accuracy on 2,000 test images; seconds; swish_bar: the swish's accuracy less a point",
    checks=(
        Check("the activation takes less time", "hard_seconds", "<", "swish_seconds"),
        Check("so it does with its gradient", "hard_step_seconds", "<", "swish_step_seconds"),
        Check("the network takes less time", "network_hard_seconds", "<", "network_swish_seconds"),
        Check("the accuracy is within a point of the swish's", "hard", ">", "swish_bar"),
    ),
    seeds=tuple(range(8)),
    needs=("data",),
)


def net() -> nn.Module:
    """Four blocks that halve the image twice."""
    shapes = ((16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    return network(16, [MobileNetV3(stride=s, expansion=4.0).build(i, o) for i, o, s in shapes], 64)


def with_activation(made: nn.Module, activation: nn.Module) -> nn.Module:
    """A network with another activation in place of every hard swish."""
    for module in made.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Hardswish):
                setattr(module, name, activation)
    return made


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest = Contest(lab.data, seed)
    nets = {"hard": contest.train(net), "swish": contest.train(lambda: with_activation(net(), nn.SiLU()))}
    found = {name: contest.accuracy(trained) for name, trained in nets.items()}
    x = contest.data[0][:64]
    times = in_turns({name: forward(trained, x) for name, trained in nets.items()}, seconds=0.05)
    found |= {f"network_{name}_seconds": value for name, value in times.items()}
    flat = torch.randn(16384, requires_grad=True)
    kinds = {"hard": nn.Hardswish(), "swish": nn.SiLU()}
    steps = {f"{n}_step": lambda kind=kind: torch.autograd.grad(kind(flat).sum(), flat) for n, kind in kinds.items()}
    times = in_turns({**{n: forward(kind, flat) for n, kind in kinds.items()}, **steps}, seconds=0.02)
    found |= {f"{name}_seconds": value for name, value in times.items()}
    return found | {"swish_bar": found["swish"] - 0.01}
