"""From a fitted artifact to what other libraries load: their outputs are the artifact's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, Said, fitted, tree

import trimtab
from trimtab.models.artifact import open_artifact

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]
Cli = Callable[..., Said]
TOKENS = torch.arange(7, 55).view(2, 24)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits.float()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def stock(folder: Path, **options: object) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def test_hf_in_stock_transformers(run: Run, cli: Cli, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = trimtab.load(run.artifact)
    for dtype, torch_type, allowed in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 0.03)):
        out = tmp_path / dtype
        said = cli("export", run.folder, "--to", "hf", "--out", out, "--dtype", dtype, "--json")
        assert said.code == 0 and said.err == ""
        found = said.json()
        assert found["bytes"] == sum(len(data) for data in tree(out).values())
        model = stock(out, dtype=torch_type)
        assert far(logits(model), logits(ours.model)) < allowed
        if dtype == "fp32":
            for name, value in model.named_parameters():
                assert torch.equal(value, ours.model.get_parameter(name)), name
    text = "def main(argv=None):\n    return 0\n"
    assert AutoTokenizer.from_pretrained(tmp_path / "fp32")(text)["input_ids"] == ours.tokenizer(text)["input_ids"]
    assert trimtab.load(tmp_path / "fp32").generate("import ", 8) == ours.generate("import ", 8)


def test_gguf_read_back(symmetric: Run, cli: Cli, tmp_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    out = tmp_path / "model.gguf"
    said = cli("export", symmetric.artifact, "--to", "gguf", "--out", out, "--json")
    assert said.code == 0 and said.err == ""
    found = said.json()
    packed = open_artifact(symmetric.artifact).packed
    assert found["exact"] == len(packed) == 15 and found["requantised"] == 0
    assert found["bytes"] == out.stat().st_size

    reader = GGUFReader(out)
    model = trimtab.load(symmetric.artifact).model
    stored = {t.name: t for t in reader.tensors}
    assert {t.tensor_type.name for t in stored.values()} == {"Q4_0", "F16", "F32"}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
    }
    for theirs, ours in names.items():
        weight = model.get_parameter(ours).detach().numpy()
        read = dequantize(stored[theirs].data, stored[theirs].tensor_type).reshape(weight.shape)
        assert np.array_equal(read, weight.astype(np.float16) if theirs == "token_embd.weight" else weight), ours
    for theirs, ours, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):  # llama.cpp rotates neighbours
        weight = model.get_parameter(f"model.layers.0.self_attn.{ours}.weight").detach().numpy()
        read = dequantize(stored[f"blk.0.{theirs}.weight"].data, stored[f"blk.0.{theirs}.weight"].tensor_type)
        turned = weight.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(weight.shape)
        assert np.array_equal(read.reshape(weight.shape), turned) and not np.array_equal(turned, weight)
    fields = {f.name: f for f in reader.fields.values()}
    assert fields["llama.block_count"].contents() == 2 and fields["llama.embedding_length"].contents() == 64
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 4096


def test_gguf_of_a_mixed_plan_says_what_it_had_to_round(run: Run, cli: Cli, tmp_path: Path) -> None:
    found = cli("export", run.artifact, "--to", "gguf", "--out", tmp_path / "m.gguf", "--type", "Q8_0", "--json").json()
    assert found["exact"] + found["rounded"] + found["requantised"] == len(open_artifact(run.artifact).packed)
    assert found["notes"]


def test_compressed_tensors_in_stock_transformers(symmetric: Run, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "ct"
    said = cli("export", symmetric.artifact, "--to", "compressed-tensors", "--out", out, "--json")
    assert said.code == 0 and said.err == ""
    found = said.json()
    assert found["exact"] == 15 and found["requantised"] == 0
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors" and settings["format"] == "pack-quantized"
    model = stock(out, dtype=torch.float32)
    assert far(logits(model), logits(trimtab.load(symmetric.artifact).model)) < 0.01
    assert found["bytes"] < 0.75 * symmetric.report["original"]["bytes"]


def test_refusals(run: Run, symmetric: Run, tiny: Path, cli: Cli, tmp_path: Path) -> None:
    def refused(*line: str | Path) -> str:
        said = cli("export", *line)
        assert said.code == 2 and said.out == "" and said.err.startswith("trimtab: "), said
        assert said.err.count("\n") == 1 and "a bug" not in said.err
        return said.err

    out = tmp_path / "out"
    assert "'onnx'" in refused(run.artifact, "--to", "onnx", "--out", out)
    assert "did you mean 'gguf'" in refused(run.artifact, "--to", "ggfu", "--out", out)
    assert "no trimtab.json" in refused(tiny, "--to", "hf", "--out", out)
    assert "int3" in refused(run.artifact, "--to", "hf", "--out", out, "--dtype", "int3")
    assert "Q3_K" in refused(run.artifact, "--to", "gguf", "--out", tmp_path / "m.gguf", "--type", "Q3_K")
    assert "compressed-tensors" in refused(run.artifact, "--to", "compressed-tensors", "--out", out)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "thesis.txt").write_text("the only copy")
    assert "not an empty folder" in refused(symmetric.artifact, "--to", "hf", "--out", out)
    assert "cannot be written" in refused(symmetric.artifact, "--to", "gguf", "--out", out / "thesis.txt" / "m.gguf")
    assert tree(tmp_path) == {"out/thesis.txt": b"the only copy"}
    damaged = Path(shutil.copytree(symmetric.artifact, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cut off" in refused(damaged, "--to", "hf", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_pocket_cnn_has_no_such_format(cli: Cli, tmp_path: Path) -> None:
    found = fitted("pocket-cnn", tmp_path / "run", plan="rtn @ 8b/row")
    for to in ("hf", "gguf", "compressed-tensors"):
        said = cli("export", found.artifact, "--to", to, "--out", tmp_path / to)
        assert said.code == 2 and "a bug" not in said.err and "Traceback" not in said.err
        assert not (tmp_path / to).exists()
