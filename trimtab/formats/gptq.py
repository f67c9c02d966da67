"""Checkpoints of GPTQ as AutoGPTQ, GPTQModel and optimum write them, read into packed weights.

For each quantised linear layer the checkpoint holds, in place of `weight`:

    qweight  int32 [in * bits / 32, out]: down each column the codes of an output, end to end, least significant bit
             first (a 3-bit code may straddle two words)
    qzeros   int32 [groups, out * bits / 32]: the zero points of a group, packed the same way along the row
    scales   [groups, out]
    g_idx    int32 [in]: the group of each input

Format `gptq` (version 1) stores each zero point less one, modulo 2**bits; `gptq_v2` stores it as it is. With act-order
(`desc_act`) the columns of a group lie apart; here they are put side by side and the layer's inputs are gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Shape
from trimtab.formats.checkpoint import Checkpoint
from trimtab.formats.integers import (
    CURE,
    FLOATS,
    Foreign,
    check_scale,
    column_order,
    expect,
    group_for,
    group_sizes,
    groups_of,
    level_of,
    settle,
    unpack_words,
    whole_numbers,
    words_for,
)
from trimtab.formats.packed import Packed

BITS = (2, 3, 4, 8)


class GPTQ:
    """What `quantization_config` says of a GPTQ checkpoint.

    Raises:
        UserError: another layout of the words, or numbers that make no sense.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        form = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if form not in ("gptq", "gptq_v2"):
            raise UserError(f"{where} is in the GPTQ format {form!r}; those that load are gptq and gptq_v2: {CURE}")
        if config.get("pack_dtype") not in (None, "int32"):
            raise UserError(f"{where} packs codes in {config['pack_dtype']!r}; int32 words alone load: {CURE}")
        dynamic = config.get("dynamic")
        settings = [config]
        if isinstance(dynamic, dict):  # other numbers for some layers; which is which is told by the shapes
            settings += [d for d in dynamic.values() if isinstance(d, dict)]
        self.offset = 1 if form == "gptq" else 0
        self.bits = whole_numbers(settings, "bits", BITS, where)
        self.groups = group_sizes(settings, "group_size", where)

    def read(self, checkpoint: Checkpoint, site: str, shape: Shape) -> Foreign:
        """The weight of a linear layer of this shape, `(out, in)`.

        Raises:
            UserError: its tensors are missing, damaged or of another shape.
        """
        rows, cols = shape
        found = checkpoint.shape(f"{site}.qweight")
        bits = next((b for b in self.bits if found == (words_for(cols, b), rows)), self.bits[0])
        expect(checkpoint, f"{site}.qweight", ["I32"], (words_for(cols, bits), rows))
        scales = checkpoint.shape(f"{site}.scales") if f"{site}.scales" in checkpoint else ()
        group = group_for(self.groups, cols, scales[0] if scales else 0)
        grid = (groups_of(cols, group), rows)
        expect(checkpoint, f"{site}.scales", FLOATS, grid)
        expect(checkpoint, f"{site}.qzeros", ["I32"], (grid[0], words_for(rows, bits)))
        if f"{site}.g_idx" in checkpoint:
            expect(checkpoint, f"{site}.g_idx", ["I32"], (cols,))

        def sides() -> tuple[Tensor, Tensor, Tensor | None]:
            scale = check_scale(checkpoint.read(f"{site}.scales"), f"{checkpoint.path}: {site}.scales").T
            zero = unpack_words(checkpoint.read(f"{site}.qzeros"), bits, rows).T + self.offset
            order = None
            if f"{site}.g_idx" in checkpoint:
                order = column_order(checkpoint.read(f"{site}.g_idx"), cols, group, f"{checkpoint.path}: {site}.g_idx")
            return scale, zero & ((1 << bits) - 1), order

        def packed() -> Packed:
            scale, zero, order = sides()
            codes = unpack_words(checkpoint.read(f"{site}.qweight").T, bits, cols)
            return settle(codes if order is None else codes[:, order], scale, zero, bits, group)

        scale, zero, order = sides()
        return Foreign(level_of(scale, zero, bits, group), shape, packed, order)
