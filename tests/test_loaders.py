"""What others quantised loads as it is: compared with the formats' own libraries, weight by weight and by logits."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.naive_quantized import IntQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from conftest import Said
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import (
    BLOCKS,
    IDS,
    SYMMETRIC,
    at_levels,
    config_of,
    dense,
    export_compressed_tensors,
    export_gguf,
    logits,
    source,
    stock_logits,
    weights_of,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.core.errors import UserError
from trimtab.core.level import Dense, Int, parse_level
from trimtab.engine.run import PackedLinear
from trimtab.formats.awq import AWQ
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.compressed_tensors import CompressedTensors
from trimtab.formats.gguf_reader import unpack_blocks
from trimtab.formats.gptq import GPTQ
from trimtab.formats.integers import Foreign
from trimtab.formats.packed import Packed
from trimtab.formats.structure import Gathered, replay
from trimtab.loading import load
from trimtab.models.quantised import is_quantised, open_quantised

__all__ = ["source"]  # a fixture


def exact(packed: Packed, reference: Tensor | np.ndarray) -> None:
    """Equal to the bit, and of the bytes that its level says."""
    assert torch.equal(packed.dense(), torch.as_tensor(reference))
    assert packed.nbytes == packed.level.bytes(packed.shape)


def same_everywhere(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """A loaded model has the weights given and their logits, unpacked or packed."""
    for packed in (False, True):
        loaded = load(path, packed=packed)
        assert any(isinstance(m, PackedLinear) for m in loaded.model.modules()) == packed
        torch.testing.assert_close(logits(loaded.model), stock_logits(config, weights.items()), rtol=1e-5, atol=1e-5)
    contents = open_quantised(path).contents
    for name, read in contents.packed.items():
        assert str(read().level) == contents.manifest["packed"][name]["level"]
        if f"{name.removesuffix('linear.weight')}order" not in contents.dense:
            exact(read(), weights[name])
    for name in set(contents.dense) & weights.keys():
        assert torch.equal(contents.read(name).float(), weights[name]), name


# ---- GGUF

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4")
SIZES = {kind: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1] for kind in KINDS}


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 1e3]),
)
def test_blocks_of_weights(kind: str, rows: int, count: int, seed: int, size: float) -> None:
    weight = np.random.default_rng(seed).normal(size=(rows, 32 * count)).astype(np.float32) * np.float32(size)
    number = gguf.GGMLQuantizationType[kind]
    raw = gguf.quantize(weight, number)
    exact(unpack_blocks(raw, kind), gguf.dequantize(raw, number))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 3), st.data())
def test_blocks_of_any_bytes(kind: str, rows: int, count: int, data: st.DataObject) -> None:
    size = rows * count * SIZES[kind]
    raw = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(rows, -1)
    try:
        packed = unpack_blocks(raw, kind)
    except UserError as refusal:
        assert "NaN" in str(refusal)
        return
    exact(packed, gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_with_scales_that_are_no_numbers(kind: str) -> None:
    with pytest.raises(UserError, match="NaN"):
        unpack_blocks(np.full((2, SIZES[kind]), 255, np.uint8), kind)


def write_gguf(
    path: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    kind_of: Callable[[str], str],
    tokenizer: Path | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """A GGUF file by the format's own library; the weights that it stands for.

    Args:
        kind_of: the type of a matrix by its name; vectors are F32.
        changes: metadata to add or to replace, None to leave out; underscores for dots.
    """
    architecture = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    head = config["head_dim"]
    values: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](key if "general" in key or "split" in key else f"{architecture}.{key}", value)
    if tokenizer is not None:
        content = json.loads((tokenizer / "tokenizer.json").read_text())
        tokens = {i: t for t, i in content["model"]["vocab"].items()}
        tokens |= {t["id"]: t["content"] for t in content["added_tokens"]}
        listed = [tokens.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])]
        special = {t["id"]: 3 if t["special"] else 4 for t in content["added_tokens"]}
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(listed)
        writer.add_token_types([special.get(i, 1 if i in tokens else 5) for i in range(len(listed))])
        writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in content["model"]["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    stands: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        kind = gguf.GGMLQuantizationType[kind_of(name) if tensor.dim() == 2 else "F32"]
        array, heads = tensor.numpy(), None
        if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        raw = array if kind.name == "F32" else gguf.quantize(array, kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(raw), raw_dtype=kind)
        back = gguf.dequantize(raw, kind).reshape(array.shape)
        if heads is not None:
            back = back.reshape(heads, -1, 2, *back.shape[1:]).swapaxes(1, 2).reshape(back.shape)
        stands[name] = torch.tensor(back)
    if config["tie_word_embeddings"]:
        stands["lm_head.weight"] = stands["model.embed_tokens.weight"]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stands


def mixed(name: str) -> str:
    parts = {"q_proj": "Q4_0", "k_proj": "Q8_0", "v_proj": "Q4_1", "o_proj": "BF16", "gate": "Q5_0", "up": "Q5_1"}
    rest = {"down": "MXFP4", "embed": "Q8_0", "lm_head": "F16"}
    return next(kind for part, kind in {**parts, **rest}.items() if part in name)


MODELS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 128}),
    ("qwen3", {"head_dim": 32}),
]


@pytest.mark.parametrize(("kind", "changes"), MODELS)
def test_gguf(tmp_path: Path, source: Path, kind: str, changes: dict[str, Any]) -> None:
    config = config_of(kind, **changes)
    path = tmp_path / "m.gguf"
    stands = write_gguf(path, config, weights_of(config), mixed, source)
    same_everywhere(path, config, stands)
    levels = {n: row["level"] for n, row in open_quantised(path).contents.manifest["packed"].items()}
    layer = "model.layers.1"
    assert levels[f"{layer}.self_attn.q_proj.weight"] == "4b/g32/sym"
    assert levels[f"{layer}.self_attn.v_proj.weight"] == "4b/g32+r2"
    assert levels[f"{layer}.mlp.down_proj.weight"] == "mxfp4"
    assert levels["model.embed_tokens.weight"] == "8b/g32/sym"
    tokenizer, original = load(path).tokenizer, AutoTokenizer.from_pretrained(source)
    for text in ("the lazy fox, it's 12345 times", "naïve 日本\n\n  x"):
        assert tokenizer(text, add_special_tokens=False).input_ids == original(text).input_ids[1:]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("kind", "changes"), [m for m in MODELS if m != ("qwen3", {"head_dim": 32}) and "mlp_bias" not in m[1]]
)
@pytest.mark.parametrize("type_", ["F16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_as_transformers_loads_it(
    tmp_path: Path, source: Path, kind: str, changes: dict[str, Any], type_: str
) -> None:
    config = config_of(kind, **changes)
    write_gguf(tmp_path / "m.gguf", config, weights_of(config), lambda name: type_, source)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ours = load(tmp_path / "m.gguf")
    loaded = ours.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in theirs.state_dict().items())
    assert torch.equal(logits(ours.model), logits(theirs))


ROPES = [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda r: r["rope_type"])
def test_gguf_stretched_positions(tmp_path: Path, source: Path, rope: dict[str, Any]) -> None:
    original = {} if rope["rope_type"] == "linear" else {"original_max_position_embeddings": 32}
    config = config_of(head_dim=32, rope_parameters={**rope, **original})
    tensors = at_levels(weights_of(config), BLOCKS)
    export_gguf(tensors, config, source, tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf").model
    ids = torch.arange(100).reshape(1, -1)  # beyond the context that was stretched
    stored = [(n, v if isinstance(v, Packed) else v.half() if v.dim() == 2 else v) for n, v in tensors]
    plain = config_of(head_dim=32)
    with torch.no_grad():
        found = model(ids).logits
        torch.testing.assert_close(found, built(config, stored)(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, built(plain, stored)(ids).logits, rtol=1e-2, atol=1e-2)


def built(config: dict[str, Any], tensors: list[tuple[str, Any]]) -> nn.Module:
    import transformers

    kind = type(transformers.AutoConfig.for_model(**config))
    model = getattr(transformers, config["architectures"][0])(kind.from_dict(config))
    model.load_state_dict({name: dense(value) for name, value in tensors})
    return model.eval()


def test_what_the_exporter_wrote_comes_back_at_its_levels(tmp_path: Path, source: Path) -> None:
    config = config_of()
    levels = {"q_proj": "4b/g32/sym", "k_proj": "8b/g32/sym", "v_proj": "5b/g32/sym", "gate_proj": "mxfp4"}
    tensors = dict(at_levels(weights_of(config), levels))
    export_gguf(tensors.items(), config, source, tmp_path / "m.gguf")
    packed = open_quantised(tmp_path / "m.gguf").contents.packed
    assert packed.keys() == {name for name, value in tensors.items() if isinstance(value, Packed)}
    for name, read in packed.items():
        again, before = read(), tensors[name]
        assert again.level == before.level
        for part, tensor in before.tensors.items():
            assert torch.equal(again.tensors[part], tensor.reshape(again.tensors[part].shape))


def test_types_that_no_level_has_are_unpacked_and_named(tmp_path: Path) -> None:
    config = config_of(hidden_size=256, head_dim=64)
    weights = weights_of(config)
    stands = write_gguf(tmp_path / "plain.gguf", config, weights, lambda n: "F32" if "lm_head" in n else "Q4_0")
    rng, size = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q6_K][1]
    raw = rng.integers(0, 256, (300, size), dtype=np.uint8)
    raw[:, -2:] = np.full((300, 1), 1e-4, np.float16).view(np.uint8)  # the scale of the whole
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        mine = tensor.name == "output.weight"
        kind = gguf.GGMLQuantizationType.Q6_K if mine else tensor.tensor_type
        writer.add_tensor(tensor.name, raw if mine else np.array(tensor.data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load(tmp_path / "m.gguf", packed=True)
    assert len(loaded.notes) == 1 and "1 of 21 tensors" in loaded.notes[0] and "1 of Q6_K" in loaded.notes[0]
    stands["lm_head.weight"] = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q6_K))
    assert torch.equal(loaded.model.lm_head.weight, stands["lm_head.weight"])
    torch.testing.assert_close(logits(loaded.model), stock_logits(config, stands.items()), rtol=1e-5, atol=1e-5)


def test_a_text_starts_as_the_file_says(tmp_path: Path, source: Path) -> None:
    config = config_of("qwen2")
    path = tmp_path / "m.gguf"
    write_gguf(path, config, weights_of(config), mixed, source, **{"general__nothing": "x"})
    assert load(path).tokenizer.bos_token_id == 0
    writer = gguf.GGUFWriter
    added = writer.add_eos_token_id
    try:
        writer.add_eos_token_id = lambda self, i: (added(self, i), self.add_add_bos_token(False))  # type: ignore
        write_gguf(path, config, weights_of(config), mixed, source)
    finally:
        writer.add_eos_token_id = added  # type: ignore[method-assign]
    assert load(path).tokenizer.bos_token_id is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_count": None}, "llama.block_count is None"),
        ({"block_count": 3}, "lacks 9 of the model's tensors"),
        ({"block_count": 1}, "holds 9 tensors that the architecture llama does not have, first 'blk.1"),
        ({"block_count": 1000}, "1000 blocks, and holds 21"),
        ({"embedding_length": 32}, "does not belong|do not belong"),
        ({"feed_forward_length": 1 << 30}, "no size of a model"),
        ({"attention__head_count": 0}, "head_count is 0"),
        ({"attention__head_count_kv": [2, 2]}, r"head_count_kv is \[2, 2\]"),
        ({"attention__value_length": 8}, "another size than keys"),
        ({"rope__dimension_count": 8}, "rotated parts"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "no positive number"),
        ({"rope__scaling__type": "longrope"}, "scaled in the way 'longrope'"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, "before it was stretched"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one of 3 parts.*llama-gguf-split --merge"),
        ({"general.alignment": 24}, "no power of two"),
    ],
)
def test_gguf_refuses(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    config = config_of()
    write_gguf(tmp_path / "m.gguf", config, weights_of(config), lambda name: "F16", **changes)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "m.gguf")


def test_gguf_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    config = config_of()
    weights = weights_of(config)
    with pytest.raises(UserError, match="no such file"):
        load(path)
    for content, words in (
        (b"", "cut off"),
        (b"PK\x03\x04 and more", "no GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other order"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60), "cut off"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture 'None'"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + b"key", "cut off"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load(path)
    path.unlink()
    write_gguf(path, {**config, "model_type": "phi3"}, {}, mixed)
    with pytest.raises(UserError, match=r"'phi3'.*llama, qwen2, qwen3"):
        load(path)
    path.unlink()
    weights["model.norm.weight"][0] = float("nan")
    write_gguf(path, config, weights, mixed)
    with pytest.raises(UserError, match=r"output_norm.weight holds 1 weights that are NaN"):
        load(path)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory, source: Path) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    config = config_of(num_hidden_layers=1)
    write_gguf(path, config, weights_of(config), mixed, source)
    return path.read_bytes()


def loads_or_refuses(path: Path) -> None:
    try:
        loaded = load(path, packed=True)
        with torch.no_grad():
            loaded.model(IDS)
    except UserError as refusal:
        assert str(refusal)
    except IndexError as error:  # the metadata may say that there are fewer tokens than the test uses
        assert "index out of range" in str(error)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cut_gguf_is_refused(
    tmp_path_factory: pytest.TempPathFactory, whole_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(whole_file[: data.draw(st.integers(0, len(whole_file) - 64))])
    with pytest.raises(UserError):
        load(path)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_a_damaged_gguf_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, whole_file: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    damaged = bytearray(whole_file)
    header = data.draw(st.sampled_from([700, 13_000, len(damaged)]))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    loads_or_refuses(path)


# ---- GPTQ and AWQ: the formats' layouts, bit by bit and slowly


def grid(rows: int, cols: int, bits: int, group: int | None, sym: bool, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[out, in]`, fp16 scales and zero points `[out, groups]`."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-cols // (group or cols))
    codes = torch.randint(0, 1 << bits, (rows, cols), generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.001).half()
    zero = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    return codes, scale, torch.full_like(zero, 1 << (bits - 1)) if sym else zero


def weight_of(codes: Tensor, scale: Tensor, zero: Tensor, index: Tensor) -> Tensor:
    """(code - zero) * scale of each column's group."""
    return (codes.float() - zero.float()[:, index]) * scale.float()[:, index]


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """Codes end to end in words of 32 bits, signed."""
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def gptq_parts(codes: Tensor, scale: Tensor, zero: Tensor, index: Tensor, bits: int, version: int) -> dict[str, Tensor]:
    stored = (zero - 1) % (1 << bits) if version == 1 else zero
    return {
        "qweight": torch.tensor([bit_stream(row, bits) for row in codes.tolist()], dtype=torch.int32).T.contiguous(),
        "qzeros": torch.tensor([bit_stream(row, bits) for row in stored.T.tolist()], dtype=torch.int32),
        "scales": scale.T.contiguous(),
        "g_idx": index.int(),
    }


