"""Parents made again of what a merge kept of each: the formula's bits, the bytes that were promised, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge import read, save, weights
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Merger
from trimtab.engine import merge as in_memory
from trimtab.engine import merge_tasks
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.mergekit import recipe_of
from trimtab.merge.tall_masks import TALLMasks
from trimtab.merge.twin_merging import TwinMerging
from trimtab.merging import merge, restore

NAMES = ("a", "b", "c")


def family(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, list[Path]]:
    """A base and three models tuned from it, with a tensor that is no float and one of odd length."""

    def made(seed: int) -> dict[str, Tensor]:
        odd = torch.arange(13.0) + 0.1 * seed * torch.randn(13, generator=torch.Generator().manual_seed(seed))
        return weights(seed, dtype) | {"steps": torch.tensor(7), "odd": odd.to(dtype)}

    base, *parents = (save(folder / n, made(i), 9_000 if n == "b" else None) for i, n in enumerate(("base", *NAMES)))
    return base, parents


def merged_for(method: Merger, parents: list[Path], base: Path, weight: tuple[float, ...]) -> dict[str, Tensor]:
    """The whole model that a method makes in memory."""
    tensors, origin, found = [read(p) for p in parents], read(base), {}
    for name, root in origin.items():
        piece = in_memory.Piece(name, tuple(root.shape), method if root.is_floating_point() else None, NAMES, weight)
        found[name] = in_memory.merged(piece, [t[name] for t in tensors], root)
    return found


@pytest.mark.parametrize("tile", [64, 1 << 18])
def test_a_masked_task_has_the_bits_of_the_formula(
    tile: int, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "TILE", tile)
    base, parents = family(tmp_path)
    said = cli("merge", *parents, "--base", base, "--method", "tall-masks(trust=0.3)", "--keep-tasks", "--out",
               tmp_path / "out", "--json")  # fmt: skip
    kept = said.json()["tasks"]
    assert kept["names"] == list(NAMES)
    for task, name in enumerate(NAMES):
        assert cli("merge", tmp_path / "out", "--task", name, "--out", tmp_path / f"{name}2").code == 0
        made = read(tmp_path / f"{name}2")
        wanted = merged_for(TALLMasks(trust=0.3, task=task), parents, base, (1.0,) * 3)
        assert made.keys() == wanted.keys() and all(torch.equal(made[n], wanted[n]) for n in wanted)
    assert json.loads((tmp_path / "a2" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_take_a_bit_a_weight_and_the_sum_as_much_as_a_model(dtype: torch.dtype, tmp_path: Path) -> None:
    base, parents = family(tmp_path, dtype)
    kept = merge(parents, base=base, method=TALLMasks(), out=tmp_path / "out", keep_tasks=True)["tasks"]
    floats = [t for t in read(base).values() if t.is_floating_point()]
    assert kept["own_bytes"] == dict.fromkeys(NAMES, sum(-(-t.numel() // 8) for t in floats))
    assert kept["shared_bytes"] == Checkpoint(base).bytes
    stored = Checkpoint(tmp_path / "out" / "tasks")
    assert stored.bytes == kept["shared_bytes"] + sum(kept["own_bytes"].values())
    restore(tmp_path / "out", "b", out=tmp_path / "b2")
    tensors, origin = [read(p) for p in parents], read(base)
    for name, made in read(tmp_path / "b2").items():
        if origin[name].is_floating_point():
            changes = [t[name].float() - origin[name].float() for t in tensors]
            total = changes[0] + changes[1] + changes[2]
            uses = changes[1].abs() >= 0.4 * (total - changes[1]).abs()
            wanted = origin[name].float() + total.to(dtype).float() * uses
            assert torch.equal(made, wanted.to(dtype)) and made.dtype == dtype, name


def test_a_twin_is_made_again_of_the_shared_model_and_thin_factors(tmp_path: Path) -> None:
    base, parents = family(tmp_path)
    method = TwinMerging(keep=0.3)
    kept = merge(parents, base=base, method=method, out=tmp_path / "out", keep_tasks=True)["tasks"]
    shutil.rmtree(base)
    origin, numbers = read(family(tmp_path / "again")[0]), 0
    for tensor in origin.values():
        if tensor.is_floating_point():
            rank = max(1, int(0.3 * min(tensor.shape)))
            thin = rank * sum(tensor.shape) if tensor.dim() > 1 else tensor.numel()
            numbers += min(thin, tensor.numel())
    assert kept["own_bytes"] == dict.fromkeys(NAMES, 4 * numbers) and numbers < sum(t.numel() for t in origin.values())
    for task, name in enumerate(NAMES):
        restore(tmp_path / "out", name, out=tmp_path / f"{name}2")
        weight: Any = [0.0] * 3
        weight[task] = 1.0
        wanted = merged_for(method, parents, tmp_path / "again" / "base", tuple(weight))
        made = read(tmp_path / f"{name}2")
        for n in wanted:
            torch.testing.assert_close(made[n], wanted[n], rtol=1e-5, atol=1e-5)


def test_a_restored_model_runs_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, *parents = (save(tmp_path / n, weights(i)) for i, n in enumerate(("base", *NAMES)))
    merge(parents, base=base, method="tall-masks", out=tmp_path / "out", keep_tasks=True)
    restore(tmp_path / "out", "c", out=tmp_path / "c2", shard_bytes=20_000)
    assert len(list((tmp_path / "c2").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c2", dtype=torch.float32)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_tasks_that_cannot_be_kept_or_made_again_are_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    base, parents = family(tmp_path)
    out, again = tmp_path / "out", tmp_path / "again"

    def refused(*arguments: Any, part: str) -> None:
        said = cli("merge", *arguments)
        assert said.code == 2 and part in said.err, said
        assert not again.exists() and not list(tmp_path.glob(".*")), "something was left"

    refused(*parents, "--base", base, "--method", "ties", "--keep-tasks", "--out", again, part="tall-masks")
    sliced = {
        "merge_method": "tall_masks",
        "base_model": str(base),
        "slices": [{"sources": [{"model": str(p), "layer_range": [0, 2]} for p in parents]}],
    }
    with pytest.raises(UserError, match="whole models"):
        merge(recipe_of(sliced), out=again, keep_tasks=True)
    merge(parents, base=base, method="tall-masks", out=out, keep_tasks=True)
    refused(out, "--task", "d", "--out", again, part="holds the tasks a, b, c, and no 'd'")
    refused(base, "--task", "a", "--out", again, part="merge with --keep-tasks")
    refused(out, base, "--task", "a", "--out", again, part="give one merged model")
    refused(out, "--task", "a", "--method", "ties", "--out", again, part="give one merged model")
    refused(out, "--task", "a", "--base", parents[0], "--out", again, part="is not what it was in")
    refused(out, "--task", "a", "--out", out / "inside", part="lies in or around")
    refused(out, "--task", "a", "--out", parents[0], part="already exists")
    shutil.move(base, tmp_path / "moved")
    refused(out, "--task", "a", "--out", again, part="base")
    assert cli("merge", out, "--task", "a", "--base", tmp_path / "moved", "--out", again).code == 0


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"method": "ties"},
        {"tasks": [1]},
        {"tensors": {"odd": {"shape": "x", "dtype": "F32", "base": ""}}},
        {"tensors": {"odd": {"shape": [14], "dtype": "F32", "base": None}}},
        {"tensors": {"new": {"shape": [1], "dtype": "F32", "base": ""}}},
    ],
)
def test_a_damaged_description_is_refused_in_a_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    base, parents = family(tmp_path)
    merge(parents, base=base, method="tall-masks", out=tmp_path / "out", keep_tasks=True)
    path = tmp_path / "out" / merge_tasks.FOLDER / merge_tasks.DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"damaged|format 2") as error:
        restore(tmp_path / "out", "a", out=tmp_path / "again")
    assert "\n" not in str(error.value) and not (tmp_path / "again").exists()


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    base, parents = family(tmp_path)
    merge(parents, base=base, method="tall-masks", out=tmp_path / "out", keep_tasks=True)
    folder = tmp_path / "out" / "tasks"
    parts = read(folder)
    parts["0/odd.mask"] = parts["0/odd.mask"][:1]
    write_safetensors(parts, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"'odd' do not fit together.*damaged"):
        restore(tmp_path / "out", "a", out=tmp_path / "again")
    restore(tmp_path / "out", "b", out=tmp_path / "again")


def test_parents_of_one_name_are_told_by_all_of_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base", weights(0))
    parents = [save(tmp_path / n / "model", weights(i)) for i, n in ((1, "x"), (2, "y"))]
    kept = merge(parents, base=base, method="tall-masks", out=tmp_path / "out", keep_tasks=True)["tasks"]
    assert kept["names"] == [str(p) for p in parents]
    restore(tmp_path / "out", str(parents[1]), out=tmp_path / "again")
