"""SHViT: one head on part of the channels against many heads on all, and how much a head of many is missed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trimtab.arch.shvit import SHViT
from trimtab.core.claim import Check, Claim
from trimtab.tasks.contest import Contest, forward, in_turns, multi_head, network

DEPTH, WIDTH, PLAIN, HEADS = 3, 63, 52, 4

CLAIM = Claim(
    method="shvit",
    statement="One head on part of the channels is enough: a network of it is faster than one of many heads and as "
    "accurate, and of many heads one is hardly missed.",
    source="Yun and Ro 2024, arXiv:2401.16456, sections 2 and 3, table 1",
    figure="SHViT-S4 against MobileViTv2 x1.0: 8.1 times as fast on a CPU, +1.3 points of top-1",
    setting="Three blocks of 63 channels, and three of 4 heads on 52 channels, which have as "
    "many; 2,000 of CIFAR-10's images in patches of 4 x 4, 200 steps. Timed on 64 images, the processor's "
    "seconds, one thread, in turns.",
    metric="accuracy on 2,000 test images; weights; seconds of a forward; late: mean loss of accuracy when one head of "
    "the last two blocks of many heads is removed",
    checks=(
        Check("no more weights", "single_weights", "<=", "multi_weights"),
        Check("less time", "single_seconds", "<", "multi_seconds"),
        Check("the accuracy is not lower", "single", ">=", "multi"),
        Check("a late head of many is worth less than two points", "late", "<", 0.02),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def nets() -> dict[str, Any]:
    """What makes each network."""
    return {
        "single": lambda: network(WIDTH, [SHViT().build(WIDTH, WIDTH) for _ in range(DEPTH)], patch=4),
        "multi": lambda: network(PLAIN, [multi_head(PLAIN, HEADS, 2) for _ in range(DEPTH)], patch=4),
    }


def beheaded(net: nn.Module, block: int, head: int) -> nn.Module:
    """A copy in which nothing of one head is used."""
    cut: Any = copy.deepcopy(net)
    size = PLAIN // HEADS
    with torch.no_grad():
        cut[1 + block].out.weight[:, head * size : (head + 1) * size] = 0
    return cut


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest, found = Contest(lab.data, seed), {}
    made = {name: contest.train(make) for name, make in nets().items()}
    for name, net in made.items():
        found[name] = contest.accuracy(net)
        found[f"{name}_weights"] = sum(p.numel() for p in net.parameters())
    x = contest.data[0][:64]
    times = in_turns({name: forward(net, x) for name, net in made.items()}, seconds=0.05)
    places = [(block, head) for block in (DEPTH - 2, DEPTH - 1) for head in range(HEADS)]
    lost = [found["multi"] - contest.accuracy(beheaded(made["multi"], *place)) for place in places]
    return found | {f"{name}_seconds": s for name, s in times.items()} | {"late": sum(lost) / len(lost)}
