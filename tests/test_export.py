"""What an exporter writes is read back by the target's own library, and compared weight by weight and by logits."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab.core.errors import UserError
from trimtab.core.level import NM, Codebook, Float, Int, Level, Plus, Rank, Sparse, parse_level
from trimtab.formats.checkpoint import Checkpoint
from trimtab.formats.compressed_tensors import export_compressed_tensors, pack, words
from trimtab.formats.gguf import block_type, blocks, export_gguf
from trimtab.formats.huggingface import export_hf, expressible
from trimtab.formats.minifloat import encode_magnitude
from trimtab.formats.packed import (
    Packed,
    pack_codebook,
    pack_float,
    pack_int,
    pack_nm,
    pack_plus,
    pack_rank,
    pack_sparse,
    spread,
    store_scale,
)

IDS = torch.tensor([[0, 5, 17, 130, 260, 299, 3, 3, 44, 201]])


def packed(weight: Tensor, level: Level) -> Packed:
    """A weight at a level by the simplest means there are: the exporters have to keep it, whatever it is."""
    w = weight.float()
    rows, cols = w.shape
    match level:
        case Int():
            top, group = 2**level.bits - 1, level.group or cols
            padded = torch.nn.functional.pad(w, (0, -cols % group)).reshape(rows, -1, group)
            low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
            scale = padded.abs().amax(-1) / 2 ** (level.bits - 1) if level.symmetric else (high - low) / top
            scale, stored = store_scale(scale.clamp_min(1e-6), level.scale)
            zero = (
                torch.full_like(scale, 2 ** (level.bits - 1))
                if level.symmetric
                else (-low / scale).round().clamp(0, top)
            )
            codes = (w / spread(scale, level.group, cols)).round() + spread(zero, level.group, cols)
            return pack_int(codes.clamp(0, top).int(), stored, None if level.symmetric else zero, level, (rows, cols))
        case Float():
            group = level.group or cols
            peak = w.reshape(rows, -1, group).abs().amax(-1)
            scale, stored = store_scale(peak / 6, level.scale)
            codes = encode_magnitude(w / spread(scale, level.group, cols), level.e, level.m) + (w < 0) * 2 ** (
                level.e + level.m
            )
            return pack_float(codes.int(), stored, level, (rows, cols))
        case Codebook():
            book = w.reshape(-1, level.dim)[: level.size]
            return pack_codebook(
                [torch.cdist(w.reshape(-1, level.dim), book).argmin(1).int()], [book], level, (rows, cols)
            )
        case Sparse():
            order = w.abs().argsort(dim=1).argsort(dim=1)
            return pack_sparse(w, order >= int(level.ratio * cols), level, (rows, cols))
        case NM():
            place = w.abs().reshape(rows, -1, level.m).argsort(-1).argsort(-1)
            return pack_nm(w, (place >= level.m - level.n).reshape(rows, cols), level, (rows, cols))
        case Rank():
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            bias = torch.ones(rows) if level.bias else None
            return pack_rank(u[:, : level.rank] * s[: level.rank], v[: level.rank], bias, level, (rows, cols))
        case Plus():
            base = packed(w, level.base)
            return pack_plus(base, packed(w - base.dense(), level.extra), level)
    raise AssertionError(level)


def dense(value: Tensor | Packed) -> Tensor:
    return value.dense() if isinstance(value, Packed) else value.float()


def config_of(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    other = {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "head_dim": 16}
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    fields = {**sizes, **other, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, **changes}
    return {**fields, "model_type": kind, "architectures": [f"{names[kind]}ForCausalLM"], "torch_dtype": "float32"}


def weights_of(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, config["architectures"][0])(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # norms and biases too, so that a lost one shows
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def at_levels(weights: dict[str, Tensor], levels: dict[str, str]) -> list[tuple[str, Tensor | Packed]]:
    """Weights at the levels given for parts of their names, the rest dense."""

    def one(name: str, tensor: Tensor) -> Tensor | Packed:
        level = next((text for part, text in levels.items() if part in name and name.endswith("weight")), None)
        return tensor if level is None else packed(tensor, parse_level(level))

    return [(name, one(name, tensor)) for name, tensor in weights.items()]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def stock_logits(config: dict[str, Any], tensors: Iterable[tuple[str, Tensor | Packed]]) -> Tensor:
    import transformers

    model = getattr(transformers, config["architectures"][0])(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    model.load_state_dict({name: dense(value) for name, value in tensors})
    return logits(model)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE of 298 tokens, so that two of the model's 300 embeddings have none."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=297,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog", "it's fine, 123 times"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_tokens(["<think>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    (folder / "LICENSE").write_text("a licence")
    (folder / "pytorch_model.bin").write_bytes(b"never copied")
    return folder


# ---- what can be expressed


def test_what_each_target_takes() -> None:
    takes = {
        "4b/g32/sym": "hf gguf compressed-tensors",
        "4b/g64/sym": "hf gguf compressed-tensors",
        "4b/row/sym": "hf gguf compressed-tensors",
        "8b/g128/sym": "hf gguf compressed-tensors",
        "bf16": "hf gguf compressed-tensors",
        "4b/g64": "hf gguf",
        "5b/g32": "hf gguf",
        "6b/g32": "hf gguf",
        "3b/g32/sym": "hf gguf",
        "mxint8": "hf gguf",
        "mxfp4": "hf gguf",
        "8b/g32": "hf",
        "4b/g48/sym": "hf",
        "4b/g16/sym": "hf",
        "4b/g32/sym/h": "hf",
        "nvint4": "hf",
        "nvfp4": "hf",
        "mxfp8": "hf",
        "vq/d4/k256": "hf",
        "50%": "hf",
        "2:4": "hf",
        "r16": "hf",
        "4b/g64+r8": "hf",
        "r16/bias": "",
        "4b/g64+r8/bias": "",
        "w50%": "",
        "drop": "",
    }
    targets = ("hf", "gguf", "compressed-tensors")
    found = {text: " ".join(t for t in targets if expressible(t, parse_level(text), (128, 384))) for text in takes}
    assert found == takes
    assert not expressible("gguf", parse_level("4b/row/sym"), (8, 48))
    assert not expressible("compressed-tensors", parse_level("4b/g64/sym"), (8, 96))
    with pytest.raises(UserError, match="onnx"):
        expressible("onnx", parse_level("bf16"), (8, 8))


# ---- Hugging Face

EVERY = {
    "q_proj": "4b/g64",
    "k_proj": "vq/d4/k64",
    "v_proj": "50%",
    "o_proj": "2:4",
    "gate_proj": "r8",
    "up_proj": "4b/g32/sym+r4",
    "down_proj": "mxfp4",
    "embed_tokens": "8b/row",
}


def test_hf_holds_every_level_exactly_in_fp32(tmp_path: Path, source: Path) -> None:
    config = config_of()
    tensors = at_levels(weights_of(config), EVERY)
    done = export_hf(tensors, config, source, tmp_path / "out", "fp32")
    assert (done["exact"], done["requantised"]) == (15, 0)
    assert done["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").iterdir())
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], dense(value)) for name, value in tensors)
    assert torch.equal(logits(model), stock_logits(config, tensors))
    names = {f.name for f in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "LICENSE", "README.md", "config.json"} <= names
    assert "pytorch_model.bin" not in names
    assert "| `2:4` | 2 |" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the fox").input_ids[0] == 0


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_hf_counts_what_a_narrower_type_rounds(tmp_path: Path, dtype: str, torch_dtype: torch.dtype) -> None:
    config = config_of()
    tensors = at_levels(weights_of(config), {"q_proj": "4b/row/sym", "v_proj": "mxint4"})
    done = export_hf(tensors, config, None, tmp_path / "out", dtype, shard_bytes=20_000)
    rounded = [
        not torch.equal(v.dense().to(torch_dtype).float(), v.dense()) for _, v in tensors if isinstance(v, Packed)
    ]
    assert (done["exact"], done["requantised"]) == (rounded.count(False), rounded.count(True))
    assert done["exact"] >= 2 and done["requantised"] >= 2
    assert len(Checkpoint(tmp_path / "out").files) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], dense(value).to(torch_dtype)) for name, value in tensors)


@pytest.mark.parametrize("given", ["both", "embedding", "head"])
def test_hf_keeps_tied_weights_tied(tmp_path: Path, given: str) -> None:
    config = config_of(tie_word_embeddings=True)
    left_out = {"both": "", "embedding": "lm_head.weight", "head": "model.embed_tokens.weight"}[given]
    weights = weights_of(config)
    export_hf([(n, t) for n, t in weights.items() if n != left_out], config, None, tmp_path / "out", "fp32")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, weights["lm_head.weight"])


def test_hf_unties_what_was_compressed_apart(tmp_path: Path) -> None:
    config = config_of(tie_word_embeddings=True)
    tensors = at_levels(weights_of(config), {"lm_head": "4b/g32/sym", "embed": "8b/row"})
    export_hf(tensors, config, None, tmp_path / "out", "fp32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], dense(value)) for name, value in tensors)


def test_hf_turns_a_weight_that_its_module_stores_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 300}
    config = GPT2Config(**sizes).to_dict() | {"architectures": ["GPT2LMHeadModel"]}
    weights = GPT2LMHeadModel(GPT2Config(**sizes)).state_dict()
    square = "transformer.h.0.attn.c_proj.weight"
    tensors = {**weights, square: packed(weights[square].T, parse_level("8b/row"))}
    export_hf(tensors.items(), config, None, tmp_path / "out", "fp32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded[square], tensors[square].dense().T)
    assert (loaded[square] - weights[square]).abs().max() < 1e-3


# ---- GGUF


def read_gguf(path: Path) -> dict[str, np.ndarray]:
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in gguf.GGUFReader(path).tensors
    }


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    return None if found is None else found.contents()


BLOCKS = {
    "q_proj": "4b/g32/sym",
    "k_proj": "8b/g64/sym",
    "v_proj": "5b/row/sym",
    "o_proj": "6b/g32",
    "gate_proj": "mxfp4",
    "up_proj": "mxint4",
    "down_proj": "3b/g96/sym",
    "lm_head": "7b/row",
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128}),  # transformers reads no other from a GGUF of this kind
    ],
)
def test_gguf_as_transformers_reads_it(tmp_path: Path, source: Path, kind: str, changes: dict[str, Any]) -> None:
    config = config_of(kind, **changes)
    if kind == "qwen2":
        del config["head_dim"]
    levels = {k: v for k, v in BLOCKS.items() if not (config["tie_word_embeddings"] and k == "lm_head")}
    tensors = at_levels(weights_of(config), levels)
    done = export_gguf(tensors, config, source, tmp_path / "m.gguf", "F16")
    count = sum(isinstance(v, Packed) for _, v in tensors)
    assert (done["exact"], done["rounded"], done["requantised"]) == (count, 0, 0)
    assert [f.name for f in tmp_path.iterdir()] == ["m.gguf"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    loaded = model.state_dict()
    assert model.config.tie_word_embeddings == config["tie_word_embeddings"]
    stored = [(n, v if isinstance(v, Packed) or v.dim() == 1 else v.half()) for n, v in tensors]
    for name, value in stored:
        assert torch.equal(loaded[name], dense(value)), name
    torch.testing.assert_close(logits(model), stock_logits(config, stored), rtol=1e-5, atol=1e-5)


def test_gguf_biases_of_rotated_rows_move_with_them(tmp_path: Path, source: Path) -> None:
    config = config_of(attention_bias=True)
    weights = weights_of(config)
    export_gguf(weights.items(), config, source, tmp_path / "m.gguf")
    stored = read_gguf(tmp_path / "m.gguf")
    for part, rows, heads in (("q", 64, 4), ("k", 32, 2)):
        bias = weights[f"model.layers.1.self_attn.{part}_proj.bias"].numpy()
        weight = weights[f"model.layers.1.self_attn.{part}_proj.weight"].half().float().numpy()
        size = rows // heads
        for head in range(heads):
            for i in range(size):  # llama.cpp pairs neighbours 2i and 2i + 1; transformers pairs i and i + size / 2
                row = head * size + i // 2 + (i % 2) * size // 2
                assert stored[f"blk.1.attn_{part}.bias"][head * size + i] == bias[row]
                assert np.array_equal(stored[f"blk.1.attn_{part}.weight"][head * size + i], weight[row])


def test_gguf_offsets_are_rounded_to_fp16_and_counted(tmp_path: Path, source: Path) -> None:
    config = config_of()
    tensors = at_levels(weights_of(config), {"up_proj": "4b/g32", "v_proj": "5b/g64"})
    done = export_gguf(tensors, config, source, tmp_path)
    assert done["files"] == [str(tmp_path / "model.gguf")]
    assert (done["exact"], done["rounded"], done["requantised"]) == (0, 4, 0)
    assert any("offsets" in note for note in done["notes"])
    stored = read_gguf(tmp_path / "model.gguf")
    for name, target, limit in (("mlp.up_proj", "ffn_up", 1 / 100), ("self_attn.v_proj", "attn_v", 1 / 60)):
        value = dict(tensors)[f"model.layers.0.{name}.weight"]
        error = np.abs(stored[f"blk.0.{target}.weight"] - value.dense().numpy())
        step = spread(value.tensors["scale"].float(), value.level.group, 64).numpy()
        assert 0 < (error / step).max() < limit


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_gguf_stores_the_rest_in_the_type_asked_for(tmp_path: Path, source: Path, kind: str) -> None:
    config = config_of()
    tensors = at_levels(weights_of(config), {"v_proj": "50%", "o_proj": "4b/g32/sym", "up_proj": "nvint4"})
    done = export_gguf(tensors, config, source, tmp_path / "m.gguf", kind)
    assert (done["exact"], done["rounded"], done["requantised"]) == (2, 0, 4)
    assert f"2 weights were dequantised and stored anew: 50% to {kind}" in done["notes"]
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_output.weight"] == "Q4_0" and kinds["output_norm.weight"] == "F32"
    assert {kinds[n] for n in kinds if n.endswith("weight") and "norm" not in n and "attn_output" not in n} == {kind}
    values = dict(tensors)
    for name, hf in (
        ("blk.1.attn_v.weight", "model.layers.1.self_attn.v_proj.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        expected = gguf.quantize(dense(values[hf]).numpy(), gguf.GGMLQuantizationType[kind])
        assert np.array_equal(next(t.data for t in reader.tensors if t.name == name), expected)
    assert gguf.LlamaFileType(field(tmp_path / "m.gguf", "general.file_type")).name == f"MOSTLY_{kind}"


def test_gguf_falls_back_where_a_type_cannot_hold_a_weight(tmp_path: Path, source: Path) -> None:
    config = config_of(intermediate_size=72)
    weights = weights_of(config)
    weights["lm_head.weight"][0, 0] = 1e6
    done = export_gguf(weights.items(), config, source, tmp_path / "m.gguf", "Q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["output.weight"] == "F32"
    assert sum("Q8_0 cannot hold it" in note for note in done["notes"]) == 3


int_levels = st.builds(
    Int,
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 32, 64, 96]),
    symmetric=st.booleans(),
    scale=st.sampled_from(["f16", "e8m0"]),
)


@settings(max_examples=60, deadline=None)
@given(int_levels, st.integers(1, 20), st.integers(1, 5), st.integers(0, 9), st.sampled_from([1e-3, 1.0, 1e3, 1e8]))
def test_gguf_blocks_stand_for_the_packed_weight(level: Int, rows: int, n: int, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = packed(torch.randn(rows, 32 * n, generator=generator) * size, level)
    found, kind = blocks(weight), block_type(level, weight.shape)
    if found is None:
        assert kind is None or size == 1e8
        return
    decoded = torch.from_numpy(gguf.dequantize(found[0], gguf.GGMLQuantizationType[str(kind)]))
    if found[1]:
        assert torch.equal(decoded, weight.dense())
    else:
        assert not level.symmetric and not torch.equal(decoded, weight.dense())
        assert (decoded - weight.dense()).abs().max() <= max(2**-10 * float(decoded.abs().max()), 2**-24)


def test_gguf_tokenizer(tmp_path: Path, source: Path) -> None:
    config = config_of()
    done = export_gguf(weights_of(config).items(), config, source, tmp_path / "m.gguf")
    assert done["notes"] == []
    path = tmp_path / "m.gguf"
    original, again = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("the lazy fox, it's 12345 times", "naïve 日本\n\n  x", "</s><think>dog"):
        assert original(text).input_ids == again(text).input_ids
    assert field(path, "tokenizer.ggml.model") == "gpt2" and field(path, "tokenizer.ggml.pre") == "gpt-2"
    types = field(path, "tokenizer.ggml.token_type")
    assert types[0] == gguf.TokenType.CONTROL and types[297] == gguf.TokenType.USER_DEFINED
    assert types[298:] == [gguf.TokenType.UNUSED] * 2 and len(types) == 300
    assert (field(path, "tokenizer.ggml.bos_token_id"), field(path, "tokenizer.ggml.eos_token_id")) == (0, 1)
    assert field(path, "tokenizer.ggml.add_bos_token") is True
    assert "m.content" in field(path, "tokenizer.chat_template")


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        (["llama3"], "llama-bpe"),
        (["qwen2"], "qwen2"),
        ([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()], "default"),
    ],
)
def test_gguf_names_how_text_is_split(tmp_path: Path, source: Path, steps: list[Any], name: str) -> None:
    from tokenizers import Regex
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if isinstance(steps[0], str):
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[steps[0]]), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = config_of(num_hidden_layers=1)
    done = export_gguf(weights_of(config).items(), config, tmp_path, tmp_path / "m.gguf")
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.pre") == name
    assert any("splits text" in note for note in done["notes"]) == (name == "default")
    assert field(tmp_path / "m.gguf", "tokenizer.ggml.bos_token_id") == 0


def test_gguf_stretched_positions(tmp_path: Path, source: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = config_of(head_dim=32, rope_parameters={**rope, "original_max_position_embeddings": 64})
    export_gguf(weights_of(config).items(), config, source, tmp_path / "m.gguf")
    made = CONFIG_MAPPING["llama"].from_dict(config)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](made, device="cpu")
    plain = 1e4 ** (-torch.arange(0, 32, 2) / 32)
    factors = torch.tensor(read_gguf(tmp_path / "m.gguf")["rope_freqs.weight"])
    torch.testing.assert_close(plain / factors, stretched)
    assert factors[0] == 1 and factors[-1] == 8 and ((factors > 1) & (factors < 8)).any()


def test_gguf_bytes_are_the_same_each_time(tmp_path: Path, source: Path) -> None:
    config = config_of()
    tensors = at_levels(weights_of(config), BLOCKS)
    for name in "ab":
        export_gguf(tensors, config, source, tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# ---- compressed-tensors

SYMMETRIC = {
    "q_proj": "4b/g64/sym",
    "k_proj": "4b/g32/sym",
    "v_proj": "8b/g32/sym",
    "o_proj": "8b/row/sym",
    "up_proj": "4b/row/sym",
}


@pytest.mark.parametrize(
    "levels", [SYMMETRIC, {"_proj": "4b/g32/sym"}, {"down_proj": "8b/row/sym", "lm_head": "8b/row/sym"}]
)
@pytest.mark.parametrize("tied", [False, True])
def test_compressed_tensors_as_transformers_reads_it(
    tmp_path: Path, source: Path, levels: dict[str, str], tied: bool
) -> None:
    config = config_of(tie_word_embeddings=tied)
    tensors = at_levels(weights_of(config), levels)
    done = export_compressed_tensors(tensors, config, source, tmp_path / "out")
    assert (done["exact"], done["requantised"], done["notes"]) == (
        sum(isinstance(v, Packed) for _, v in tensors),
        0,
        [],
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = logits(model)  # the first forward unpacks the weights
    loaded = model.state_dict()
    stored = [(name, value if isinstance(value, Packed) else value.half()) for name, value in tensors]
    for name, value in stored:
        assert torch.equal(loaded[name], dense(value)), name
    apart = {**config, "tie_word_embeddings": tied and "lm_head" not in levels}
    torch.testing.assert_close(found, stock_logits(apart, stored), rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("fox").input_ids[0] == 0


@pytest.mark.parametrize("text", ["4b/g32", "4b/g64", "4b/row", "8b/g32", "8b/row", "4b/g64/sym", "8b/row/sym"])
def test_compressed_tensors_as_its_library_unpacks_it(tmp_path: Path, text: str) -> None:
    config = config_of(intermediate_size=192)
    tensors = at_levels(weights_of(config), {"gate_proj": text})
    done = export_compressed_tensors(tensors, config, None, tmp_path / "out")
    level = parse_level(text)
    assert bool(done["notes"]) != level.symmetric
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    described = QuantizationConfig.model_validate(written["quantization_config"])
    [scheme] = described.config_groups.values()
    checkpoint = Checkpoint(tmp_path / "out")
    for name, value in tensors:
        if not isinstance(value, Packed):
            assert torch.equal(checkpoint.read(name), value.half())
            continue
        site = name.removesuffix("weight")
        parts = {n.removeprefix(site): checkpoint.read(n) for n in checkpoint.names() if n.startswith(site)}
        assert set(parts) == set(PackedQuantizationCompressor.compression_param_names(scheme))
        wide = {**parts, "weight_scale": parts["weight_scale"].float()}
        assert torch.equal(PackedQuantizationCompressor.decompress(wide, scheme)["weight"], value.dense())
        half = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(half, value.dense().half())
        again = PackedQuantizationCompressor.compress({"weight": value.dense(), **_unpacked_zero(wide, value)}, scheme)
        assert torch.equal(again["weight_packed"], parts["weight_packed"])


def _unpacked_zero(parts: dict[str, Tensor], value: Packed) -> dict[str, Tensor]:
    scale = {"weight_scale": parts["weight_scale"]}
    if value.level.symmetric:
        return scale
    zero = value.tensors["zero"].reshape(scale["weight_scale"].shape).int() - 2 ** (value.level.bits - 1)
    return {**scale, "weight_zero_point": zero.to(torch.int8)}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9))
def test_words_are_the_librarys(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, cols), generator=torch.Generator().manual_seed(seed))
    signed = (codes - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words(codes, bits), pack_to_int32(signed, bits))
    assert torch.equal(words(codes.T, bits).T, pack_to_int32(signed, bits, packed_dim=0))


def test_a_packed_weight_takes_the_bytes_of_its_level() -> None:
    level = parse_level("4b/g32/sym")
    value = packed(torch.randn(64, 64), level)
    stored = {name: t.numel() * t.element_size() for name, t in pack(value).items()}
    assert stored.pop("weight_shape") == 16 and sum(stored.values()) == level.bytes((64, 64))


# ---- refusals


def exporters(source: Path) -> dict[str, Any]:
    return {
        "hf": lambda tensors, config, out: export_hf(tensors, config, source, out, "fp16"),
        "gguf": lambda tensors, config, out: export_gguf(tensors, config, source, out / "m.gguf"),
        "compressed-tensors": lambda tensors, config, out: export_compressed_tensors(tensors, config, source, out),
    }


@pytest.mark.parametrize("target", ["hf", "gguf", "compressed-tensors"])
def test_what_no_target_can_hold(tmp_path: Path, source: Path, target: str) -> None:
    config = config_of()
    weights = weights_of(config)
    levels = {"q_proj": "4b/g64/sym"}
    site = "model.layers.1.mlp.up_proj.weight"
    cases: list[tuple[list[tuple[str, Any]], dict[str, Any], str]] = [
        ([(n, t) for n, t in at_levels(weights, levels) if n != site], config, f"missing, first '{site}'"),
        (at_levels({**weights, site: weights[site][:80]}, levels), config, r"up_proj has shape \(80, 64\).*structural"),
        (at_levels({**weights, "model.extra.weight": weights[site]}, levels), config, "no such weight"),
        (at_levels(weights, {**levels, "v_proj": "r8/bias"}), config, "v_proj is at level r8/bias.*choose r8"),
        (at_levels(weights, levels), {**config, "model_type": "unheard-of"}, "'unheard-of'"),
        (at_levels(weights, levels), {"hidden_size": 64}, "model type None"),
        (at_levels(weights, levels), {**config, "hidden_size": "wide"}, "makes no model"),
    ]
    for tensors, configuration, words_ in cases:
        with pytest.raises(UserError, match=words_):
            exporters(source)[target](tensors, configuration, tmp_path / "out")
        assert not [f for f in tmp_path.rglob("*") if f.is_file()]
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "m.gguf").write_bytes(b"mine")
    with pytest.raises(UserError, match="remove this one"):
        exporters(source)[target](at_levels(weights, levels), config, tmp_path / "out")
    assert [f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()] == [b"mine"]


@pytest.mark.parametrize("target", ["hf", "gguf", "compressed-tensors"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, source: Path, target: str) -> None:
    config = config_of()
    tensors = at_levels(weights_of(config), {"q_proj": "4b/g64/sym"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="disk is full"):
            exporters(source)[target](tensors, config, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_weights_too_large_for_fp16(tmp_path: Path) -> None:
    config = config_of()
    weights = weights_of(config)
    weights["model.norm.weight"][3] = 1e5
    with pytest.raises(UserError, match=r"model.norm.weight holds 1e\+05, too large for float16"):
        export_hf(weights.items(), config, None, tmp_path / "out", "fp16")
    with pytest.raises(UserError, match="fp8"):
        export_hf(weights.items(), config, None, tmp_path / "out", "fp8")


@pytest.mark.parametrize(
    ("levels", "words_"),
    [
        ({"q_proj": "4b/g48"}, r"layers.0.self_attn.q_proj, of 64 columns, is at level 4b/g48.*4b/g128/sym"),
        ({"down_proj": "4b/g64/sym"}, "of 96 columns.*groups divide the columns"),
        ({"q_proj": "3b/g32"}, "3b/g32, which compressed-tensors cannot express"),
        ({"q_proj": "mxint4"}, "mxint4, which"),
        ({"q_proj": "4b/g32/sym/h"}, "4b/g32/sym/h, which"),
        ({"q_proj": "50%"}, "50%, which"),
        ({"embed": "8b/row/sym"}, "embed_tokens is at level 8b/row/sym.*linear layers alone"),
        ({}, "no weight is quantised"),
    ],
)
def test_compressed_tensors_refuses(tmp_path: Path, levels: dict[str, str], words_: str) -> None:
    config = config_of()
    with pytest.raises(UserError, match=words_):
        export_compressed_tensors(at_levels(weights_of(config), levels), config, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words_"),
    [
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ({"vocab_size": 100}, "token 297, and the model has 100 embeddings"),
    ],
)
def test_gguf_refuses_settings(tmp_path: Path, source: Path, changes: dict[str, Any], words_: str) -> None:
    config = config_of(**changes)
    with pytest.raises(UserError, match=words_):
        export_gguf(weights_of(config).items(), config, source, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_gguf_refuses_other_models_types_and_tokenizers(tmp_path: Path, source: Path) -> None:
    config = config_of(num_hidden_layers=1)
    weights = weights_of(config)
    out = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"'Q5_K'.*F16, Q8_0, Q4_0, Q4_1"):
        export_gguf(weights.items(), config, source, out, "Q5_K")
    with pytest.raises(UserError, match=r"'gpt2' to GGUF.*llama, mistral, qwen2, qwen3"):
        export_gguf([], {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, source, out)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with pytest.raises(UserError, match="there is no such file"):
        export_gguf(weights.items(), config, folder, out)
    for content, words_ in (
        ({"model": {"type": "Unigram", "vocab": []}}, "byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "Metaspace"}}, "byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": {"a": "x"}}, "pre_tokenizer": {"type": "ByteLevel"}}, "damaged"),
        ({}, "damaged"),
        ([], "damaged"),
    ):
        (folder / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=words_):
            export_gguf(weights.items(), config, folder, out)
    assert [f.name for f in tmp_path.iterdir()] == ["tokenizer"]
