"""GGUF files, which llama.cpp loads, for the llama family: Llama, Mistral, Qwen2 and Qwen3.

A weight that is packed at a level which a block type can say is written from its codes; blocks have 32 columns, so
longer groups repeat their scale. The rest is dense, and stored in the type that was asked for.

| level | block type | weight of a block |
|---|---|---|
| symmetric, 2-4 bits | Q4_0 | d (q - 8) |
| symmetric, 5 bits | Q5_0 | d (q - 16) |
| symmetric, 6-8 bits; asymmetric, 6-7 bits | Q8_0 | d q |
| asymmetric, 2-4 bits | Q4_1 | d q + m, where m = -d zero is rounded to fp16: by less than 1/100 of a step |
| asymmetric, 5 bits | Q5_1 | d q + m, by less than 1/60 of a step |
| `mxfp4` | MXFP4 | 2^(e-127) times the value of a 4-bit float |
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.journal import writing
from trimtab.core.level import Dense, Float, Int, Level, Shape
from trimtab.formats.huggingface import Flow, Stock, Tensors, summary

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from torch import Tensor

    from trimtab.formats.packed import Packed

TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1")
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
BLOCK = 32

# what a block of 32 weights holds: scale `d` (`e`: a power of two), offset `m`, the codes' low 4 bits with the block's
# first half in the low nibbles, their 5th bits, or whole codes `q`
LAYOUTS: dict[str, list[tuple[Any, ...]]] = {
    "Q4_0": [("d", "<f2"), ("low", "u1", BLOCK // 2)],
    "Q4_1": [("d", "<f2"), ("m", "<f2"), ("low", "u1", BLOCK // 2)],
    "Q5_0": [("d", "<f2"), ("high", "u1", BLOCK // 8), ("low", "u1", BLOCK // 2)],
    "Q5_1": [("d", "<f2"), ("m", "<f2"), ("high", "u1", BLOCK // 8), ("low", "u1", BLOCK // 2)],
    "Q8_0": [("d", "<f2"), ("q", "i1", BLOCK)],
    "MXFP4": [("e", "u1"), ("low", "u1", BLOCK // 2)],
}

# how llama.cpp splits text before it merges, by the pattern that tokenizer.json splits with
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}


def package() -> Any:
    """The package gguf, which knows the format's names and numbers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf; install it with `pip install 'trimtab[formats]'`") from None
    return gguf


def block_type(level: Level, shape: Shape) -> str | None:
    """The block type that takes the codes of a weight of this shape at this level, or None.

    >>> [block_type(level, (8, 192)) for level in (Int(4, 64, symmetric=True), Int(4, 32), Int(4, 48))]
    ['Q4_0', 'Q4_1', None]
    """
    if len(shape) != 2 or shape[1] % BLOCK:
        return None
    if isinstance(level, Float):
        return "MXFP4" if level == Float(2, 1, BLOCK, "e8m0") else None
    if not isinstance(level, Int) or level.scale == "e4m3" or level.hadamard or (level.group or BLOCK) % BLOCK:
        return None
    if level.symmetric:
        return "Q4_0" if level.bits <= 4 else "Q5_0" if level.bits == 5 else "Q8_0"
    return ("Q4_1" if level.bits <= 4 else "Q5_1") if level.bits <= 5 else "Q8_0" if level.bits <= 7 else None


