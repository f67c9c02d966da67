"""The compressed-tensors format `pack-quantized` (W4A16, W8A16), which transformers and vLLM load.

For each quantised linear layer the folder holds, in place of `weight`:

    weight_packed      int32: a row's codes end to end, least significant bit first, every row padded to whole words
    weight_scale       one for each row and group, in the model's type (here fp16, as levels store it)
    weight_zero_point  int32, asymmetric levels: packed as the codes are, but down the rows of each group's column
    weight_shape       int64: rows and columns

The library offsets signed codes to 0..2**bits-1 before it packs, which is how levels store them already: bits are
copied, nothing is rounded. Both sides say weight = (code - zero) * scale; symmetric levels have zero = 2**(bits-1).

`int-quantized`, also called `naive-quantized`, is read as well: `weight` in int8, with scales and, where there are any,
zero points in int8.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Dense, Int, Level, Shape
from trimtab.formats.bitstream import unpack_bits
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.huggingface import (
    SHARD_BYTES,
    Flow,
    Stock,
    Tensors,
    copy_companions,
    fresh_folder,
    site_of,
    summary,
    to_dtype,
    write_card,
    write_config,
)
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

BITS = (4, 8)
GROUPS = (None, 32, 64, 128)  # what vLLM's Marlin kernels take
_TAKEN = (
    "4 or 8 bits with fp16 scales for a row or for groups of 32, 64 or 128 columns, like 4b/g128/sym, 4b/g64 or 8b/row"
)


def fits(level: Level, shape: Shape) -> bool:
    """Whether the format holds a weight of this shape at this level exactly."""
    return (
        isinstance(level, Int)
        and len(shape) == 2
        and level.bits in BITS
        and level.group in GROUPS
        and level.scale == "f16"
        and not level.hadamard
        and shape[1] % (level.group or 1) == 0
    )


def export_compressed_tensors(
    tensors: Tensors,
    config: Mapping[str, Any],
    source_folder: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write a folder in the format `pack-quantized`; packed weights are copied bit for bit, dense ones become fp16.

    Args:
        tensors: (name, dense tensor or `Packed`) of the whole model.
        config: the original's `config.json`.
        source_folder: where tokenizer, generation settings and licence are copied from; None: nowhere.
        out: the folder to make; it may exist if it is empty.
        shard_bytes: the most bytes of tensors a file.

    Returns:
        `files`, `bytes`, `exact` (weights written packed), `requantised` (none: what does not fit is refused) and
        `notes`.

    Raises:
        UserError: a level or site that the format cannot express, or the tensors do not make the stock architecture.
    """
    stock = Stock(config)
    flow = Flow(tensors, stock, "compressed-tensors")
    counts: Counter[str] = Counter()
    levels: Counter[str] = Counter()
    sites: defaultdict[Int, list[str]] = defaultdict(list)

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, value in flow:
            if not isinstance(value, Packed) or isinstance(value.level, Dense):
                yield name, to_dtype(name, stock.dense(name, value), torch.float16)
                continue
            site = site_of(name)
            _check(site, value, stock)
            sites[value.level].append(site)  # type: ignore[index]
            levels[str(value.level)] += 1
            counts["exact"] += 1
            for part, tensor in pack(value).items():
                yield f"{site}.{part}", tensor

    with fresh_folder(out) as folder:
        write_safetensors(stored(), folder / "model.safetensors", shard_bytes=shard_bytes)
        if not sites:
            raise UserError("compressed-tensors was asked for, and no weight is quantised; export to hf instead")
        ignore = sorted(stock.linear - {site for group in sites.values() for site in group})
        changes = {"dtype": "float16", "quantization_config": quantization_config(sites, ignore)}
        write_config(folder, config, flow, changes)
        copy_companions(source_folder, folder)
        write_card(
            folder, levels, "Format: compressed-tensors, `pack-quantized`; what is not listed is stored in fp16."
        )
    asymmetric = sum(len(names) for level, names in sites.items() if not level.symmetric)
    notes = [f"{asymmetric} weights are asymmetric, which transformers 5.23 does not load from this format"]
    return summary(out, counts, notes if asymmetric else [])


def _check(site: str, packed: Packed, stock: Stock) -> None:
    if site not in stock.linear:
        raise UserError(
            f"{site} is at level {packed.level}, and compressed-tensors quantises linear layers alone; leave it at bf16"
        )
    if not fits(packed.level, packed.shape):
        raise UserError(
            f"{site}, of {packed.shape[1]} columns, is at level {packed.level}, which compressed-tensors cannot "
            f"express; it takes {_TAKEN}, where groups divide the columns"
        )


