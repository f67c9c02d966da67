"""EfficientViT: the sandwich of cascaded group attention against attention and feed-forward that alternate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.arch.efficientvit import EfficientViT
from trimtab.core.claim import Check, Claim
from trimtab.tasks.contest import Contest, forward, in_turns, multi_head, network, photographs

WIDTH, HEADS = 64, 4

CLAIM = Claim(
    method="efficientvit",
    statement="Little attention between much feed-forward, each head with its own share of the channels, is faster "
    "than attention and feed-forward in turns and as accurate, and its heads look at more different things.",
    source="Liu et al. 2023, arXiv:2305.07027, sections 2 and 3, figure 4, tables 2 and 6",
    figure="M5: 45.2 % more throughput on a Xeon than MobileNetV3-Large at +1.9 points of top-1",
    setting="Two blocks of 64 channels, 4 heads with keys of 8, window 8, feed-forward of factor 2, and four blocks of "
    "4 heads and feed-forward of factor 2, whose feed-forward layers are as many; 2,000 of CIFAR-10's images in "
    "patches of 4 x 4, 200 steps. Timed on 64 images, the processor's seconds, one thread, in turns.",
    metric="accuracy on 2,000 test images; seconds of a forward; likeness: mean cosine between the attention maps of "
    "two heads of a layer, each less its mean, on 100 test images",
    checks=(
        Check("less time", "cascade_seconds", "<", "plain_seconds"),
        Check("the accuracy is not lower", "cascade", ">=", "plain"),
        Check("its heads are less alike", "cascade_likeness", "<", "plain_likeness"),
    ),
    seeds=(0, 1, 2),
    needs=("data",),
)


def nets() -> dict[str, Callable[[], nn.Module]]:
    """What makes each network."""
    method = EfficientViT(key=8, window=8)
    return {
        "cascade": lambda: network(WIDTH, [method.build(WIDTH, WIDTH) for _ in range(2)], patch=4),
        "plain": lambda: network(WIDTH, [multi_head(WIDTH, HEADS, 2) for _ in range(4)], patch=4),
    }


def likeness(net: nn.Module, x: Tensor) -> float:
    """Mean cosine between the maps of two heads of a layer, over layers, pairs and images."""
    maps: list[list[Tensor]] = []
    for module in net.modules():
        if attention := getattr(module, "attention", None):
            layer: list[Tensor] = []
            maps.append(layer)

            def seen(*given: Any, attention: Any = attention, layer: list[Tensor] = layer) -> Tensor:
                found: Tensor = attention(*given)
                layer.extend(found.unbind(1) if found.dim() == 4 else [found])
                return found

            module.attention = seen  # type: ignore[assignment]
    with torch.no_grad():
        net(x)
    found = []
    for layer in maps:
        flat = [functional.normalize((m - m.mean((1, 2), keepdim=True)).flatten(1), dim=1) for m in layer]
        found += [float((a * b).sum(1).mean()) for i, a in enumerate(flat) for b in flat[:i]]
    return sum(found) / len(found)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one slice of the data."""
    contest, found = Contest(lab.data, seed), {}
    made = {name: contest.train(make) for name, make in nets().items()}
    x = contest.data[0][:64]
    times = in_turns({name: forward(net, x) for name, net in made.items()}, seconds=0.05)
    for name, net in made.items():
        found |= {name: contest.accuracy(net), f"{name}_seconds": times[name]}
        found[f"{name}_weights"] = sum(p.numel() for p in net.parameters())
    images = photographs(lab.data, "test", contest.judged)[0][:100]
    return found | {f"{name}_likeness": likeness(net, images) for name, net in made.items()}