def blocks(packed: Packed) -> tuple[np.ndarray, bool] | None:
    """The blocks of a packed weight `[out, bytes]`, and whether they stand for exactly the same weight.

    None where the level has no block type, or a scale or offset is beyond fp16.
    """
    import numpy as np

    from trimtab.formats.bitstream import unpack_bits
    from trimtab.formats.packed import load_scale

    kind = block_type(packed.level, packed.shape)
    if kind is None:
        return None
    level: Int | Float = packed.level  # type: ignore[assignment]
    rows, cols = packed.shape
    bits = level.bits if isinstance(level, Int) else 4
    codes = unpack_bits(packed.tensors["codes"], bits, rows * cols).numpy().reshape(rows, -1, BLOCK)

    def per_block(values: Tensor) -> np.ndarray:
        groups = values.reshape(rows, -1)
        repeat = codes.shape[1] if level.group is None else level.group // BLOCK
        return groups.repeat_interleave(repeat, dim=1)[:, : codes.shape[1]].numpy()

    made = np.empty(codes.shape[:2], dtype=LAYOUTS[kind])
    exact = True
    if kind == "MXFP4":
        made["e"] = per_block(packed.tensors["scale"])
    else:
        scale = per_block(load_scale(packed.tensors, level.scale))
        with np.errstate(over="ignore"):
            made["d"] = scale
        if not np.array_equal(made["d"].astype(np.float32), scale):
            return None
        symmetric = isinstance(level, Int) and level.symmetric
        zero = np.full_like(scale, 1 << (bits - 1)) if symmetric else per_block(packed.tensors["zero"].float())
        if kind in ("Q4_0", "Q5_0"):
            codes = codes + ((8 if kind == "Q4_0" else 16) - (1 << (bits - 1)))
        elif kind == "Q8_0":
            made["q"] = codes - zero[..., None]
        else:
            with np.errstate(over="ignore"):
                made["m"] = -zero * scale
            if not np.isfinite(made["m"]).all():
                return None
            exact = np.array_equal(made["m"].astype(np.float32), -zero * scale)
    if kind != "Q8_0":
        half = BLOCK // 2
        made["low"] = (codes[..., :half] & 15) | (codes[..., half:] & 15) << 4
    if kind.startswith("Q5"):
        made["high"] = np.packbits((codes >> 4).astype(np.uint8), axis=-1, bitorder="little")
    return made.view(np.uint8).reshape(rows, -1), exact


def export_gguf(
    tensors: Tensors,
    config: Mapping[str, Any],
    source_folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    type: str = "F16",
) -> dict[str, Any]:
    """Write a GGUF file; packed weights whose level a block type can say are written from their codes.

    Args:
        tensors: (name, dense tensor or `Packed`) of the whole model.
        config: the original's `config.json`.
        source_folder: holds `tokenizer.json`, a byte-level BPE, and its settings.
        out: the file to make, or a folder in which to make `model.gguf`.
        type: how the other matrices are stored: `F16`, `Q8_0`, `Q4_0` or `Q4_1`. Vectors are stored in fp32.

    Returns:
        `files`, `bytes`, `exact` (packed weights written from their codes with nothing changed), `rounded` (the same,
        but the offset of the blocks was rounded to fp16), `requantised` (dequantised, and stored in `type`) and
        `notes`, sentences on what the file does not keep.

    Raises:
        UserError: another architecture or tokenizer, an unknown type, or the tensors do not make the architecture.
    """
    if type not in TYPES:
        raise UserError(f"asked for GGUF type {type!r}; the types are {', '.join(TYPES)}")
    gguf = package()
    stock = Stock(config)
    if stock.kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"asked to export {stock.kind!r} to GGUF; the architectures that can be written are {known}")
    out = Path(out)
    file = out if out.suffix == ".gguf" else out / "model.gguf"
    counts: Counter[str] = Counter()
    notes: list[str] = []
    stored: Counter[str] = Counter()
    with writing(file):
        if file.exists():
            raise UserError(f"{file}: exists already; name another file or remove this one")
        file.parent.mkdir(parents=True, exist_ok=True)
        stem = file.parent / f".{file.name}.{secrets.token_hex(6)}"
        temporary, spool = stem.with_name(stem.name + ".tmp"), stem.with_name(stem.name + ".data.tmp")
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[stock.kind]]])
        try:
            _write_settings(writer, stock, config, notes)
            _write_tokenizer(writer, Path(source_folder), stock, notes)
            with open(spool, "w+b") as data:  # one pass over the tensors, and their table comes before them in the file
                writer.use_temp_file, writer.temp_file = True, data  # type: ignore[assignment]
                _write_tensors(writer, tensors, stock, type, counts, stored, notes)
                most = max(stored, key=lambda kind: (stored[kind], kind))
                name = "ALL_F32" if most == "F32" else f"MOSTLY_{most}"
                writer.add_file_type(gguf.LlamaFileType.__members__.get(name, gguf.LlamaFileType.GUESSED))
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
                writer.write_header_to_file()
                writer.write_kv_data_to_file()
                writer.write_tensors_to_file()
            for handle in writer.fout or ():
                os.fsync(handle.fileno())
            writer.close()
            os.replace(temporary, file)
        finally:
            writer.close()
            temporary.unlink(missing_ok=True)
            spool.unlink(missing_ok=True)
    return {**summary(file, counts, notes), "rounded": counts["rounded"]}


