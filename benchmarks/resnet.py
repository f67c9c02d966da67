"""ResNet-20 and -32 for CIFAR-10 (He et al. 2016, arXiv:1512.03385, section 4.2), and the shared data that they are
measured on.

Plain functions for `trimtab fit benchmarks.resnet:resnet20 --data benchmarks.resnet:cifar10`; both need the folder
that `TRIMTAB_DATA` names.
"""

from __future__ import annotations

import io
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.catalogue import data_folder
from trimtab.core.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = {"calibration": 2000, "search": 1000, "test": 10_000}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the input, or every second pixel of it with zeros for the new channels."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - inside) // 2

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, inside, h, w]` to `[n, width, h / stride, w / stride]`."""
        short = x if self.stride == 1 else functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + short)


class ResNet(nn.Module):
    """Three stages of `depth` blocks of 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = [Block(widths[stage], widths[stage], 1) for _ in range(depth - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[n, 3, 32, 32]` to logits `[n, 10]`."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _folder() -> str:
    found = data_folder()
    if found is None:
        raise UserError("CIFAR-10 and the ResNets lie in the shared data; name its folder in TRIMTAB_DATA")
    return str(found / "vision")


def _trained(depth: int) -> ResNet:
    from trimtab.formats.checkpoint import Checkpoint

    model = ResNet(depth)
    stored = Checkpoint(f"{_folder()}/resnet{6 * depth + 2}-cifar10.safetensors")
    missing, surplus = model.load_state_dict({n: stored.read(n) for n in stored.names()}, strict=False)
    assert not surplus and all(n.endswith("num_batches_tracked") for n in missing)
    return model.eval()


def resnet20() -> ResNet:
    """The trained ResNet-20, as it is: 81 % on these images."""
    return _trained(3)


def resnet32() -> ResNet:
    """The trained ResNet-32, as it is."""
    return _trained(5)


@cache
def tuned20(steps: int = 150, rate: float = 0.01) -> ResNet:
    """ResNet-20 fine-tuned on these images: SGD with momentum and a rate that falls to nothing, flips and shifts."""
    torch.manual_seed(0)
    model = resnet20().train()
    images, labels = images_of("train", 20_000, start=10_000)
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        pick = torch.randint(len(labels), (128,))
        x = images[pick]
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
        dx, dy = (int(v) for v in torch.randint(9, (2,)))
        x = functional.pad(x, (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]
        loss = functional.cross_entropy(model(x), labels[pick])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def images_of(split: str, count: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Images `[count, 3, 32, 32]`, normalised, and labels, of `train` or `test`."""
    import numpy as np
    from PIL import Image

    with np.load(f"{_folder()}/cifar10-{split}.npz", allow_pickle=False) as stored:
        jpeg, offset, labels = stored["jpeg"], stored["offset"], stored["label"]
    rows = range(start, start + count)
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))) for i in rows]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return x, torch.from_numpy(labels[start : start + count].astype("int64"))


@cache
def cifar10() -> dict[str, tuple[Tensor, Tensor]]:
    """Splits: calibration and search from the training images, test from the test images."""
    return {
        "calibration": images_of("train", SIZES["calibration"]),
        "search": images_of("train", SIZES["search"], start=SIZES["calibration"]),
        "test": images_of("test", SIZES["test"]),
    }
