"""Data for networks that are made for them: what the data say of themselves, and a task on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from trimtab.core.errors import UserError
from trimtab.tasks.base import Task
from trimtab.tasks.classification import Classification

TRAINED = 16_384  # most windows of text that a network is trained on
SIZE = 32  # height and width that images of a folder are resized to, unless told otherwise


def task_of(
    function: Callable[..., Any], data: str | None, length: int = 128, size: int = SIZE
) -> tuple[Task, dict[str, Any]]:
    """A task for a space's function on the user's data, and those of its arguments that the data tell: `vocabulary` and
    `length` of text, which a function that takes a vocabulary is for; `channels`, `classes` and `size` of images.
    """
    wanted = inspect.signature(function).parameters
    task, known = text_task(data, length) if "vocabulary" in wanted else image_task(data, size)
    return task, {name: value for name, value in known.items() if name in wanted}


def text_task(data: str | None, length: int) -> tuple[Task, dict[str, Any]]:
    """A causal language model's task with the tokenizer of the shipped model, and its vocabulary's size."""
    from trimtab.models.source import open_source
    from trimtab.tasks.build import task_for

    source = open_source("pocket")
    task = task_for(source, data, length, training=TRAINED)
    return task, {"vocabulary": int(source.config["vocab_size"]), "length": length}


def image_task(data: str | None, size: int = SIZE) -> tuple[Task, dict[str, Any]]:
    """A classification's task, and how many channels, classes and pixels a side its images have.

    Args:
        data: as of `tasks.build.task_for`; None: scikit-learn's digits.
        size: of a folder's images.
    """
    import torch

    from trimtab.models.source import from_module, open_source
    from trimtab.tasks.build import task_for

    if data is None:
        task = task_for(open_source("pocket-cnn"))
    else:
        source = from_module(torch.nn.Identity(), "the space")
        source.config.update({"num_channels": 3, "image_size": size, "classes": 1 << 30})
        task = task_for(source, data)
    assert isinstance(task, Classification)
    inputs, _ = task.data["calibration"]
    images = next(iter(inputs.values()))
    if images.dim() != 4:
        raise UserError(f"{data}: inputs of shape {list(images.shape)} were found; a space takes images [n, c, h, w]")
    classes = 1 + max(int(labels.max()) for _, labels in task.data.values())
    return task, {"channels": int(images.shape[1]), "classes": classes, "size": int(images.shape[-1])}