def _write_tensors(
    writer: GGUFWriter,
    tensors: Tensors,
    stock: Stock,
    type: str,
    counts: Counter[str],
    stored: Counter[str],
    notes: list[str],
) -> None:
    import gguf

    from trimtab.formats.packed import Packed

    config = stock.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[stock.kind]], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    remade: Counter[str] = Counter()
    for name, value in Flow(tensors, stock, "GGUF"):
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"GGUF has no name for {name!r} in the architecture {stock.kind}; export to hf instead")
        encoded = blocks(value) if isinstance(value, Packed) else None
        if encoded is not None and isinstance(value, Packed):
            array, kind = encoded[0], block_type(value.level, value.shape) or ""
            counts["exact" if encoded[1] else "rounded"] += 1
        else:
            array, kind = _dense(stock.dense(name, value).detach().float().cpu().numpy(), type)
            if isinstance(value, Packed) and not isinstance(value.level, Dense):
                counts["requantised"] += 1
                remade[f"{value.level} to {kind}"] += 1
            elif array.ndim == 2 and kind != type:
                notes.append(f"{name} is stored in {kind}: {type} cannot hold it")
        parts = name.split(".")
        if ARCHITECTURES[stock.kind] == "LLAMA" and len(parts) > 1 and parts[-2] in heads:
            array = array[rotary_order(len(array), heads[parts[-2]])]
        stored[kind] += array.nbytes
        _add(writer, target, array, kind)
    notes += [f"{n} weights were dequantised and stored anew: {what}" for what, n in sorted(remade.items())]
    if counts["rounded"]:
        notes.append(f"{counts['rounded']} weights keep their codes; the offsets of their blocks were rounded to fp16")
    if stock.kind == "llama":
        _write_rope_factors(writer, config)


def _add(writer: GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """Enter a tensor in the table and put its bytes in the spool; numpy's own `tofile` does not say why it fails."""
    import gguf
    import numpy as np

    spool = writer.temp_file
    assert spool is not None
    writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes, raw_dtype=gguf.GGMLQuantizationType[kind])
    spool.write(np.ascontiguousarray(array).data)
    writer.write_padding(spool, array.nbytes)


def _dense(weight: np.ndarray, type: str) -> tuple[np.ndarray, str]:
    """A dense weight in a type that can hold it; vectors are kept in F32, as are values beyond fp16."""
    import gguf
    import numpy as np

    if weight.ndim != 2:
        return weight, "F32"
    if type != "F16" and weight.shape[1] % BLOCK == 0 and np.abs(weight).max(initial=0) < 65504:
        return gguf.quantize(weight, gguf.GGMLQuantizationType[type]), type
    if np.abs(weight).max(initial=0) > 65504:
        return weight, "F32"
    return weight.astype(np.float16), "F16"


def rotary_order(rows: int, heads: int) -> np.ndarray:
    """Order of a query's or key's rows for llama.cpp, which rotates neighbours where transformers rotates halves."""
    import numpy as np

    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


# ---- metadata


