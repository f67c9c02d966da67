"""`PocketCNN`, a small residual network for 8x8 digits, described by a JSON file and filled from safetensors."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from trimtab.core.errors import UserError

MODEL_TYPE = "pocket-cnn"


@dataclass(frozen=True)
class PocketCNNConfig:
    """Shape of a `PocketCNN`; a network with channels removed is described by the same fields.

    Args:
        widths: channels of each stage. The residual stream couples them: the exit of every block of a stage, its
            shortcut and the entry of the next stage share one number.
        inner: for each stage, the channels between the two convolutions of each of its blocks; these are free.
        image_channels: channels of an image.
        classes: number of classes.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    inner: tuple[tuple[int, ...], ...] = ((16, 16), (32, 32), (64, 64))
    image_channels: int = 1
    classes: int = 10

    def to_json(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PocketCNNConfig:
        """Read the content of config.json.

        Raises:
            UserError: it describes another kind of model, or its fields are not those of a PocketCNN.
        """
        if data.get("model_type") != MODEL_TYPE:
            raise UserError(f"The config has model_type {data.get('model_type')!r}; a PocketCNN needs {MODEL_TYPE!r}.")
        try:
            config = cls(
                widths=tuple(map(int, data["widths"])),
                inner=tuple(tuple(map(int, stage)) for stage in data["inner"]),
                image_channels=int(data["image_channels"]),
                classes=int(data["classes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                "The config of the PocketCNN lacks or garbles a field; it needs widths, inner, "
                f"image_channels and classes ({type(error).__name__}: {error})."
            ) from error
        counts = [*config.widths, *(c for stage in config.inner for c in stage), config.image_channels, config.classes]
        if not config.widths or len(config.widths) != len(config.inner) or min(counts) < 1 or not all(config.inner):
            raise UserError(
                f"The config of the PocketCNN has widths {config.widths} and inner {config.inner}: each "
                "stage needs a width and at least one block, and every number must be positive."
            )
        return config


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, entry: int, inner: int, exit: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entry, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, exit, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(exit)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or entry != exit:
            self.shortcut = nn.Sequential(nn.Conv2d(entry, exit, 1, stride, bias=False), nn.BatchNorm2d(exit))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, entry, h, w] to [n, exit, h / stride, w / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PocketCNN(nn.Module):
    """A stem, stages of residual blocks (each stage after the first halves the image), a mean and a linear layer.

    >>> import torch
    >>> PocketCNN(PocketCNNConfig()).eval()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, config: PocketCNNConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Sequential(
            nn.Conv2d(config.image_channels, config.widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(config.widths[0]),
            nn.ReLU(),
        )
        stages: list[nn.Module] = []
        entry = config.widths[0]
        for i, (width, inner) in enumerate(zip(config.widths, config.inner, strict=True)):
            blocks: list[nn.Module] = []
            for j, hidden in enumerate(inner):
                blocks.append(Block(entry, hidden, width, stride=2 if i > 0 and j == 0 else 1))
                entry = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(entry, config.classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images [n, image_channels, h, w] to logits [n, classes]."""
        return self.head(self.stages(self.stem(pixel_values)).mean((2, 3)))

    @classmethod
    def from_config(cls, data: dict[str, Any]) -> PocketCNN:
        """Make an untrained network from the content of config.json.

        Raises:
            UserError: the content does not describe a PocketCNN.
        """
        return cls(PocketCNNConfig.from_json(data))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PocketCNN:
        """Rebuild a network, in evaluation mode, from a folder that `save_pretrained` wrote.

        Raises:
            UserError: a file is missing or damaged, or the tensors do not fit the config.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            model = cls.from_config(json.loads((folder / "config.json").read_text()))
            tensors = load_file(folder / "model.safetensors")
        except (OSError, json.JSONDecodeError, SafetensorError) as error:
            raise UserError(
                f"{folder} does not hold a readable PocketCNN: {error}. It needs config.json and model.safetensors."
            ) from error
        expected = {k: v.shape for k, v in model.state_dict().items()}
        found = {k: v.shape for k, v in tensors.items()}
        if expected != found:
            odd = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
            raise UserError(
                f"{len(odd)} tensors in {folder} do not fit its config, first {odd[0]}: the config asks "
                f"for {expected.get(odd[0])}, the file has {found.get(odd[0])}."
            )
        model.load_state_dict(tensors)
        return model.eval()
