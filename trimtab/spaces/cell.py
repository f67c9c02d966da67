"""A cell space: three nodes, each a sum over edges from all before it, each edge one of a few operations.

It is small enough to train every network of it, and has the shape of NAS-Bench-201 (Dong and Yang 2020,
arXiv:2001.00326); as in DARTS a node of a chosen network has at most two edges. All cells are alike.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from trimtab.parts.convolving import ConvNorm
from trimtab.parts.mixing import Node
from trimtab.space import OneOf

NODES, EDGES = 3, 2
Edges = list[list[Callable[[int], nn.Module]]]


class Zero(nn.Module):
    """Gives nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the input's shape."""
        return x * 0


def none(width: int) -> nn.Module:
    """No edge."""
    return Zero()


def skip(width: int) -> nn.Module:
    """The input as it is."""
    return nn.Identity()


def pool(width: int) -> nn.Module:
    """A mean over 3 x 3 places."""
    return nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(width))


def pointwise(width: int) -> nn.Module:
    """Each place by itself."""
    return nn.Sequential(nn.ReLU(), ConvNorm(width, width))


def conv(width: int) -> nn.Module:
    """A 3 x 3 convolution."""
    return nn.Sequential(nn.ReLU(), ConvNorm(width, width, 3))


class Cell(nn.Module):
    """Nodes one behind the other; the last is the output."""

    def __init__(self, width: int, edges: Edges) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(Node([make(width) for make in row], EDGES) for row in edges)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, width, h, w]` to the same shape."""
        states = [x]
        for node in self.nodes:
            states.append(node(states))
        return states[-1]


def network(channels: int = 3, classes: int = 10, width: int = 16, cells: int = 2, patch: int = 4) -> nn.Module:
    """Patches, cells, and the mean over places with a linear on top."""
    edges = [
        [OneOf(none, skip, pool, pointwise, conv, name=f"edge{i}{node}") for i in range(node)]
        for node in range(1, NODES + 1)
    ]
    stem = nn.Sequential(nn.Conv2d(channels, width, patch, patch), nn.BatchNorm2d(width))
    body = [Cell(width, edges) for _ in range(cells)]
    top = (nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return nn.Sequential(stem, *body, *top)