def _write_settings(writer: GGUFWriter, stock: Stock, config: Mapping[str, Any], notes: list[str]) -> None:
    import gguf

    c = stock.config
    if c.hidden_act not in ("silu", "swish"):
        raise UserError(
            f"the model's activation is {c.hidden_act!r}, and GGUF's {stock.kind} has silu alone; export to hf instead"
        )
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    window = getattr(c, "sliding_window", None)
    if window and stock.kind == "mistral" and window < c.max_position_embeddings:
        notes.append(
            f"llama.cpp attends to the whole context; the model's sliding window of {window} tokens is not kept"
        )
    if getattr(c, "use_sliding_window", False) and stock.kind != "mistral":
        raise UserError(
            f"the model uses a sliding window, which GGUF's {stock.kind} does not have; export to hf instead"
        )
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(str(config.get("_name_or_path") or "")).name or c.__class__.__name__.removesuffix("Config"))
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    rope = c.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    elif kind != "default" and (kind, stock.kind) != ("llama3", "llama"):
        raise UserError(
            f"the model scales its positions by {kind!r}, which cannot be written to GGUF; export to hf instead"
        )


def _write_rope_factors(writer: GGUFWriter, config: Any) -> None:
    """Llama 3.1's stretched frequencies: what each is divided by, from 1 for short waves to `factor` for long ones."""
    import numpy as np

    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = []
    for i in range(0, dims, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (i / dims))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    _add(writer, "rope_freqs.weight", np.array(factors, dtype=np.float32), "F32")


def _write_tokenizer(writer: GGUFWriter, folder: Path, stock: Stock, notes: list[str]) -> None:
    """The vocabulary, merges and special tokens of a byte-level BPE.

    Raises:
        UserError: there is no `tokenizer.json`, or it is of another kind.
    """
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{file}: GGUF carries the tokenizer, and there is no such file; save the model's tokenizer there"
        )
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        model, added = tokenizer["model"], tokenizer.get("added_tokens") or []
        steps = _steps(tokenizer.get("pre_tokenizer"))
        if model.get("type") != "BPE" or not any(step.get("type") == "ByteLevel" for step in steps):
            raise UserError(
                f"{file}: only byte-level BPE can be written to GGUF, and this is another; export to hf instead"
            )
        size = stock.config.vocab_size
        tokens = {int(i): (token, gguf.TokenType.NORMAL) for token, i in model["vocab"].items()}
        for token in added:
            kind = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
            tokens[int(token["id"])] = (token["content"], kind)
        special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    except (KeyError, TypeError, ValueError, AttributeError) as reason:
        if isinstance(reason, UserError):
            raise
        raise UserError(f"{file}: the tokenizer's files are damaged ({str(reason)[:80]}); save them again") from None
    if max(tokens, default=-1) >= size:
        raise UserError(
            f"{file}: has token {max(tokens)}, and the model has {size} embeddings; use the model's own tokenizer"
        )
    table = [tokens.get(i, (f"[PAD{i}]", gguf.TokenType.UNUSED)) for i in range(size)]
    writer.add_tokenizer_model("gpt2")
    pre = _pre_tokenizer(steps)
    if pre == "default":
        notes.append(
            "llama.cpp does not know how this tokenizer splits text, and may make other tokens of the same text"
        )
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in table])
    writer.add_token_types([kind for _, kind in table])
    for which in ("bos", "eos"):
        token = getattr(stock.config, f"{which}_token_id", None)
        if which not in special.special_token_ids and isinstance(token, int) and 0 <= token < size:
            special.special_token_ids[which] = token
    special.add_to_gguf(writer, quiet=True)


def _steps(pre_tokenizer: Any) -> list[dict[str, Any]]:
    if not isinstance(pre_tokenizer, dict):
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]


def _pre_tokenizer(steps: list[dict[str, Any]]) -> str:
    """llama.cpp's name for the way text is split before merging; `default` where it has none."""
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return _PRE_TOKENIZERS.get((steps[0].get("pattern") or {}).get("Regex", ""), "default")
    return "default"
