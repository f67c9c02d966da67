"""Merges measured on the user's own data, and coefficients that are chosen by it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import judging
from trimtab.cli import main
from trimtab.core.errors import UserError
from trimtab.core.recipe import Rule
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.mergekit import recipe_of
from trimtab.merging import simple_recipe


def shaken(model: Path, folder: Path, size: float, part: str = "", seed: int = 0) -> Path:
    """A copy of a model with noise on the matrices whose names have that part."""
    shutil.copytree(model, folder)
    checkpoint, rng = Checkpoint(model), torch.Generator().manual_seed(seed)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names()}
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and part in name:
            noise = torch.randn(tensor.shape, generator=rng) * tensor.float().std()
            tensors[name] = (tensor.float() + size * noise).to(tensor.dtype)
    write_safetensors(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "ITEMS", {"search": 6, "test": 6})


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def test_a_greedy_soup_leaves_out_what_spoils_it(tiny: Path, text: Path, tmp_path: Path, few: None) -> None:
    names = [str(shaken(tiny, tmp_path / f"m{i}", size, seed=i)) for i, size in enumerate((0.3, 3.0, 0.3))]
    recipe, found = judging.search(simple_recipe(names, "model-soups"), [str(text)], quiet)
    assert names[1] not in found["members"] and found["chosen"] < found["before"]
    assert [p.settings["weight"] for p in recipe.slices[0].parents] == [float(n in found["members"]) for n in names]


def test_a_search_gives_each_block_its_own(
    tiny: Path, text: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is damaged in the first block, which the parent heals, and the parent in the second."""
    monkeypatch.setattr(judging, "FACTORS", (0.0, 1.0, 2.0))
    base = shaken(tiny, tmp_path / "base", 1.5, "layers.0.")
    parent = shaken(tiny, tmp_path / "parent", 1.5, "layers.1.")
    plain = simple_recipe([str(parent)], "task-arithmetic", str(base))
    recipe, found = judging.search(plain, [str(text)], quiet)
    assert found["chosen"] == found["by_block"] < found["uniform"]
    assert found["blocks"][0] > found["blocks"][1] == 0
    rule = recipe.settings["scale"][0]  # type: ignore[index]
    assert rule == Rule(tuple(found["blocks"]), "model.layers.")


def test_evaluate_prints_a_row_for_each_model(
    tiny: Path, text: Path, tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(shaken(tiny, tmp_path / f"m{i}", 0.5, seed=i)) for i in range(2)]
    with pytest.raises(SystemExit) as stop:
        main(["merge", *names, "--out", str(tmp_path / "out"), "--evaluate", str(text), "--json"])
    assert stop.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in report["scores"]] == [*names, str(tmp_path / "out")]
    assert all(row["metric"] == "perplexity" and row["value"] > 1 for row in report["scores"])


def test_a_search_without_data_or_coefficient_is_refused(tiny: Path, text: Path, tmp_path: Path) -> None:
    other = shaken(tiny, tmp_path / "other", 0.1)
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(tiny), str(other), "--out", str(tmp_path / "out"), "--search"])
    assert stop.value.code == 2
    source = {"sources": [{"model": str(tiny), "layer_range": [0, 1]}]}
    with pytest.raises(UserError, match="slices"):
        judging.search(recipe_of({"merge_method": "passthrough", "slices": [source, source]}), [str(text)], quiet)
    assert not (tmp_path / "out").exists()


def test_adapters_are_searched_like_models(
    tiny: Path, text: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.setattr(judging, "FACTORS", (0.0, 1.0))
    rng, names = torch.Generator().manual_seed(0), []
    path = "model.layers.0.mlp.up_proj"
    rows, cols = Checkpoint(tiny).shape(f"{path}.weight")
    for name, size in (("good", 0.0), ("bad", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(tiny)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        factors = {"A": torch.randn(2, cols, generator=rng), "B": size * torch.randn(rows, 2, generator=rng)}
        named = {f"base_model.model.{path}.lora_{k}.weight": t for k, t in factors.items()}
        write_safetensors(named, folder / "adapter_model.safetensors")
        names.append(str(folder))
    said = cli("merge", names[0], f"{tiny}+{names[1]}", "--apply-adapters", "--method", "model-soups", "--evaluate",
               text, "--search", "--out", tmp_path / "soup", "--json")  # fmt: skip
    assert said.code == 0, said.err
    assert said.json()["search"]["members"] == [names[0]]
    assert torch.equal(Checkpoint(tmp_path / "soup").read(f"{path}.weight"), Checkpoint(tiny).read(f"{path}.weight"))
    said = cli("merge", *names, "--base", tiny, "--apply-adapters", "--method", "task-arithmetic", "--evaluate", text,
               "--search", "--out", tmp_path / "sum", "--json")  # fmt: skip
    found = said.json()["search"]
    assert found["chosen"] < found["before"] and not list(tmp_path.glob(".*"))
