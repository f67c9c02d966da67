"""A mobile CNN: inverted residuals (Sandler et al. 2018, arXiv:1801.04381) with elastic kernels, widths and depths."""

from __future__ import annotations

from torch import Tensor, nn

from trimtab.space import Choice, Depth, Resolution, Width


def conv(entry: int, exit: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution and its norm."""
    return nn.Sequential(
        nn.Conv2d(entry, exit, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(exit)
    )


class Inverted(nn.Module):
    """Widen, filter channel by channel, narrow; around it a shortcut where the shape stays."""

    def __init__(self, entry: int, exit: int, stride: int) -> None:
        super().__init__()
        kernel, hidden = Choice(3, 5), entry * Width(2, 3, 4, name="expand")
        self.around = stride == 1 and entry == exit
        self.wide = conv(entry, hidden)
        self.filter = conv(hidden, hidden, kernel, stride, groups=hidden)
        self.narrow = conv(hidden, exit)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, entry, h, w] to [n, exit, h / stride, w / stride]."""
        y = self.narrow(self.act(self.filter(self.act(self.wide(x)))))
        return x + y if self.around else y


class MobileCNN(nn.Module):
    """A stem, three stages of inverted residuals, a mean and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(channels, 16, 3), nn.Hardswish())
        stages, entry = [], 16
        for stage, exit in enumerate((16, 24, 40)):
            blocks = []
            for i in Depth(1, 2, 3, name=f"depth{stage}"):
                blocks.append(Inverted(entry, exit, stride=2 if i == 0 and stage > 0 else 1))
                entry = exit
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(entry, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, channels, h, w] to logits [n, classes]."""
        return self.head(self.stages(self.stem(images)).mean((2, 3)))


def network(channels: int = 3, classes: int = 10) -> MobileCNN:
    """The space's network."""
    return MobileCNN(channels, classes)


def resized(channels: int = 3, classes: int = 10, size: int = 32) -> MobileCNN:
    """The same at resolutions from half of the images' to all of it: `mobile-cnn:resized`."""
    Resolution(*(size * eighths // 8 for eighths in range(4, 9)))
    return MobileCNN(channels, classes)