def awq_parts(codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
    def words(rows: Tensor) -> Tensor:
        lanes = [
            [row[8 * w + o] for w in range(len(row) // 8) for o in (0, 2, 4, 6, 1, 3, 5, 7)] for row in rows.tolist()
        ]
        return torch.tensor([bit_stream(row, 4) for row in lanes], dtype=torch.int32)

    return {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": scale.T.contiguous()}


def read_one(folder: Path, parts: dict[str, Tensor], reader: Any, shape: tuple[int, int]) -> Foreign:
    write_safetensors({f"site.{name}": tensor for name, tensor in parts.items()}, folder / "model.safetensors")
    return reader.read(Checkpoint(folder), "site", shape)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    blocks=st.integers(1, 4),
    rows=st.sampled_from([32, 96]),
    group=st.sampled_from([None, 16, 32, 48, 128]),
    sym=st.booleans(),
    version=st.sampled_from([1, 2]),
    act_order=st.booleans(),
    seed=st.integers(0, 9),
)
def test_gptq_layers(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    blocks: int,
    rows: int,
    group: int | None,
    sym: bool,
    version: int,
    act_order: bool,
    seed: int,
) -> None:
    cols = 32 * blocks
    codes, scale, zero = grid(rows, cols, bits, group, sym, seed)
    index = torch.arange(cols) // (group or cols)
    if act_order:
        index = index[torch.randperm(cols, generator=torch.Generator().manual_seed(seed))]
    config = {
        "bits": bits,
        "group_size": group or -1,
        "sym": sym,
        "checkpoint_format": ["gptq", "gptq_v2"][version - 1],
    }
    parts = gptq_parts(codes, scale, zero, index, bits, version)
    found = read_one(tmp_path_factory.mktemp("gptq"), parts, GPTQ(config, "here"), (rows, cols))
    packed, weight = found.read(), weight_of(codes, scale, zero, index)
    assert packed.level == found.level == Int(bits, group, symmetric=bool((zero == 1 << (bits - 1)).all()))
    exact(packed, weight if found.order is None else weight[:, found.order])
    assert (found.order is None) == bool((index.diff() >= 0).all())


@settings(max_examples=30, deadline=None)
@given(
    cols=st.integers(1, 90),
    words=st.integers(1, 9),
    group=st.sampled_from([None, 16, 32, 128]),
    sym=st.booleans(),
    seed=st.integers(0, 9),
)
def test_awq_layers(
    tmp_path_factory: pytest.TempPathFactory, cols: int, words: int, group: int | None, sym: bool, seed: int
) -> None:
    codes, scale, zero = grid(8 * words, cols, 4, group, sym, seed)
    config = {"bits": 4, "group_size": group or -1, "version": "gemm", "zero_point": True}
    parts = awq_parts(codes, scale, zero)
    found = read_one(tmp_path_factory.mktemp("awq"), parts, AWQ(config, "here"), (8 * words, cols))
    assert found.level == Int(4, group, symmetric=bool((zero == 8).all()))
    exact(found.read(), weight_of(codes, scale, zero, torch.arange(cols) // (group or cols)))


def test_scales_that_fp16_does_not_hold_are_unpacked(tmp_path: Path) -> None:
    codes, scale, zero = grid(32, 64, 4, 32, False, 0)
    index = torch.arange(64) // 32
    config = {"bits": 4, "group_size": 32, "version": "gemm"}
    held = awq_parts(codes, scale.bfloat16(), zero)
    found = read_one(tmp_path, held, AWQ(config, "here"), (32, 64))
    assert found.level == Int(4, 32)
    exact(found.read(), weight_of(codes, scale.bfloat16(), zero, index))
    tiny = scale.bfloat16()
    tiny[3, 1] = 1e-7
    found = read_one(tmp_path, awq_parts(codes, tiny, zero), AWQ(config, "here"), (32, 64))
    assert found.level == Dense("fp32")
    exact(found.read(), weight_of(codes, tiny, zero, index))


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_folder(
    folder: Path, config: dict[str, Any], quantisation: dict[str, Any], source: Path, parts_of: Callable[..., Any]
) -> dict[str, Tensor]:
    """A folder whose linears are quantised by `parts_of(rows, cols, seed)`; the weights that it stands for."""
    stored: dict[str, Tensor] = {}
    stands: dict[str, Tensor] = {}
    for seed, (name, tensor) in enumerate(weights_of(config).items()):
        if name.endswith("weight") and name.split(".")[-2] in LINEARS:
            parts, stands[name] = parts_of(*tensor.shape, seed)
            stored |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        else:
            stored[name] = tensor.half()
            stands[name] = stored[name].float()
    shutil.copytree(source, folder)
    (folder / "pytorch_model.bin").unlink()
    write_safetensors(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return stands


def gptq_layer(bits: int, group: int | None, sym: bool, act_order: bool, bias: bool = False) -> Callable[..., Any]:
    def parts_of(rows: int, cols: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = grid(rows, cols, bits, group, sym, seed)
        index = torch.arange(cols) // (group or cols)
        index = index[torch.randperm(cols, generator=torch.Generator().manual_seed(seed))] if act_order else index
        parts = gptq_parts(codes, scale, zero, index, bits, 1)
        return parts | ({"bias": torch.zeros(rows)} if bias else {}), weight_of(codes, scale, zero, index)

    return parts_of


def awq_layer(rows: int, cols: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale, zero = grid(rows, cols, 4, 32, False, seed)
    return awq_parts(codes, scale, zero), weight_of(codes, scale, zero, torch.arange(cols) // 32)


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sym", "act_order"), [(True, False), (False, False), (False, True)])
def test_gptq_folder(tmp_path: Path, source: Path, bits: int, sym: bool, act_order: bool) -> None:
    config = config_of("qwen2" if act_order else "llama")  # with biases, which move along
    layer = gptq_layer(bits, 32, sym, act_order, bias=not act_order)
    if act_order:
        del config["head_dim"]
    stands = write_folder(tmp_path / "m", config, {**GPTQ_CONFIG, "bits": bits, "sym": sym}, source, layer)
    same_everywhere(tmp_path / "m", config, stands)
    loaded = load(tmp_path / "m", packed=True)
    gathered = [m for m in loaded.model.modules() if isinstance(m, Gathered)]
    assert len(gathered) == (14 if act_order else 0)
    assert loaded.tokenizer("the fox").input_ids[0] == 0 and loaded.notes == ()
    assert loaded.generate("the", 3) is not None


def test_awq_folder(tmp_path: Path, source: Path) -> None:
    config = config_of()
    same_everywhere(tmp_path / "m", config, write_folder(tmp_path / "m", config, AWQ_CONFIG, source, awq_layer))


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_configurations_of_older_libraries(tmp_path: Path, source: Path, file: str) -> None:
    config = config_of()
    gptq = file == "quantize_config.json"
    layer = gptq_layer(4, None, False, True) if gptq else awq_layer
    stands = write_folder(tmp_path / "m", config, {}, source, layer)
    old = {"bits": 4, "group_size": -1} if gptq else {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    (tmp_path / "m" / file).write_text(json.dumps(old))
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    same_everywhere(tmp_path / "m", config, stands)


def test_layers_with_numbers_of_their_own(tmp_path: Path, source: Path) -> None:
    config = config_of()

    def layer(rows: int, cols: int, seed: int) -> Any:
        return gptq_layer(8 if cols == 96 else 4, None if cols == 96 else 32, False, False)(rows, cols, seed)

    dynamic = {"+:.*down_proj": {"bits": 8, "group_size": -1}, "-:lm_head": {}}
    stands = write_folder(tmp_path / "m", config, {**GPTQ_CONFIG, "dynamic": dynamic}, source, layer)
    same_everywhere(tmp_path / "m", config, stands)
    rows = open_quantised(tmp_path / "m").contents.manifest["packed"]
    assert {row["level"] for row in rows.values()} == {"4b/g32", "8b/row"}


def test_gathered_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    replay(model, [{"op": "gather", "path": "0"}])
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        "0.order": (4,),
        "0.linear.weight": (3, 4),
        "0.linear.bias": (3,),
    }
    order, x = torch.tensor([2, 0, 3, 1], dtype=torch.int32), torch.randn(2, 5, 4)
    model[0].order.copy_(order)
    assert torch.equal(model[0](x), model[0].linear(x[..., order.long()]))
    with pytest.raises(UserError, match="'1' is ReLU"):
        replay(model, [{"op": "gather", "path": "1"}])


# ---- compressed-tensors


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    strategy=st.sampled_from(["group", "channel"]),
    symmetric=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_compressed_tensors_layers(
    tmp_path_factory: pytest.TempPathFactory,
    bits: int,
    rows: int,
    groups: int,
    strategy: Any,
    symmetric: bool,
    packed: bool,
    seed: int,
) -> None:
    group, cols = (32 if strategy == "group" else None), 32 * groups
    codes, scale, zero = grid(rows, cols, bits, group, symmetric, seed)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    half, index = 1 << (bits - 1), torch.arange(cols) // (group or cols)
    stated = {"weight": weight_of(codes, scale, zero, index), "weight_scale": scale.float()}
    if not symmetric:
        stated["weight_zero_point"] = (zero - half).to(torch.int8)
    library: Any = PackedQuantizationCompressor if packed else IntQuantizationCompressor
    parts = library.compress(dict(stated), scheme)
    config = {"config_groups": {"group_0": {"weights": args.model_dump(mode="json")}}}
    found = read_one(tmp_path_factory.mktemp("ct"), parts, CompressedTensors(config, "here"), (rows, cols))
    assert found.level == Int(bits, group, symmetric=symmetric or bool((zero == half).all()))
    # the library does not unpack 4-bit zero points that fill but one word a group
    beyond = packed and not symmetric and bits == 4 and rows <= 8
    exact(found.read(), stated["weight"] if beyond else library.decompress(parts, scheme)["weight"])


def test_one_scale_for_the_whole_matrix(tmp_path: Path) -> None:
    weight, scale = torch.randint(-128, 128, (5, 7), dtype=torch.int8), torch.tensor([0.25])
    scheme = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True}
    reader = CompressedTensors({"config_groups": {"group_0": {"weights": scheme}}}, "here")
    found = read_one(tmp_path, {"weight": weight, "weight_scale": scale}, reader, (5, 7))
    assert found.level == Int(8, None, symmetric=True)
    exact(found.read(), weight.float() * 0.25)


@pytest.mark.parametrize("levels", [SYMMETRIC, {"_proj": "4b/g32/sym"}, {"down_proj": "8b/row", "up_proj": "4b/g64"}])
@pytest.mark.parametrize("tied", [False, True])
def test_compressed_tensors_folder(tmp_path: Path, source: Path, levels: dict[str, str], tied: bool) -> None:
    config = config_of(tie_word_embeddings=tied)
    tensors = at_levels(weights_of(config), levels)
    export_compressed_tensors(tensors, config, source, tmp_path / "m")
    stands = {n: dense(v) if isinstance(v, Packed) else v.half().float() for n, v in tensors}
    same_everywhere(tmp_path / "m", config, stands)
    found = open_quantised(tmp_path / "m").contents.packed
    for name, value in tensors:
        if isinstance(value, Packed):
            again = found[name]().tensors
            assert again.keys() == value.tensors.keys()
            assert all(
                torch.equal(again[part], tensor.reshape(again[part].shape)) for part, tensor in value.tensors.items()
            )
    if all(parse_level(text).symmetric for text in levels.values()):  # transformers loads no others
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        torch.testing.assert_close(logits(load(tmp_path / "m").model), logits(theirs), rtol=1e-5, atol=1e-5)


# ---- refusals

CT_SCHEME = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def ct(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {**CT_SCHEME, **changes}}}}


@pytest.mark.parametrize(
    ("quantisation", "words"),
    [
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes.*GPTQ, AWQ and compressed-tensors"),
        ([], "no object"),
        ({**GPTQ_CONFIG, "checkpoint_format": "marlin"}, "'marlin'.*gptq and gptq_v2"),
        ({**GPTQ_CONFIG, "bits": 5}, "bits=5; those that load are 2, 3, 4, 8"),
        ({**GPTQ_CONFIG, "bits": True}, "bits=True"),
        ({**GPTQ_CONFIG, "bits": None}, "bits=None"),
        ({**GPTQ_CONFIG, "bits": 8}, r"down_proj.qweight is I32 of shape \[12, 64\].*\[24, 64\]"),
        ({**GPTQ_CONFIG, "group_size": 64}, r"scales is F16 of shape \[3, 64\].*\[2, 64\]"),
        ({**GPTQ_CONFIG, "group_size": 0}, "group_size=0, which is no size"),
        ({**GPTQ_CONFIG, "pack_dtype": "int8"}, "packs codes in 'int8'"),
        ({**AWQ_CONFIG, "version": "gemv"}, "'gemv'; gemm alone"),
        ({**AWQ_CONFIG, "bits": 8}, "bits=8; those that load are 4"),
        (AWQ_CONFIG, r"qweight is I32 of shape \[12, 64\].*\[96, 8\]"),
        (ct(type="float", num_bits=8), "of type 'float'"),
        (ct(strategy="block"), "'block'"),
        (ct(num_bits=16), "num_bits=16"),
        ({"quant_method": "compressed-tensors"}, "num_bits=None"),
        ({**ct(), "sparsity_config": {"format": "sparse-24-bitmask"}}, "is sparse"),
    ],
)
def test_folders_are_refused(tmp_path: Path, source: Path, quantisation: Any, words: str) -> None:
    config = config_of()
    write_folder(tmp_path / "m", config, quantisation, source, gptq_layer(4, 32, False, False))
    with pytest.raises(UserError, match=words):
        load(tmp_path / "m")


SITE = "model.layers.0.self_attn.q_proj"
DAMAGES: list[tuple[dict[str, Any], str]] = [
    ({f"{SITE}.qweight": None}, "lacks 1 of the model's tensors, model.layers.0.self_attn.q_proj.weight"),
    ({f"{SITE}.scales": None}, "scales is missing"),
    ({f"{SITE}.qzeros": torch.zeros(2, 8)}, "qzeros is F32.*I32"),
    ({f"{SITE}.scales": torch.full((2, 64), float("nan")).half()}, "scales holds 128 scales.*NaN"),
    ({f"{SITE}.g_idx": torch.zeros(64, dtype=torch.int32)}, "put 32 columns in each group.*desc_act=False"),
    ({f"{SITE}.g_idx": torch.full((64,), -5, dtype=torch.int32)}, "put 32 columns in each group"),
    ({f"{SITE}.bias": torch.ones(64)}, "q_proj.bias, which the configuration's architecture does not have"),
    ({"model.norm.weight": torch.full((64,), float("inf"))}, "not finite"),
    ({"model.norm.weight": torch.ones(65)}, r"shape \(65,\).*\(64,\)"),
    ({"model.norm.weight": None}, "lacks 1.*model.norm.weight"),
]
BROKEN_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 1 << 40}, "1099511627776 layers"),
    ({"architectures": [{}]}, "no list of names"),
    ({"head_dim": 1 << 40}, "does not make a model"),
    ({"hidden_size": None}, "does not make a model"),
]


@pytest.mark.parametrize(("changes", "words"), DAMAGES)
def test_damaged_folders_are_refused(tmp_path: Path, source: Path, changes: dict[str, Any], words: str) -> None:
    config = config_of()
    write_folder(tmp_path / "m", config, GPTQ_CONFIG, source, gptq_layer(4, 32, False, False))
    stored = Checkpoint(tmp_path / "m")
    tensors = {name: stored.read(name) for name in stored.names()} | changes
    write_safetensors({n: t for n, t in tensors.items() if t is not None}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match=words):
        load(tmp_path / "m")


@pytest.mark.parametrize(("changes", "words"), BROKEN_CONFIGS)
def test_broken_configurations_are_refused(tmp_path: Path, source: Path, changes: dict[str, Any], words: str) -> None:
    config = config_of()
    write_folder(tmp_path / "m", config, AWQ_CONFIG, source, awq_layer)
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "quantization_config": AWQ_CONFIG, **changes}))
    with pytest.raises(UserError, match=words):
        load(tmp_path / "m")


