"""A folder with one folder of images a class, as tensors in the form that a classifier was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.models.source import Source

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")
LEAST = 10


@dataclass(frozen=True)
class Form:
    """How a classifier wants its images.

    Fields:
        size: height and width in pixels.
        channels: 1 or 3.
        mean, std: of values from 0 to 1, by channel; they become (value - mean) / std.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def form_of(source: Source) -> Form:
    """What a model's files say of its images; without mean and deviation, values go from -1 to 1."""
    config = source.config
    channels = int(config.get("num_channels") or config.get("image_channels") or 3)
    stored: Mapping[str, Any] = {}
    path = None if source.folder is None else source.folder / "preprocessor_config.json"
    if path is not None and path.is_file():
        stored = json.loads(path.read_text("utf-8"))
    asked = stored.get("size") or config.get("image_size") or 8
    size = next(iter(asked.values())) if isinstance(asked, dict) else asked
    mean, std = ([float(v) for v in stored.get(f"image_{k}") or (0.5,)] for k in ("mean", "std"))
    return Form(int(size), channels, *(tuple((v * channels)[:channels]) for v in (mean, std)))


def class_of(names: list[str], label2id: Mapping[str, Any]) -> dict[str, int]:
    """The class of each folder: as the model names it, as the number that it is called, or else in sorted order.

    Raises:
        UserError: the model has names for its classes, and knows a part of the folders'.

    >>> class_of(["cat", "dog"], {"dog": 0, "cat": 1}), class_of(["7", "3"], {}), class_of(["dog", "cat"], {})
    ({'cat': 1, 'dog': 0}, {'7': 7, '3': 3}, {'dog': 1, 'cat': 0})
    """
    if all(name in label2id for name in names):
        return {name: int(label2id[name]) for name in names}
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}
    known = [name for name in names if name in label2id]
    if known or len(label2id) > len(names):
        missing = next(name for name in names if name not in label2id)
        raise UserError(
            f"a folder of images is called {missing}, and the model's {len(label2id)} classes are "
            f"{', '.join(list(label2id)[:4])}{', ...' if len(label2id) > 4 else ''}: call folders as the model does, "
            f"or let `trimtab adapt` or `train` give it a head for these {len(names)} classes with --fresh-head"
        )
    return {name: sorted(names).index(name) for name in names}


def folders(folder: Path) -> dict[str, list[Path]]:
    """The images of each class: those below the folder of its name, in sorted order.

    Raises:
        UserError: there are fewer than ten.
    """
    named = {p.name: sorted(f for f in p.rglob("*") if f.suffix.lower() in ENDINGS) for p in sorted(folder.iterdir())}
    named = {name: files for name, files in named.items() if files}
    if sum(map(len, named.values())) < LEAST:
        raise UserError(
            f"{folder} holds {sum(map(len, named.values()))} images in {len(named)} folders; give one folder a class, "
            f"with {LEAST} images or more in all ({', '.join(ENDINGS[:3])}, ...)"
        )
    return named


def read_pictures(folder: Path, source: Source, fresh: bool = False) -> tuple[Tensor, Tensor]:
    """Images `[n, channels, size, size]`, each resized to the model's size, and labels `[n]`.

    Args:
        fresh: the classes are the folders in sorted order, whatever the model knows.

    Raises:
        UserError: pillow is missing, there are fewer than ten images, one cannot be read, or the model knows other
            classes.
    """
    import numpy as np
    import torch

    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(
            f"{folder} holds images, which pillow reads, and it is not installed: pip install pillow"
        ) from error
    form, named = form_of(source), folders(folder)
    if fresh:
        classes = {name: place for place, name in enumerate(named)}
    else:
        classes = class_of(list(named), source.config.get("label2id") or {})
    rows, labels = [], []
    for name, files in named.items():
        for file in files:
            try:
                with Image.open(file) as image:
                    flat = image.convert("L" if form.channels == 1 else "RGB").resize((form.size, form.size), 2)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(
                    f"{file} cannot be read as an image ({str(error)[:120]}); remove or replace it"
                ) from error
            pixels = torch.from_numpy(np.array(flat, dtype=np.float32) / 255)
            rows.append(pixels[None] if form.channels == 1 else pixels.permute(2, 0, 1))
            labels.append(classes[name])
    mean, std = (torch.tensor(v)[:, None, None] for v in (form.mean, form.std))
    return (torch.stack(rows) - mean) / std, torch.tensor(labels)
