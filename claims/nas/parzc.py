"""ParZC: nodes that are weighed order networks better than nodes that are summed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.claim import Check, Claim
from trimtab.core.knob import Genome
from trimtab.parts.neural_predictors import Mixer
from trimtab.parts.predicting import Concord
from trimtab.tasks.nas_tables import EDGES, OPERATIONS, bench201

NETWORKS, TAUGHT, CHANNELS, STAGES = 200, 80, 6, 2

CLAIM = Claim(
    method="parzc",
    statement="A mixer that learns what each node's statistic counts for orders networks it has not seen better than "
    "the sum of the statistics does, and the smooth tau teaches it at least as well as squared errors.",
    source="Dong et al. 2024, arXiv:2402.02105, sections 3 and 4",
    figure="above zero-cost proxies on NAS-Bench-101, 201 and NDS; no single figure",
    setting="200 random cells of NAS-Bench-201 with their validation error; untrained networks of two cells and six "
    "channels, one batch of noise with random labels; for each edge |y dL/dy|, and |w dL/dw| where it has weights. 80 "
    "networks teach, 120 are ordered. Raw: the best of the sums of either statistic and the number of convolutions.",
    metric="Kendall's tau with the validation error, 120 networks",
    checks=(
        Check("above the best summed proxy", "parzc", ">", "raw"),
        Check("the smooth tau is not below squared errors", "parzc", ">=", "mse"),
    ),
    seeds=tuple(range(8)),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one split of the networks."""
    table = bench201(lab.data)
    rng = Random(0)
    genomes = list(dict.fromkeys(table.domain.random(rng) for _ in range(NETWORKS + 20)))[:NETWORKS]
    known = statistics(tuple(genomes))
    error = table.values["error"][table.index(genomes)]
    order = np.random.default_rng(seed).permutation(NETWORKS)
    taught, rest = order[:TAUGHT], order[TAUGHT:]
    edges = known.shape[1] // 2
    convolutions = np.array([sum(OPERATIONS[place].startswith("conv") for place in genome) for genome in genomes])
    sums = [known[rest, :edges].sum(1), known[rest, edges:].sum(1), convolutions[rest]]
    found = {"raw": max(Concord(-np.asarray(total, dtype=float), error[rest]).tau for total in sums)}
    for name, loss in (("parzc", "kendall"), ("mse", "mse")):
        mixer = Mixer(known[taught], error[taught], loss, seed)  # type: ignore[arg-type]
        found[name] = Concord(mixer.mean(known[rest]), error[rest]).tau
    return found


@functools.cache
def statistics(genomes: tuple[Genome, ...]) -> Any:
    """Saliencies of the outputs and of the weights of every edge of every cell, `[genomes, 2 * edges]`."""
    return np.array([of_one(genome) for genome in genomes])


def of_one(genome: Genome) -> list[float]:
    """Statistics of one untrained network."""
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


def saliency(tensor: Tensor) -> float:
    """Sum of |t dL/dt|; 0 where nothing comes back."""
    return 0.0 if tensor.grad is None else float((tensor.detach() * tensor.grad).abs().sum())
