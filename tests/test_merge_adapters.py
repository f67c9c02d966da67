"""Adapters as parents: put onto their models while merging, exactly, or offered to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge import save, weights
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.overlay import overlay
from trimtab.merging import merge

SITES = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")


def adapter(folder: Path, base: Path | None, seed: int, dora: bool = False) -> dict[str, Tensor]:
    """A LoRA as PEFT saves it; the sums that it stands for."""
    folder.mkdir()
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_dora": dora}
    config |= {"base_model_name_or_path": None if base is None else str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    rng, origin, stored, sums = torch.Generator().manual_seed(seed), weights(0), {}, {}
    for path in SITES:
        weight = origin[f"{path}.weight"].float()
        a, b = torch.randn(2, weight.shape[1], generator=rng), torch.randn(len(weight), 2, generator=rng)
        stored |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
        total = weight + 3 * b @ a
        if dora:
            lengths = torch.rand(len(weight), generator=rng) + 0.5
            stored[f"base_model.model.{path}.lora_magnitude_vector"] = lengths
            total = total * (lengths / total.norm(dim=1))[:, None]
        sums[f"{path}.weight"] = total
    write_safetensors(stored, folder / "adapter_model.safetensors")
    return sums


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("shard", [None, 4000])
def test_two_adapters_are_merged_as_the_models_that_they_make(tmp_path: Path, dora: bool, shard: int | None) -> None:
    base = save(tmp_path / "base", weights(0), shard)
    one, two = (adapter(tmp_path / name, base, i, dora) for i, name in enumerate(("one", "two")))
    names = [str(tmp_path / "one"), str(tmp_path / "two")]
    report = merge(names, method="linear", weight=[1.0, 3.0], out=tmp_path / "out", apply_adapters=True)
    made, origin = Checkpoint(tmp_path / "out"), weights(0)
    for name in made.names():
        assert made.dtype(name) == "BF16"
        wanted = (one[name] + 0.75 * (two[name] - one[name])).bfloat16() if name in one else origin[name]
        torch.testing.assert_close(made.read(name), wanted)
    assert [(p["name"], p["adapter"]) for p in report["parents"]] == [(n, True) for n in names]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "one", "out", "two"], "something was left"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_an_adapter_and_a_model_are_merged_over_a_base(tmp_path: Path) -> None:
    base, tuned = save(tmp_path / "base", weights(0)), save(tmp_path / "tuned", weights(3))
    sums = adapter(tmp_path / "one", None, 0)
    merge(
        [tmp_path / "one", tuned], base=base, method="task-arithmetic", out=tmp_path / "out", apply_adapters=True
    )  # fmt: skip
    made, origin, other = Checkpoint(tmp_path / "out"), weights(0), weights(3)
    for name, value in origin.items():
        changes = other[name].float() - value.float() + (sums[name] - value.float() if name in sums else 0)
        torch.testing.assert_close(made.read(name), (value.float() + changes).bfloat16())


def test_adapters_are_offered_to_be_applied_and_refused_where_they_cannot_be(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    base = save(tmp_path / "base", weights(0))
    adapter(tmp_path / "one", base, 0)
    adapter(tmp_path / "lone", None, 1)
    out = tmp_path / "out"
    said = cli("merge", base, tmp_path / "one", "--out", out)
    assert said.code == 2 and "--apply-adapters puts it onto its model" in said.err
    said = cli("merge", base, tmp_path / "lone", "--out", out, "--apply-adapters")
    assert said.code == 2 and "does not name its model; give the model with --base" in said.err
    narrow = save(tmp_path / "narrow", {n: t[..., :8] for n, t in weights(0).items()}, hidden_size=8)
    with pytest.raises(UserError, match="it is of another model"):
        merge([tmp_path / "lone"], base=narrow, method="ties", out=out, apply_adapters=True)
    assert not list(tmp_path.glob(".*")), "something was left"
    assert cli("merge", base, tmp_path / "one", "--out", out, "--apply-adapters").code == 0
    assert not list(tmp_path.glob(".*")), "something was left"


def test_an_overlay_reads_as_the_base_with_its_changes(tmp_path: Path) -> None:
    base = Checkpoint(save(tmp_path / "base", weights(0), 4000))
    name = base.names()[3]
    made = overlay(base, tmp_path / "over", [(name, torch.ones(base.shape(name)))])
    assert made.names() == base.names() and len(base.files) > 1
    for n in base.names():
        assert torch.equal(made.read(n), torch.ones(base.shape(n)) if n == name else base.read(n))


def test_a_model_and_its_adapter_are_named_with_a_plus(tmp_path: Path, cli: Callable[..., Any]) -> None:
    base, other = save(tmp_path / "base", weights(0)), save(tmp_path / "other+tuned", weights(3))
    adapter(tmp_path / "one", tmp_path / "elsewhere", 0)
    pair = f"{base}+{tmp_path / 'one'}"
    recipe = {"merge_method": "linear", "models": [{"model": pair, "parameters": {"weight": 1}},
                                                   {"model": str(other), "parameters": {"weight": 2}}]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    assert cli("merge", pair, other, "--weight", "1,2", "--out", tmp_path / "out").code == 0
    assert cli("merge", tmp_path / "recipe.yaml", "--out", tmp_path / "same").code == 0
    config = tmp_path / "one" / "adapter_config.json"
    config.write_text(config.read_text().replace("elsewhere", "base"))
    merge([tmp_path / "one", other], weight=[1, 2], out=tmp_path / "wanted", apply_adapters=True)
    wanted = Checkpoint(tmp_path / "wanted")
    for folder in ("out", "same"):
        made = Checkpoint(tmp_path / folder)
        assert all(torch.equal(made.read(n), wanted.read(n)) for n in wanted.names())
    assert not list(tmp_path.glob(".*")), "something was left"
    said = cli("merge", f"{base}+{tmp_path / 'none'}", other, "--out", tmp_path / "new")
    assert said.code == 2 and "there is no model" in said.err
    said = cli("merge", f"{base}+{other}", other, "--out", tmp_path / "new")
    assert said.code == 2 and "is no adapter" in said.err
    said = cli("merge", pair, other, "--out", base, "--overwrite")
    assert said.code == 2 and "lies in or around" in said.err and (base / "config.json").is_file()
