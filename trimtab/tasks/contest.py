"""Small networks that differ in one thing alone, trained alike on a few thousand photographs and timed in turns.

The photographs are CIFAR-10's, from the shared data; training and test images are those of the data set.
"""

from __future__ import annotations

import functools
import io
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn

CLASSES = 10


@functools.cache
def photographs(folder: Path, split: str, count: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Images `[count, 3, 32, 32]`, each colour of mean 0 and deviation 1 over them, and labels `[count]`.

    Args:
        folder: the shared data.
        split: `train` or `test`.

    Raises:
        UserError: Pillow is not installed.
    """
    import numpy as np
    import torch

    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            "The photographs are JPEG files, and Pillow is not installed. Run: pip install pillow"
        ) from error
    with np.load(folder / "vision" / f"cifar10-{split}.npz", allow_pickle=False) as stored:
        jpeg, offset, labels = stored["jpeg"], stored["offset"], stored["label"]
    pairs = itertools.pairwise(offset[first : first + count + 1])
    pictures = [np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in pairs]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    return images, torch.from_numpy(labels[first : first + count].astype("int64"))


@dataclass(frozen=True)
class Contest:
    """How the networks are trained and judged.

    Fields:
        folder: the shared data.
        seed: of the slice of the training images, the first weights, the order and the mirrored images.
        images: how many are trained on.
        judged: how many test images the accuracy is of.
        steps: of the training.
        batch: images a step.
        rate: largest learning rate, reached after a tenth of the steps; it falls along a half cosine.
    """

    folder: Path
    seed: int = 0
    images: int = 2000
    judged: int = 2000
    steps: int = 200
    batch: int = 64
    rate: float = 3e-3

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """The slice of the training images."""
        return photographs(self.folder, "train", self.images, self.seed * self.images)

    def train(
        self, make: Callable[[], nn.Module], before: Callable[[nn.Module, float], None] = lambda net, done: None
    ) -> nn.Module:
        """A network made and trained; it comes back out of training.

        Args:
            before: is called with the network and the share of the steps that is done, before each.
        """
        import torch
        from torch.nn import functional

        torch.manual_seed(self.seed)
        net = make().train()
        optimiser = torch.optim.AdamW(net.parameters(), lr=self.rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, self.rate, self.steps, pct_start=0.1)
        images, labels = self.data
        rng = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            before(net, step / self.steps)
            pick = torch.randint(len(labels), (self.batch,), generator=rng)
            mirrored = torch.rand(self.batch, 1, 1, 1, generator=rng) < 0.5
            x = torch.where(mirrored, images[pick].flip(3), images[pick])
            loss = functional.cross_entropy(net(x), labels[pick])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        before(net, 1.0)
        return net.eval()

    def accuracy(self, net: nn.Module) -> float:
        """Share of the test images that are named right."""
        import torch

        images, labels = photographs(self.folder, "test", self.judged)
        with torch.no_grad():
            said = torch.cat([net(part).argmax(1) for part in images.split(250)])
        return float((said == labels).float().mean())


def network(width: int, blocks: Sequence[nn.Module], outputs: int | None = None, patch: int = 2) -> nn.Module:
    """Patches of photographs, blocks, and the mean over places with a linear on top.

    Args:
        width: channels that the first block reads.
        outputs: channels that the last block gives; by default as many.
        patch: side of a patch.
    """
    from torch import nn

    outputs = outputs or width
    stem = nn.Sequential(nn.Conv2d(3, width, patch, patch), nn.BatchNorm2d(width))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, CLASSES))


def multi_head(channels: int, heads: int, expansion: int) -> nn.Module:
    """The baseline of attention on images: many heads, then feed-forward, each behind a norm and added to its input."""
    import torch
    from torch import nn

    class MultiHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.GroupNorm(1, channels) for _ in range(2))
            self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
            self.mlp = nn.Sequential(
                nn.Conv2d(channels, expansion * channels, 1), nn.GELU(), nn.Conv2d(expansion * channels, channels, 1)
            )

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norms[0](x)).flatten(2).unflatten(1, (3, heads, -1)).unbind(1)
            mixed = v @ self.attention(q, k).transpose(2, 3)
            x = x + self.out(mixed.flatten(1, 2).view_as(x))
            return x + self.mlp(self.norms[1](x))

        def attention(self, q: Tensor, k: Tensor) -> Tensor:
            """Where the heads look, `[n, heads, queries, keys]`."""
            return torch.softmax(q.transpose(2, 3) @ k * q.shape[2] ** -0.5, -1)

    return MultiHead()


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int = 15, seconds: float = 0.0) -> dict[str, float]:
    """Median seconds of each run, on one thread; they take turns, so that a slow minute slows all of them.

    Args:
        rounds: how often each is timed, after once that is not.
        seconds: each timing repeats its run until so much time has passed, and divides.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    with one_thread():
        for round_ in range(rounds + 1):
            for name, run in runs.items():
                count, start = 0, time.process_time()
                while count == 0 or time.process_time() - start < seconds:
                    run()
                    count += 1
                if round_:
                    found[name].append((time.process_time() - start) / count)
    return {name: statistics.median(times) for name, times in found.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch uses one thread for a while, so that processor time is what a run takes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """A run of a network that keeps nothing for a gradient."""
    import torch

    def run() -> object:
        with torch.inference_mode():
            return net(x)

    return run


def operations(net: nn.Module, x: Tensor) -> int:
    """Multiplications and additions of a forward, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops()


def touched(net: nn.Module, x: Tensor) -> int:
    """Bytes that the convolutions of a forward read and write: their inputs, outputs and weights."""
    import torch
    from torch import nn

    total = [0]

    def count(module: nn.Module, given: Any, out: Tensor) -> None:
        total[0] += given[0].nbytes + out.nbytes + sum(p.nbytes for p in module.parameters())

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return total[0]
