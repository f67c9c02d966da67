"""GGUF files of the llama family, read into packed weights: whole files, one tensor at a time.

| block type | level | weight of a block |
|---|---|---|
| Q4_0, Q5_0, Q8_0 | `4b/g32/sym`, `5b/g32/sym`, `8b/g32/sym` | d (q - 2**(bits-1)); d may be negative |
| Q4_1, Q5_1 | `4b/g32+rN`, `5b/g32+rN` for N blocks a row | d q + m |
| MXFP4 | `mxfp4` | 2^(e-127) times the value of a 4-bit float |
| F16, BF16, F32 | `fp16`, `bf16`, `fp32` | |

The offset m is a number of its own and no whole number of steps, so that no zero point holds it. A low-rank part does,
to the bit: the offsets `[out, N]` times a matrix of 0 and 1 that says which columns make a block. The scales of the
K-quants are products of two stored numbers, which fp16 does not hold; they, and all other types that the package gguf
unpacks, become `fp32`: exact, and large.

The header is parsed here and checked in full before anything is used, as a safetensors header is, and tensors are
copied out with plain reads. llama.cpp's order of the rows of Llama's queries and keys is undone on whole rows of
blocks.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from trimtab.core.errors import UserError
from trimtab.core.level import Dense, Float, Int, Level, Plus, Rank, Shape
from trimtab.formats.checkpoint import Entry, damaged, read_into, reading
from trimtab.formats.gguf import BLOCK, LAYOUTS, package, rotary_order
from trimtab.formats.integers import check_scale
from trimtab.formats.packed import DTYPES, Packed, pack_dense, pack_float, pack_int, pack_plus, pack_rank

DENSE = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
BLOCKS: dict[str, Int | Float] = {
    "Q4_0": Int(4, BLOCK, symmetric=True),
    "Q4_1": Int(4, BLOCK),
    "Q5_0": Int(5, BLOCK, symmetric=True),
    "Q5_1": Int(5, BLOCK),
    "Q8_0": Int(8, BLOCK, symmetric=True),
    "MXFP4": Float(2, 1, BLOCK, "e8m0"),
}
# architecture -> transformers' model type and class; Mistral's files call themselves llama and compute the same
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
LARGEST = 1 << 24  # no size of a model is larger; a file that says so is broken
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LARGEST_E8M0 = 252  # of an MXFP4 block: 6 * 2^(252-127) is below fp32's largest; 255 is NaN


class GGUF:
    """A GGUF file: its metadata and where its tensors lie. Opening reads the header alone and checks all of it.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, cut off, damaged, no GGUF file, one part of several, of another architecture, or holds
            types of tensors that no level stands for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with reading(self.path) as file:
            cursor = _Cursor(self.path, file)
            if cursor.take(4) != b"GGUF":
                raise UserError(f"{self.path}: this is no GGUF file: it does not begin as one; name another")
            [version] = cursor.numbers("<I")
            if version not in (2, 3):
                raise UserError(
                    f"{self.path} is GGUF of version {version}, or its bytes lie in the other order; versions 2 and 3, "
                    "least significant byte first, load: convert it again"
                )
            tensors, pairs = cursor.numbers("<QQ")
            self.metadata: dict[str, Any] = {}
            for _ in range(pairs):
                key = cursor.text()
                if key in self.metadata:
                    raise damaged(self.path, f"the key {key!r:.80} comes twice")
                self.metadata[key] = cursor.value(cursor.numbers("<I")[0])
            table = [cursor.tensor() for _ in range(tensors)]
        self.kinds: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        self._place(table, cursor.place, cursor.size)
        self._check_kinds()

    def _place(self, table: list[tuple[str, tuple[int, ...], int, int]], head: int, file_size: int) -> None:
        """Find where the tensors of a table lie behind a header of `head` bytes."""
        gguf = package()
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > LARGEST:
            raise damaged(self.path, f"its alignment is {alignment!r:.40}, no power of two")
        base = -(-head // alignment) * alignment
        known = {int(t): t.name for t in gguf.GGMLQuantizationType}
        for name, dims, number, offset in table:
            if name in self.entries:
                raise damaged(self.path, f"tensor {name!r:.80} comes twice")
            if number not in known:
                raise UserError(f"{self.path}: tensor {name!r:.80} is of type {number}, which is unknown; update gguf")
            count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
            whole = all(1 <= n <= 1 << 40 for n in dims) and dims and dims[0] % count == 0
            if not whole or (known[number] not in DENSE and len(dims) != 2):
                raise damaged(self.path, f"tensor {name!r:.80} of {known[number]} has the shape {dims[::-1]}")
            start = base + offset
            stop = start + math.prod(dims) // count * size
            if offset % alignment or stop > file_size:
                lies = f"lies in bytes {start} to {stop} of the file, which has {file_size}"
                raise damaged(self.path, f"tensor {name!r:.80} {lies}")
            self.kinds[name], self.entries[name] = known[number], Entry(self.path, "U8", dims[::-1], start, stop)
        end, before = base, "the header"
        for name, entry in sorted(self.entries.items(), key=lambda item: item[1].start):
            if entry.start < end:
                raise damaged(self.path, f"the bytes of tensor {name!r:.80} overlap those of {before}")
            end, before = entry.stop, repr(name)

    def _check_kinds(self) -> None:
        architecture = str(self.metadata.get("general.architecture"))
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(
                f"{self.path} holds the architecture {architecture!r:.40}; those that load from GGUF are {known}, and "
                "Mistral as llama: give the model as a Hugging Face folder"
            )
        if self.metadata.get("split.count", 1) not in (0, 1):
            raise UserError(
                f"{self.path} is one of {self.metadata['split.count']} parts; join them first with "
                "`llama-gguf-split --merge FIRST_PART OUT.gguf`"
            )
        beyond = {kind for kind in set(self.kinds.values()) if kind not in BLOCKS and not _unpacks(kind)}
        if beyond:
            counts = Counter(self.kinds.values())
            found = ", ".join(f"{counts[kind]} of {kind}" for kind in sorted(beyond))
            raise UserError(
                f"{self.path} holds tensors of types that do not load: {found}; those that load packed are "
                f"{', '.join(BLOCKS)}: make one of them of the original, as with `llama-quantize MODEL Q8_0`"
            )

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, as torch has it."""
        return self.entries[name].shape

    def level(self, name: str) -> Level:
        """The level that holds a tensor exactly."""
        kind, shape = self.kinds[name], self.shape(name)
        if kind not in BLOCKS:
            return Dense(DENSE.get(kind, "fp32"))
        level = BLOCKS[kind]
        return Plus(level, Rank(shape[-1] // BLOCK)) if kind in ("Q4_1", "Q5_1") else level

    def read(self, name: str, heads: int | None = None) -> Packed:
        """A tensor at its level.

        Args:
            name: the file's name for it.
            heads: for queries and keys whose rows llama.cpp has put in another order: how many heads they make.

        Raises:
            UserError: a scale, or a weight that is stored as it is, is NaN or infinite.
        """
        entry, kind, shape = self.entries[name], self.kinds[name], self.shape(name)
        raw = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
        read_into(entry, entry.start, raw.numpy().data)
        rows = raw.reshape(shape[0], -1)
        if heads is not None:
            rows = rows[torch.from_numpy(rotary_order(shape[0], heads)).argsort()]
        where = f"{self.path}: {name}"
        if kind in BLOCKS:
            return unpack_blocks(rows.numpy(), kind, where)
        if kind in DENSE:
            weight = rows.reshape(-1).view(DTYPES[DENSE[kind]])
        else:
            weight = torch.from_numpy(_unpack(rows.numpy(), kind))
        if bad := int((~weight.isfinite()).sum()):
            raise UserError(f"{where} holds {bad} weights that are NaN or infinite; use a file with finite weights")
        return pack_dense(weight.reshape(shape), Dense(DENSE.get(kind, "fp32")))


def unpack_blocks(raw: np.ndarray, kind: str, where: str = "the tensor") -> Packed:
    """A weight of blocks, `raw [out, bytes]`, at the level that holds it exactly.

    Raises:
        UserError: a scale or an offset is NaN or infinite.
    """
    made = np.ascontiguousarray(raw).view(np.dtype(LAYOUTS[kind]))
    level = BLOCKS[kind]
    fields = {name for name, *_ in LAYOUTS[kind]}
    if "q" in fields:
        codes = made["q"].astype(np.int32) + 128
    else:
        codes = np.concatenate((made["low"] & 15, made["low"] >> 4), axis=-1).astype(np.int32)
        if "high" in fields:
            codes |= np.unpackbits(made["high"], axis=-1, bitorder="little").astype(np.int32) << 4
    rows, groups = made.shape
    shape = (rows, groups * BLOCK)
    flat = torch.from_numpy(codes.reshape(shape))
    if isinstance(level, Float):
        scale = torch.from_numpy(made["e"].copy())
        if bool((scale > _LARGEST_E8M0).any()):
            raise UserError(f"{where} holds scales that are NaN or beyond fp32; the file is damaged: download it again")
        return pack_float(flat, {"scale": scale}, level, shape)
    stored = {"scale": check_scale(torch.from_numpy(made["d"].copy()), where)}
    if level.symmetric:
        return pack_int(flat, stored, None, level, shape)
    base = pack_int(flat, stored, torch.zeros(rows, groups, dtype=torch.uint8), level, shape)
    offset = check_scale(torch.from_numpy(made["m"].copy()), where)
    belongs = torch.eye(groups, dtype=torch.float16).repeat_interleave(BLOCK, dim=1)
    return pack_plus(base, pack_rank(offset, belongs, None, Rank(groups), shape), Plus(level, Rank(groups)))


def _unpack(raw: np.ndarray, kind: str) -> np.ndarray:
    """The weights of a type that no level holds, fp32."""
    gguf = package()
    with np.errstate(all="ignore"):  # damaged scales are found among the weights
        return gguf.dequantize(raw, gguf.GGMLQuantizationType[kind])


def _unpacks(kind: str) -> bool:
    gguf = package()
    if kind in DENSE:
        return True
    try:
        _unpack(np.zeros((1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _Cursor:
    """A header read from front to back; nothing is taken that the file does not hold."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.place = path, file, 0
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size - self.place else b""
        if len(data) != count:
            raise damaged(self.path, f"the file is cut off: {count} bytes are wanted at {self.place} of {self.size}")
        self.place += count
        return data

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def text(self) -> str:
        data = self.take(self.numbers("<Q")[0])
        try:
            return data.decode("utf-8")
        except ValueError:
            raise damaged(self.path, f"the text before byte {self.place} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A value of the metadata; of a list of texts, which only the tokenizer has, its length."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.numbers("<IQ")
            if of in _SCALARS:
                size = struct.calcsize(_SCALARS[of])
                return np.frombuffer(self.take(count * size), np.dtype(_SCALARS[of])).tolist()
            if of == _STRING:
                for _ in range(count):
                    self.text()
                return count
            kind = of
        raise damaged(self.path, f"the value before byte {self.place} is of the unknown type {kind}")

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, sizes (the fastest first), number of the type, and offset of a tensor."""
        name = self.text()
        [dims] = self.numbers("<I")
        if dims > 4:
            raise damaged(self.path, f"tensor {name!r:.80} has {dims} dimensions")
        sizes = self.numbers(f"<{dims}Q")
        number, offset = self.numbers("<IQ")
        return name, sizes, number, offset


# ---- configuration and names


def configuration(file: GGUF) -> dict[str, Any]:
    """The `config.json` that a file's metadata amounts to.

    transformers reads a GGUF's configuration as well, but leaves out the size of heads, stretched positions and special
    tokens, without which the model is another one.

    Raises:
        UserError: a number is missing or makes no sense, or it is a variant of the architecture that does not load.
    """
    data = file.metadata
    architecture = data["general.architecture"]
    model_type, name = ARCHITECTURES[architecture]

    def size(key: str, default: int | None = None) -> int:
        found = data.get(f"{architecture}.{key}", default)
        if type(found) is not int or not 1 <= found <= LARGEST:
            raise damaged(file.path, f"{architecture}.{key} is {found!r:.40}, no size of a model")
        return found

    def number(key: str, default: float | None = None) -> float:
        found = data.get(f"{architecture}.{key}", default)
        if not isinstance(found, float) or not math.isfinite(found) or found <= 0:
            raise damaged(file.path, f"{architecture}.{key} is {found!r:.40}, no positive number")
        return found

    def refuse(what: str) -> UserError:
        return UserError(f"{file.path}: {what}, which does not load from GGUF: give the model as a Hugging Face folder")

    if data.get(f"{architecture}.expert_count"):
        raise refuse("the model is a mixture of experts")
    if "token_embd.weight" not in file.entries or len(file.shape("token_embd.weight")) != 2:
        raise damaged(file.path, "it has no table of embeddings, token_embd.weight")
    hidden, heads = size("embedding_length"), size("attention.head_count")
    head = size("attention.key_length", hidden // heads)
    if size("attention.value_length", head) != head or size("rope.dimension_count", head) != head or head % 2:
        raise refuse("values or rotated parts of heads are of another size than keys")
    blocks = size("block_count")
    if blocks > len(file.entries):
        raise damaged(file.path, f"it says that it has {blocks} blocks, and holds {len(file.entries)} tensors")
    special = {which: data.get(f"tokenizer.ggml.{key}_token_id") for which, key in _SPECIAL.items()}
    vocabulary = file.shape("token_embd.weight")[0]
    config = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "max_position_embeddings": size("context_length"),
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head,
        "hidden_act": "silu",
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _positions(file, head, number, refuse),
        "tie_word_embeddings": "output.weight" not in file.entries,
        **{f"{w}_token_id": i if type(i) is int and 0 <= i < vocabulary else None for w, i in special.items()},
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.entries
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.entries
    return config


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _positions(file: GGUF, head: int, number: Any, refuse: Any) -> dict[str, Any]:
    """How positions turn into angles: base, and what stretches them."""
    data, architecture = file.metadata, file.metadata["general.architecture"]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": number("rope.freq_base", 10000.0)}
    kind = data.get(f"{architecture}.rope.scaling.type", "none")
    if f"{architecture}.rope.scale_linear" in data or kind not in ("none", "linear", "yarn"):
        raise refuse(f"positions are scaled in the way {kind!r:.40}")
    if kind != "none":
        rope |= {"rope_type": kind, "factor": number("rope.scaling.factor")}
    if kind == "yarn":
        original = data.get(f"{architecture}.rope.scaling.original_context_length")
        if type(original) is not int or not 1 <= original <= LARGEST:
            raise damaged(file.path, f"the context before it was stretched is {original!r:.40}")
        rope["original_max_position_embeddings"] = original
        if f"{architecture}.rope.scaling.attn_factor" in data:
            raise refuse("the attention of stretched positions has a factor of its own")
    if "rope_freqs.weight" in file.entries:
        if kind != "none" or file.shape("rope_freqs.weight") != (head // 2,):
            raise refuse("positions are scaled twice, or not by a factor a frequency")
        # what each frequency is divided by: with the same factors for short and long texts, `longrope` says just that
        factors = file.read("rope_freqs.weight").dense().tolist()
        context = data[f"{architecture}.context_length"]
        rope |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
        rope |= {"factor": 1.0, "original_max_position_embeddings": context}
    return rope


def file_names(file: GGUF, names: Iterable[str]) -> dict[str, str]:
    """The file's name for each of the model's tensors that it holds.

    Raises:
        UserError: the file holds a tensor that the model does not have.
    """
    gguf = package()
    architecture = file.metadata["general.architecture"]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, file.metadata[f"{architecture}.block_count"])
    wanted = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    found = {name: target for name, target in wanted.items() if target in file.entries}
    extra = sorted(file.entries.keys() - set(found.values()) - {"rope_freqs.weight"})
    if extra:
        raise UserError(
            f"{file.path} holds {len(extra)} tensors that the architecture {architecture} does not have, first "
            f"{extra[0]!r:.80}: it is a variant that does not load; give the model as a Hugging Face folder"
        )
    return found


def rotated_heads(file: GGUF, target: str, config: dict[str, Any]) -> int | None:
    """How many heads the rows of a tensor make whose order llama.cpp has changed, as it does in Llama's; else None."""
    part = target.split(".")[-2]
    if file.metadata["general.architecture"] != "llama" or part not in ("attn_q", "attn_k"):
        return None
    return config["num_attention_heads"] if part == "attn_q" else config["num_key_value_heads"]


def has_tokenizer(file: GGUF) -> bool:
    """Whether the file has a tokenizer."""
    return "tokenizer.ggml.model" in file.metadata


def starts_text(file: GGUF) -> bool:
    """Whether a text begins with the start token."""
    return file.metadata.get("tokenizer.ggml.add_bos_token", True) is True
