"""Cells of NAS-Bench-201 before any training: what is known of each of their edges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.knob import Genome
from trimtab.parts.saliency import saliency
from trimtab.tasks.nas_tables import EDGES, OPERATIONS

CHANNELS, STAGES = 6, 2


def untrained_cell(genome: Genome) -> list[float]:
    """Saliency of the output of every edge of every cell, and behind these of its weight where it has one, under cross
    entropy of one batch of noise with random labels.
    """
    torch.manual_seed(0)
    stem, last = nn.Conv2d(3, CHANNELS, 3, padding=1), nn.Linear(CHANNELS, 10)
    layers = {
        (stage, edge): convolution(int(OPERATIONS[place][-1]))
        for stage in range(STAGES)
        for edge, place in zip(EDGES, genome, strict=True)
        if OPERATIONS[place].startswith("conv")
    }
    x, labels = torch.randn(8, 3, 12, 12), torch.randint(10, (8,))
    outputs: dict[tuple[int, str], Tensor] = {}
    hidden = functional.instance_norm(stem(x))
    for stage in range(STAGES):
        nodes = [hidden]
        for node in range(1, 4):
            found: Sequence[Tensor] = [
                outputs.setdefault(
                    (stage, edge), applied(OPERATIONS[place], nodes[int(edge[0])], layers.get((stage, edge)))
                )
                for edge, place in zip(EDGES, genome, strict=True)
                if edge[-1] == str(node)
            ]
            nodes.append(torch.stack(list(found)).sum(0))
        hidden = functional.avg_pool2d(nodes[-1], 2)
    for output in outputs.values():
        if output.requires_grad:
            output.retain_grad()
    functional.cross_entropy(last(hidden.mean((2, 3))), labels).backward()
    places = [(stage, edge) for stage in range(STAGES) for edge in EDGES]
    of_outputs = [saliency(outputs[place]) for place in places]
    return of_outputs + [saliency(layers[place].weight) if place in layers else 0.0 for place in places]


def convolution(kernel: int) -> nn.Conv2d:
    """A convolution of an edge."""
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2)


def applied(name: str, x: Tensor, layer: nn.Conv2d | None) -> Tensor:
    """An edge of a cell."""
    if layer is not None:
        return functional.instance_norm(layer(functional.relu(x)))
    pooled = functional.avg_pool2d(x, 3, 1, 1) if name == "pool" else x
    return pooled * float(name != "none")