def test_a_folder_without_a_quantised_weight(tmp_path: Path, source: Path) -> None:
    config = config_of()
    write_folder(tmp_path / "m", config, GPTQ_CONFIG, source, awq_layer)
    write_safetensors(weights_of(config), tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="no weight of it is"):
        load(tmp_path / "m")


FOLDERS = {"gptq": (GPTQ_CONFIG, gptq_layer(4, 32, False, True)), "awq": (AWQ_CONFIG, awq_layer)}


@pytest.fixture(scope="module", params=[*FOLDERS, "compressed-tensors"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    path = tmp_path_factory.mktemp("folder") / "m"
    config = config_of(num_hidden_layers=1)
    if request.param in FOLDERS:
        write_folder(path, config, FOLDERS[request.param][0], source, FOLDERS[request.param][1])
    else:
        export_compressed_tensors(at_levels(weights_of(config), {"_proj": "4b/g32"}), config, source, path)
    return path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_folder_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "m"
    shutil.copytree(folder, path)
    file = path / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 3)) if content else 0):
        content[data.draw(st.integers(0, min(len(content), 9000) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    loads_or_refuses(path)


# ---- the command line


def test_run(tmp_path: Path, source: Path, cli: Callable[..., Said]) -> None:
    config = config_of()
    path = tmp_path / "m.gguf"
    write_gguf(path, config, weights_of(config), mixed, source)
    assert is_quantised(path)
    said = cli("run", path, "--prompt", "the fox", "--tokens", "4")
    assert said.code == 0 and said.out.startswith("the fox")
    assert cli("run", path, "--packed", "--prompt", "the fox", "--tokens", "4").out == said.out
    path.write_bytes(path.read_bytes()[:5000])
    said = cli("run", path, "--prompt", "the fox")
    assert said.code == 2 and "cut off" in said.err and "Traceback" not in said.err


def test_fit_refuses_what_is_quantised(tmp_path: Path, source: Path, cli: Callable[..., Said]) -> None:
    config = config_of()
    write_folder(tmp_path / "m", config, AWQ_CONFIG, source, awq_layer)
    write_gguf(tmp_path / "m.gguf", config, weights_of(config), mixed, source)
    for model, words in ((tmp_path / "m", "already quantised"), (tmp_path / "m.gguf", "is a file")):
        said = cli("fit", model, "--size", "1MB", "--out", tmp_path / "out")
        assert said.code == 2 and words in said.err.replace("\n", " ")
