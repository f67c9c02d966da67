"""A U-Net (Ronneberger et al. 2015, arXiv:1505.04597) from images to images, with elastic widths, depths and kernels.

Each level of the way down has a width and a number of convolutions; the way up has as wide ones, and reads what comes
from below beside what the way down left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.space import Choice, Depth, Width, pieces

LEVELS = ((8, 12, 16), (16, 24, 32), (32, 48, 64))


def layer(entry: tuple[int, ...], exit: int, kernel: int) -> nn.Sequential:
    """A convolution of what is concatenated, its norm, and a ReLU."""
    conv = pieces(nn.Conv2d(sum(entry), exit, kernel, padding=kernel // 2, bias=False), inputs=entry)
    return nn.Sequential(conv, nn.BatchNorm2d(exit), nn.ReLU())


class Down(nn.Module):
    """Convolutions of one level, on the way down."""

    def __init__(self, entry: int, exit: int) -> None:
        super().__init__()
        kernel, blocks = Choice(3, 5), []
        for _ in Depth(1, 2, name="depth"):
            blocks.append(layer((entry,), exit, kernel))
            entry = exit
        self.body = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, entry, h, w]` to `[n, exit, h, w]`."""
        return self.body(x)


class Up(nn.Module):
    """One level on the way up: twice as large, beside what the way down left."""

    def __init__(self, below: int, beside: int) -> None:
        super().__init__()
        self.join = layer((below, beside), beside, Choice(3, 5, name="kernel"))

    def forward(self, x: Tensor, left: Tensor) -> Tensor:
        """Map `[n, below, h / 2, w / 2]` and `[n, beside, h, w]` to `[n, beside, h, w]`."""
        larger = nn.functional.interpolate(x, size=left.shape[2:])
        return self.join(torch.cat([larger, left], 1))


class UNet(nn.Module):
    """Down, each level on half of the image before; up again; and a pointwise convolution."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        widths, downs, entry = [], [], channels
        for i, options in enumerate(LEVELS):
            width = Width(*options, name=f"width{i}")
            downs.append(Down(entry, width))
            widths.append(width)
            entry = width
        ups = [Up(below, beside) for below, beside in zip(widths[:0:-1], widths[-2::-1], strict=True)]
        self.downs, self.ups = nn.ModuleList(downs), nn.ModuleList(ups)
        self.head = nn.Conv2d(widths[0], outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map `[n, channels, h, w]` to `[n, outputs, h, w]`."""
        left: list[Tensor] = []
        x = images
        for i, down in enumerate(self.downs):
            x = down(nn.functional.max_pool2d(x, 2) if i else x)
            left.append(x)
        for up, beside in zip(self.ups, left[-2::-1], strict=True):
            x = up(x, beside)
        return self.head(x)


def network(channels: int = 3, outputs: int = 3) -> UNet:
    """The space's network."""
    return UNet(channels, outputs)
