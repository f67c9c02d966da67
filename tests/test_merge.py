"""Merging end to end: what comes out, from recipes and options, streamed and in memory; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from trimtab.cli import main
from trimtab.core.errors import UserError
from trimtab.core.recipe import Rule, value_at
from trimtab.engine import merge as in_memory
from trimtab.engine import merge_stream
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.mergekit import read_recipe, recipe_of
from trimtab.merge.dare import DARE
from trimtab.merge.linear import Linear
from trimtab.merge.ties import TIES
from trimtab.merging import Merge, simple_recipe
from trimtab.parts.selection import PASSES, KthLargest, count_for, kth_largest

LAYERS, WIDE, WORDS = 4, 24, 50
CONFIG: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDE, "vocab_size": WORDS},
    **{"intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"tie_word_embeddings": False, "max_position_embeddings": 64, "dtype": "bfloat16"},
}


def weights(seed: int, dtype: torch.dtype = torch.bfloat16, layers: int = LAYERS) -> dict[str, Tensor]:
    """A tiny Llama; seed 0 is the base, and others differ from it a little."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDE), "lm_head.weight": (WORDS, WIDE)}
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{n}_proj.weight": (WIDE, WIDE) for n in "qo"}
        shapes |= {f"{block}.self_attn.{n}_proj.weight": (WIDE // 2, WIDE) for n in "kv"}
        shapes |= {f"{block}.mlp.{n}_proj.weight": (40, WIDE) for n in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (WIDE, 40)}
        shapes |= {f"{block}.{n}.weight": (WIDE,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (WIDE,)
    first, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=first)
        found[name] = (value + (0.1 * torch.randn(shape, generator=own) if seed else 0)).to(dtype)
    return found


def save(folder: Path, tensors: dict[str, Tensor], shard: int | None = None, **changes: Any) -> Path:
    """A model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    write_safetensors(tensors, folder / "model.safetensors", shard_bytes=shard)
    return folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """The base and three models that were tuned from it; the second of those in several files."""
    return [save(tmp_path / n, weights(i), 9_000 if n == "b" else None) for i, n in enumerate(("base", "a", "b", "c"))]


def read(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.names()}


def same(one: Path, other: Path) -> bool:
    a, b = read(one), read(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def refused(call: Callable[[], Any], *parts: str) -> None:
    """The call is refused in a sentence that has those parts."""
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert all(part in said for part in parts), said
    assert "\n" not in said


# ---- what comes out


def test_a_linear_merge_is_the_mean_and_a_whole_folder(models: list[Path], tmp_path: Path) -> None:
    (models[1] / "tokenizer.json").write_text("{}")
    report = trimtab.merge(models[1:], out=tmp_path / "out")
    merged, parents = read(tmp_path / "out"), [read(m) for m in models[1:]]
    for name, tensor in merged.items():
        mean = torch.stack([p[name].float() for p in parents]).mean(0)
        torch.testing.assert_close(tensor.float(), mean, rtol=2**-8, atol=1e-6)
        assert tensor.dtype == torch.bfloat16
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(str(m) in card for m in models[1:]) and "`linear`" in card
    assert all(p["tensors_sha256"] in card for p in report["parents"])
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".out")], "something hidden was left"


@pytest.mark.parametrize("name", ["linear", "slerp", "task-arithmetic", "ties", "dare", "tall-masks", "passthrough"])
def test_streaming_gives_the_bits_that_memory_gives(
    name: str, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tiles and buffers: here tiny ones, so that every tensor is in many."""
    from trimtab.core.method import method

    for module in (in_memory, merge_stream):
        monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(merge_stream, "BUFFERS", 4096)
    monkeypatch.setattr(merge_stream, "COMMIT", 5000)
    merger: Any = method(name)
    names = [str(m) for m in models[1 : 1 + (merger.most or 3)]]
    base = models[0] if merger.needs_base() else None
    trimtab.merge(names, out=tmp_path / "out", method=merger, base=base, shard_bytes=10_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    merged, parents, origin = read(tmp_path / "out"), [read(Path(m)) for m in names], read(models[0])
    default = getattr(merger, "density", 1.0)
    for tensor_name, tensor in merged.items():
        count = len(names)
        depth = int(tensor_name.split(".")[2]) / (LAYERS - 1) if ".layers." in tensor_name else 0.0
        piece = in_memory.Piece(
            tensor_name, tuple(tensor.shape), merger, tuple(names), (1.0,) * count, (default,) * count, depth
        )
        inputs = [p[tensor_name] for p in parents]
        expected = in_memory.merged(piece, inputs, origin[tensor_name] if base else None)
        assert torch.equal(tensor, expected.bfloat16()), tensor_name


def test_merging_copies_of_one_model_gives_its_bits(models: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(models[1], tmp_path / n) for n in ("copy1", "copy2")]
    trimtab.merge([models[1], *copies], out=tmp_path / "mean")
    assert same(tmp_path / "mean", models[1])
    trimtab.merge(copies, out=tmp_path / "ties", base=models[1], method=TIES(density=0.3))
    assert same(tmp_path / "ties", models[1])


def test_a_result_loads_in_transformers(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trimtab.merge(models[1:3], out=tmp_path / "out", shard_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_the_type_of_the_result_can_be_asked_for(models: list[Path], tmp_path: Path) -> None:
    trimtab.merge(models[1:3], out=tmp_path / "out", dtype="fp32")
    assert {t.dtype for t in read(tmp_path / "out").values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_parents_of_several_types_and_tensors_that_are_no_floats(tmp_path: Path) -> None:
    def made(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        odd = {"steps": torch.tensor(7 + seed), "scale": torch.tensor(0.5 + seed), "empty": torch.empty(0, 3)}
        return weights(seed, dtype) | odd

    folders = [
        save(tmp_path / str(i), made(i, t)) for i, t in enumerate((torch.float32, torch.bfloat16, torch.float16))
    ]
    trimtab.merge(folders, out=tmp_path / "out")
    merged = read(tmp_path / "out")
    assert int(merged["steps"]) == 7, "what cannot be averaged is the first model's"
    assert float(merged["scale"]) == 1.5 and merged["empty"].shape == (0, 3)
    assert merged["lm_head.weight"].dtype == torch.float32


def test_dare_keeps_the_share_and_its_seed(models: list[Path], tmp_path: Path) -> None:
    for seed, name in ((0, "one"), (0, "again"), (1, "other")):
        trimtab.merge(models[1:2], out=tmp_path / name, base=models[0], method=DARE(density=0.25), seed=seed)
    assert same(tmp_path / "one", tmp_path / "again") and not same(tmp_path / "one", tmp_path / "other")
    base, merged = read(models[0]), read(tmp_path / "one")
    changed = sum(int((merged[n] != base[n]).sum()) for n in base) / sum(t.numel() for t in base.values())
    assert 0.22 < changed < 0.27


# ---- recipes


def test_settings_are_scalars_curves_and_filters() -> None:
    assert [value_at((0, 0.5, 1), "x", d) for d in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.25, 0.5, 0.75, 1]
    assert value_at((True, False), "x", 0.9) is True and value_at((True, False), "x", 1.0) is False
    rules = (Rule(0.2, "attn"), Rule((0.0, 1.0), "mlp"))
    assert value_at(rules, "layers.0.attn.q", 1) == 0.2 and value_at(rules, "layers.0.mlp.up", 0.5) == 0.5
    assert value_at(rules, "norm", 0) is None


def test_a_recipe_of_curves_and_filters(models: list[Path], tmp_path: Path) -> None:
    base, a, b, _ = models
    (tmp_path / "recipe.yaml").write_text(
        f"""
merge_method: task_arithmetic
base_model: {base}
models:
  - model: {base}
  - model: {a}
    parameters: {{weight: [0, 0.5, 1]}}
  - model: {b}
    parameters:
      weight:
        - filter: mlp
          value: 0
        - value: 1e-1
parameters: {{lambda: 2.0, int8_mask: true}}
dtype: float32
"""
    )
    main_ok(["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--quiet"])
    merged = read(tmp_path / "out")
    origin, one, two = (read(m) for m in (base, a, b))
    for i, weight in enumerate((0, 1 / 3, 2 / 3, 1)):
        for name, other in (
            (f"model.layers.{i}.mlp.up_proj.weight", 0.0),
            (f"model.layers.{i}.self_attn.q_proj.weight", 0.1),
        ):
            root = origin[name].float()
            expected = root + 2 * (weight * (one[name].float() - root) + other * (two[name].float() - root))
            torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-5)


def test_slices_stack_blocks(models: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": str(models[1]), "layer_range": [0, 3]}]},
                {"sources": [{"model": str(models[2]), "layer_range": [1, 4], "parameters": {}}]},
            ],
            "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1}]},
        }
    )
    trimtab.merge(recipe, out=tmp_path / "out")
    merged, one, two = read(tmp_path / "out"), read(models[1]), read(models[2])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    q = "self_attn.q_proj.weight"
    for i in range(6):
        source, index = (one, i) if i < 3 else (two, i - 2)
        assert torch.equal(merged[f"model.layers.{i}.{q}"], source[f"model.layers.{index}.{q}"])
    down = "mlp.down_proj.weight"
    assert torch.equal(merged[f"model.layers.0.{down}"].float(), 0.5 * one[f"model.layers.0.{down}"].float())
    assert torch.equal(merged["model.embed_tokens.weight"], one["model.embed_tokens.weight"])
    assert torch.equal(merged["model.norm.weight"], two["model.norm.weight"])
    assert torch.equal(merged["lm_head.weight"], two["lm_head.weight"])


def main_ok(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0


def test_json_has_the_report(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    main_ok(["merge", *map(str, models[1:]), "--base", str(models[0]), "--method", "ties(scale=0.8)", "--density",
             "0.5,0.5,0.4", "--out", out, "--json"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "ties" and report["settings"] == {"scale": 0.8} and report["blocks"] == LAYERS
    assert [p["base"] for p in report["parents"]] == [True, False, False, False]
    assert report["bytes"] == Checkpoint(out).bytes


# ---- selection


@pytest.mark.parametrize("k", [1, 2, 50, 499, 500])
def test_the_kth_largest_is_exact(k: int) -> None:
    rng = torch.Generator().manual_seed(k)
    for x in (
        torch.randn(500, generator=rng),
        torch.randint(-3, 4, (500,), generator=rng).float(),
        torch.zeros(500),
        torch.randn(500, generator=rng) * 1e-39,
        torch.tensor([3.4e38] * 250 + [-1e-45] * 250),
    ):
        expected = float(x.abs().sort(descending=True).values[k - 1])
        assert kth_largest(x, k) == expected
        kth = KthLargest(k)
        for _ in range(PASSES):
            for part in x.split(77):
                kth.add(kth.count(part))
            kth.close()
        assert kth.value == expected


def test_a_density_keeps_at_least_one() -> None:
    assert [count_for(d, 10) for d in (0.01, 0.19, 0.2, 1.0)] == [1, 1, 2, 10]


# ---- what is refused, before anything is written


def test_bad_input_is_refused_in_a_sentence(models: list[Path], tmp_path: Path) -> None:
    base, a, b, _ = models
    out = tmp_path / "out"

    def merging(*names: Path | str, **options: Any) -> Callable[[], Any]:
        return lambda: trimtab.merge([str(n) for n in names], **{"out": out, **options})

    refused(merging(a, b, method="ties"), "base", "--base")
    refused(merging(a, b, base=base), "linear", "takes none")
    refused(merging(a), "at least 2")
    refused(merging(a, b, base, method="slerp"), "2 at most")
    refused(merging(a, a), str(a), "twice")
    refused(merging(a, tmp_path / "base" / ".." / "a"), "one model")
    refused(merging(a, b, base=a, method="ties"), "both the base")
    refused(merging(a, b, out=a), "output", str(a))
    refused(merging(a, b, out=a / "inside"), "output")
    refused(merging(a, tmp_path / "nothing"), "there is no model")
    refused(merging(a, b, method="tise"), "did you mean 'ties'")
    refused(merging(a, b, method="gptq"), "solve")
    refused(merging(a, b, dtype="int8"), "int8")
    refused(merging(a, b, weight=(1.0,)), "1 numbers", "2 models")
    for density in (0.0, -0.1, 1.5, float("nan")):
        refused(merging(a, b, base=base, method=TIES(density=density)), "density", "(0, 1]")
    refused(merging(a, b, method=Linear(weight=float("inf"))), "weight")
    refused(merging(a, b, method=Linear(weight=0.0)), "add up to 0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    refused(merging(a, b, out=tmp_path / "full"), "--overwrite")
    assert not out.exists() and not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_models_that_do_not_belong_together_are_refused(models: list[Path], tmp_path: Path) -> None:
    a, out = models[1], tmp_path / "out"
    odd = weights(5)

    def against(name: str, tensors: dict[str, Tensor], **changes: Any) -> Callable[[], Any]:
        other = save(tmp_path / name, tensors, **changes)
        return lambda: trimtab.merge([a, other], out=out)

    refused(against("arch", odd, model_type="mistral"), "model_type", "mistral")
    refused(against("heads", odd, num_attention_heads=8), "num_attention_heads")
    tied = {n: t for n, t in odd.items() if n != "lm_head.weight"}
    refused(against("tied", tied, tie_word_embeddings=True), "tied")
    refused(against("lacking", {n: t for n, t in odd.items() if "norm" not in n}), "no tensor")
    refused(against("more", odd | {"extra": torch.zeros(2)}), "extra")
    refused(against("shape", odd | {"model.norm.weight": torch.zeros(5)}), "shape", "model.norm.weight")
    refused(against("shallow", weights(5, layers=3), num_hidden_layers=3), "equally many blocks")
    refused(against("quantised", odd, quantization_config={"quant_method": "gptq"}), "quantised (gptq)")
    codes = {n: torch.zeros(t.shape, dtype=torch.int8) for n, t in odd.items()}
    refused(against("codes", codes), "quantised")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    refused(lambda: trimtab.merge([a, adapter], out=out), "adapter for some/base", "--apply-adapters")
    bad = save(tmp_path / "nan", odd | {"lm_head.weight": torch.full((WORDS, WIDE), float("nan"))})
    refused(lambda: trimtab.merge([a, bad], out=out), "lm_head.weight", "NaN", str(bad))
    assert not out.exists() and not [n for n in os.listdir(tmp_path) if n.startswith(".")]


def test_vocabularies_of_other_sizes(models: list[Path], tmp_path: Path) -> None:
    grown = weights(5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        grown[name] = torch.cat([grown[name], torch.ones(3, WIDE, dtype=torch.bfloat16)])
    other = save(tmp_path / "grown", grown, vocab_size=WORDS + 3)
    refused(lambda: trimtab.merge([models[1], other], out=tmp_path / "out"), "50", "53", "--vocabulary force")
    trimtab.merge([other, models[1]], out=tmp_path / "out", vocabulary="force")
    assert read(tmp_path / "out")["lm_head.weight"].shape == (WORDS, WIDE)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == WORDS


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("merge_method: ties\nmodel: [a]", "unknown key 'model'; did you mean 'models'"),
        ("merge_method: linear", "neither"),
        ("models: [{model: a}]", "no merge_method"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "unknown key 'weight'"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: .nan}}]", "weight"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: [{filter: x}]}}]", "without a value"),
        ("merge_method: linear\nmodels: []", "at least one"),
        ("merge_method: linear\nmodules: {}\nmodels: [{model: a}]", "modules"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]", "layer_range"),
        ("merge_method: linear\ndtype: int4\nmodels: [{model: a}]", "int4"),
        ("- a\n- b", "no table"),
        ("a: [", "no YAML"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    refused(lambda: read_recipe(path), part)


def test_unknown_parameters_of_a_recipe_are_refused_by_name(models: list[Path], tmp_path: Path) -> None:
    rows = [{"model": str(m), "parameters": {"wieght": 1}} for m in models[:2]]
    recipe = recipe_of({"merge_method": "linear", "models": rows})
    refused(lambda: trimtab.merge(recipe, out=tmp_path / "out"), "'wieght'", "did you mean 'weight'")


# ---- cut off


SLOW = """
import os, sys, time
from trimtab.core.journal import Journal
append = Journal.append
def slow(self, step, value):
    append(self, step, value)
    if len(self.done) == 4:
        print("now", flush=True)
        time.sleep(60)
Journal.append = slow
from trimtab.engine import merge_stream
merge_stream.COMMIT = 8000
import trimtab
trimtab.merge(sys.argv[2:], out=sys.argv[1], shard_bytes=20_000)
"""


def test_a_killed_merge_leaves_nothing_and_goes_on_to_the_same_bytes(models: list[Path], tmp_path: Path) -> None:
    names = [str(m) for m in models[1:]]
    whole, out = tmp_path / "whole", tmp_path / "out"
    trimtab.merge(names, out=whole, shard_bytes=20_000)
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(out), *names], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    report = trimtab.merge(names, out=out, shard_bytes=20_000, resume=True)
    for file in sorted(whole.iterdir()):
        theirs = (out / file.name).read_bytes()
        assert file.read_bytes() == theirs, file.name
    assert report["tensors"] == len(read(whole))
    refused(lambda: trimtab.merge(names, out=tmp_path / "new", resume=True), "--resume")


def test_a_cut_off_merge_whose_files_are_gone_is_refused(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.merging.commit_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trimtab.merge(models[1:], out=tmp_path / "out")
    (tmp_path / ".out.merging" / "model" / "model.safetensors").unlink()
    monkeypatch.undo()
    refused(lambda: trimtab.merge(models[1:], out=tmp_path / "out", resume=True), "missing", "without --resume")
    trimtab.merge(models[1:], out=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_is_read_behind_the_blocks_has_depth_one(models: list[Path], tmp_path: Path) -> None:
    recipe = simple_recipe([*map(str, models[1:3])], "robust-weight-signatures", str(models[0]))
    depths = {job.piece.name: job.piece.depth for job in Merge(recipe, tmp_path / "out").jobs}
    assert depths["model.embed_tokens.weight"] == 0 and depths["lm_head.weight"] == depths["model.norm.weight"] == 1
    assert [depths[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(LAYERS)] == [0, 1 / 3, 2 / 3, 1]


def test_a_merge_that_fails_leaves_the_old_output(models: list[Path], tmp_path: Path) -> None:
    trimtab.merge(models[1:3], out=tmp_path / "out")
    before = read(tmp_path / "out")
    bad = save(tmp_path / "nan", weights(7) | {"lm_head.weight": torch.full((WORDS, WIDE), float("nan"))})
    with pytest.raises(UserError):
        trimtab.merge([models[1], bad], out=tmp_path / "out", overwrite=True)
    after = read(tmp_path / "out")
    assert all(torch.equal(before[n], after[n]) for n in before)
    trimtab.merge([models[1], models[3]], out=tmp_path / "out", overwrite=True)
    assert not same(tmp_path / "out", models[1]) and len(os.listdir(tmp_path / "out")) == 3


# ---- the peer


PEER = os.environ.get("TRIMTAB_MERGEKIT") or shutil.which("mergekit-yaml")


THEIRS = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for recipe in sys.argv[1:]:
    content = yaml.safe_load(open(recipe, encoding="utf-8"))
    run_merge(MergeConfiguration.model_validate(content), recipe + ".out", MergeOptions(copy_tokenizer=False))
"""


@pytest.mark.slow
@pytest.mark.skipif(PEER is None, reason="mergekit is not installed; TRIMTAB_MERGEKIT may name its mergekit-yaml")
def test_numbers_are_those_of_mergekit(tmp_path: Path) -> None:
    """To one unit in the last place of bf16; parents are fp32, so that no two magnitudes are equal."""
    assert PEER is not None
    names = ("base", "a", "b")
    base, a, b = (save(tmp_path / n, weights(i, torch.float32), dtype="float32") for i, n in enumerate(names))
    rows = [
        f"  - model: {m}\n    parameters: {{weight: {w}, density: {d}}}" for m, w, d in ((a, 0.7, 0.3), (b, 0.4, 0.6))
    ]
    tuned = f"models:\n{rows[0]}\n{rows[1]}\n"
    curves = f"""models:
  - model: {a}
    parameters:
      weight: [0, 0.3, 1]
      density: {{filter: mlp, value: 0.4}}
  - model: {b}
    parameters: {{weight: 0.5, density: [0.9, 0.2]}}
"""
    curved = "parameters:\n  t:\n    - filter: self_attn\n      value: [0, 0.5, 0.3, 1]\n    - value: 0.4\n"
    changes = f"base_model: {base}\n"
    texts = {
        "linear": f"merge_method: linear\n{tuned}",
        "slerp": f"merge_method: slerp\nbase_model: {a}\nmodels:\n  - model: {b}\n  - model: {a}\n{curved}",
        "task": f"merge_method: task_arithmetic\n{changes}{tuned}parameters: {{lambda: 0.9, normalize: true}}\n",
        "ties": f"merge_method: ties\n{changes}{tuned}parameters: {{int8_mask: true, lambda: 1.1}}\n",
        "curves": f"merge_method: ties\n{changes}{curves}parameters: {{normalize: false}}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(f"{text}dtype: float32\nout_dtype: bfloat16\n")
    command = [str(Path(PEER).parent / "python"), "-c", THEIRS, *(str(tmp_path / n) for n in texts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in texts:
        trimtab.merge(read_recipe(tmp_path / name), out=tmp_path / f"{name}.ours")
        ours, theirs = read(tmp_path / f"{name}.ours"), read(tmp_path / f"{name}.out")
        assert ours.keys() == theirs.keys()
        for tensor, value in ours.items():
            assert value.dtype == theirs[tensor].dtype == torch.bfloat16
            # where a sum nearly cancels, fp32's own rounding shows
            torch.testing.assert_close(value.float(), theirs[tensor].float(), rtol=2**-7, atol=1e-4)
