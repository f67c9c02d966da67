"""A chain of inverted residuals, each with one of two kernels and one of two widths: a space for seconds."""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.parts.convolving import ConvNorm
from trimtab.space import OneOf


class Inverted(nn.Module):
    """Widen, filter channel by channel, narrow, and add to the input."""

    def __init__(self, width: int, kernel: int, factor: int) -> None:
        super().__init__()
        hidden = factor * width
        self.wide, self.narrow = ConvNorm(width, hidden), ConvNorm(hidden, width)
        self.filter = ConvNorm(hidden, hidden, kernel, groups=hidden)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, width, h, w]` to the same shape."""
        return x + self.narrow(self.act(self.filter(self.act(self.wide(x)))))


def narrow3(width: int) -> nn.Module:
    """Kernel 3, factor 2."""
    return Inverted(width, 3, 2)


def wide3(width: int) -> nn.Module:
    """Kernel 3, factor 4."""
    return Inverted(width, 3, 4)


def narrow5(width: int) -> nn.Module:
    """Kernel 5, factor 2."""
    return Inverted(width, 5, 2)


def wide5(width: int) -> nn.Module:
    """Kernel 5, factor 4."""
    return Inverted(width, 5, 4)


def network(channels: int = 3, classes: int = 10, width: int = 16, blocks: int = 4, patch: int = 4) -> nn.Module:
    """Patches, blocks, and the mean over places with a linear on top."""
    stem = nn.Sequential(nn.Conv2d(channels, width, patch, patch), nn.BatchNorm2d(width))
    body = [OneOf(narrow3, wide3, narrow5, wide5, name=f"block{i}")(width) for i in range(blocks)]
    top = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return nn.Sequential(stem, *body, *top)
