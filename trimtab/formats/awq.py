"""Checkpoints of AWQ in the layout `gemm`, read into packed weights.

For each quantised linear layer the checkpoint holds, in place of `weight`:

    qweight  int32 [in, out / 8]: 4-bit codes; the eight outputs of a word lie in the order 0 2 4 6 1 3 5 7, from the
             least significant bit
    qzeros   int32 [groups, out / 8]: zero points in the same order, stored as they are
    scales   [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Shape
from trimtab.formats.checkpoint import Checkpoint
from trimtab.formats.integers import (
    CURE,
    FLOATS,
    Foreign,
    check_scale,
    expect,
    group_sizes,
    groups_of,
    level_of,
    settle,
    unpack_words,
    whole_numbers,
    words_for,
)
from trimtab.formats.packed import Packed

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BITS = 4


class AWQ:
    """What `quantization_config` says of an AWQ checkpoint.

    Raises:
        UserError: another layout of the words, or numbers that make no sense.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        form = str(config.get("version") or config.get("format") or "gemm").lower()
        if form != "gemm" or config.get("backend") == "llm-awq":
            raise UserError(f"{where} is in the AWQ format {form!r}; gemm alone loads: {CURE}")
        whole_numbers([config], "bits" if "bits" in config else "w_bit", (BITS,), where)
        [self.group] = group_sizes([config], "group_size" if "group_size" in config else "q_group_size", where)

    def read(self, checkpoint: Checkpoint, site: str, shape: Shape) -> Foreign:
        """The weight of a linear layer of this shape, `(out, in)`.

        Raises:
            UserError: its tensors are missing, damaged or of another shape.
        """
        rows, cols = shape
        groups = groups_of(cols, self.group)
        expect(checkpoint, f"{site}.qweight", ["I32"], (cols, words_for(rows, BITS)))
        expect(checkpoint, f"{site}.scales", FLOATS, (groups, rows))
        expect(checkpoint, f"{site}.qzeros", ["I32"], (groups, words_for(rows, BITS)))

        def sides() -> tuple[Tensor, Tensor]:
            scale = check_scale(checkpoint.read(f"{site}.scales"), f"{checkpoint.path}: {site}.scales")
            return scale.T, _outputs(checkpoint.read(f"{site}.qzeros"), rows)

        def packed() -> Packed:
            return settle(_outputs(checkpoint.read(f"{site}.qweight"), rows), *sides(), BITS, self.group)

        return Foreign(level_of(*sides(), BITS, self.group), shape, packed)


def _outputs(words: Tensor, rows: int) -> Tensor:
    """Codes `[out, n]` of words `[n, out / 8]`."""
    lanes = unpack_words(words, BITS, words.shape[1] * len(ORDER)).reshape(*words.shape, len(ORDER))
    return lanes[:, :, torch.tensor(ORDER).argsort()].reshape(len(words), -1)[:, :rows].T