def pack(packed: Packed) -> dict[str, Tensor]:
    """The tensors that the format stores for a packed weight, by their names in the module."""
    level: Int = packed.level  # type: ignore[assignment]
    rows, cols = packed.shape
    codes = unpack_bits(packed.tensors["codes"], level.bits, rows * cols).reshape(rows, cols)
    parts = {
        "weight_packed": words(codes, level.bits),
        "weight_scale": packed.tensors["scale"].reshape(rows, -1),
        "weight_shape": torch.tensor([rows, cols]),
    }
    if not level.symmetric:
        zero = packed.tensors["zero"].reshape(rows, -1)
        parts["weight_zero_point"] = words(zero.T, level.bits).T.contiguous()
    return parts


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes `[rows, n]` below 2**bits, of 4 or 8 bits, as int32 words `[rows, ceil(n * bits / 32)]`."""
    per_word = 32 // bits
    codes = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[1] % per_word))
    places = torch.arange(0, 32, bits, dtype=torch.int32)
    lanes = codes.reshape(codes.shape[0], -1, per_word) << places
    return lanes.sum(-1, dtype=torch.int64).to(torch.int32)  # lanes share no bit: their sum, wrapped, is their union


def quantization_config(sites: Mapping[Int, list[str]], ignore: list[str]) -> dict[str, Any]:
    """The entry of `config.json`: one group of sites a level, named one by one where there are several."""
    groups = {}
    for i, (level, names) in enumerate(sorted(sites.items(), key=lambda item: str(item[0]))):
        weights = {
            "num_bits": level.bits,
            "type": "int",
            "symmetric": level.symmetric,
            "strategy": "channel" if level.group is None else "group",
            "group_size": level.group,
            "dynamic": False,
        }
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(sites) == 1 else sorted(names),
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


# ---- reading


class CompressedTensors:
    """What `quantization_config` says of a compressed-tensors checkpoint.

    Which scheme a layer has is told by the shapes of its tensors; the patterns in the configuration are not run.

    Raises:
        UserError: floating-point codes, blocks, sparsity, or numbers that make no sense.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
            raise UserError(f"{where} is sparse ({sparsity['format']!r:.40}), and dense weights alone load: {CURE}")
        groups = config.get("config_groups")
        schemes = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        settings = [s for s in schemes if isinstance(s, dict)]
        for scheme in settings:
            kind, strategy = scheme.get("type", "int"), scheme.get("strategy")
            if kind != "int" or strategy not in ("group", "channel", "tensor", None):
                raise UserError(
                    f"{where} has weights of type {kind!r:.40} with a scale a {strategy!r:.40}; integers with a scale "
                    f"a group, channel or tensor load: {CURE}"
                )
        self.bits = whole_numbers(settings, "num_bits", tuple(range(1, 9)), where)
        self.groups = group_sizes(settings, "group_size", where)
        self.symmetric = any(scheme.get("symmetric", True) for scheme in settings)

    def read(self, checkpoint: Checkpoint, site: str, shape: Shape) -> Foreign:
        """The weight of a linear layer of this shape, `(out, in)`.

        Raises:
            UserError: its tensors are missing, damaged or of another shape.
        """
        rows, cols = shape
        name = f"{site}.weight"
        where = f"{checkpoint.path}: {name}"
        packed_codes = f"{name}_packed" in checkpoint
        bits = self.bits[0]
        if packed_codes:
            found = checkpoint.shape(f"{name}_packed")
            bits = next((b for b in self.bits if found == (rows, words_for(cols, b))), bits)
            expect(checkpoint, f"{name}_packed", ["I32"], (rows, words_for(cols, bits)))
            expect(checkpoint, f"{name}_shape", ["I64", "I32"], (2,))
            if checkpoint.read(f"{name}_shape").tolist() != [rows, cols]:
                raise UserError(f"{where}_shape is not {[rows, cols]}, as the configuration says; download it again")
        else:
            bits = max(self.bits)  # the codes themselves lie in int8, whatever their range
            expect(checkpoint, name, ["I8"], shape)
        seen = checkpoint.shape(f"{name}_scale") if f"{name}_scale" in checkpoint else ()
        whole = seen in ((), (1,), (1, 1))  # one scale for the matrix
        group = group_for(self.groups, cols, seen[1] if len(seen) == 2 else 1)
        grid = (rows, groups_of(cols, group))
        expect(checkpoint, f"{name}_scale", FLOATS, seen if whole or (group is None and seen == grid[:1]) else grid)
        zeros = f"{name}_zero_point" in checkpoint
        down = (words_for(rows, bits), grid[1])
        if zeros and packed_codes and checkpoint.dtype(f"{name}_zero_point") == "I32":
            expect(checkpoint, f"{name}_zero_point", ["I32"], down)
        elif zeros or not self.symmetric:
            expect(checkpoint, f"{name}_zero_point", ["I8"], seen)
        if f"{name}_g_idx" in checkpoint:
            expect(checkpoint, f"{name}_g_idx", ["I32", "I64"], (cols,))

        def per_group(tensor: Tensor) -> Tensor:
            return tensor.reshape(1 if whole else rows, -1).expand(grid).contiguous()

        def sides() -> tuple[Tensor, Tensor | None, Tensor | None]:
            scale = per_group(check_scale(checkpoint.read(f"{name}_scale"), f"{where}_scale"))
            zero = order = None
            if zeros:
                stored = checkpoint.read(f"{name}_zero_point")
                lanes = stored.dtype.itemsize == 4
                zero = unpack_words(stored.T, bits, rows).T if lanes else per_group(stored).int() + (1 << (bits - 1))
                if bool(((zero < 0) | (zero >= 1 << bits)).any()):
                    raise UserError(f"{where}_zero_point goes beyond {bits} bits; it is damaged: download it again")
            if f"{name}_g_idx" in checkpoint:
                index = checkpoint.read(f"{name}_g_idx")
                order = None if bool((index == -1).all()) else column_order(index, cols, group, f"{where}_g_idx")
            return scale, zero, order

        def packed() -> Packed:
            scale, zero, order = sides()
            if packed_codes:
                codes = unpack_words(checkpoint.read(f"{name}_packed"), bits, cols)
            else:
                codes = checkpoint.read(name).int() + (1 << (bits - 1))
                if bool(((codes < 0) | (codes >= 1 << bits)).any()):
                    raise UserError(f"{where} goes beyond {bits} bits; it is damaged: download it again")
            return settle(codes if order is None else codes[:, order], scale, zero, bits, group)

        scale, zero, order = sides()
        return Foreign(level_of(scale, zero, bits, group), shape, packed, order)
