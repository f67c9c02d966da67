"""Data for the image-classification task: scikit-learn's 1,797 handwritten digits, 8x8 grey, split once and for all."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SIZES = {"train": 1197, "search": 300, "test": 300}
BLACK = -1.0
"""Value of an empty pixel after normalisation."""


def split_indices(split: str) -> list[int]:
    """List the images of a split: all are ordered by the SHA-256 of their number, then cut into 1197, 300 and 300.

    >>> len(split_indices("train")), split_indices("test")[:2] == split_indices("search")[:2]
    (1197, False)

    Raises:
        UserError: the split is unknown.
    """
    if split not in SIZES:
        raise UserError(f"No split is called {split!r}. Choose one of: {', '.join(SIZES)}.")
    order = sorted(range(sum(SIZES.values())), key=lambda i: hashlib.sha256(str(i).encode()).digest())
    names = list(SIZES)
    first = sum(SIZES[name] for name in names[: names.index(split)])
    return order[first : first + SIZES[split]]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the images float32 [n, 1, 8, 8], grey values 0..16 mapped onto -1..1, and the labels int64 [n].

    Args:
        split: `train`, `search` or `test`.

    Raises:
        UserError: the split is unknown, or scikit-learn, which brings the data, is not installed.
    """
    rows = split_indices(split)
    images, labels = _all()
    return images[rows], labels[rows]


@functools.cache
def _all() -> tuple[Tensor, Tensor]:
    import torch

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "The digits come with scikit-learn, which is not installed. Run: pip install scikit-learn"
        ) from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 + BLACK
    return images, torch.tensor(data.target, dtype=torch.int64)
