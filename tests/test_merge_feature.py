"""Features merged within a layer, and blocks expanded from two: what must come out exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_merge import LAYERS, save, weights
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Width
from trimtab.core.method import Scene
from trimtab.core.modelmap import trace
from trimtab.core.recipe import Parent, Recipe, Slice
from trimtab.formats.checkpoint import Checkpoint
from trimtab.merge.tleg import TLEG
from trimtab.merging import merge
from trimtab.models.pocket.cnn import PocketCNN, PocketCNNConfig
from trimtab.prune.iterative_feature_merging import IterativeFeatureMerging, fold_batch_norm


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid])
def test_equal_features_are_merged_without_loss(activation: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), activation(), nn.Linear(9, 3)).requires_grad_(False)
    first: Any = model[0]
    first.weight[[4, 7]], first.bias[[4, 7]] = first.weight[[1, 2]], first.bias[[1, 2]]
    last: Any = model[2]
    last.weight[:, [4, 7]] = last.weight[:, [1, 2]]
    x = torch.randn(20, 5)
    before, scene = model(x), Scene(copy.deepcopy(model), trace(model, x), levels={"0": Width(7 / 9)})
    IterativeFeatureMerging().rewrite(scene)
    narrowed: Any = scene.model
    assert narrowed[0].out_features == 7 and torch.allclose(narrowed(x), before, atol=1e-6)
    strict = Scene(copy.deepcopy(model), trace(model, x), levels={"0": Width(1 / 9)})
    IterativeFeatureMerging(threshold=1e-6).rewrite(strict)
    stopped: Any = strict.model
    assert stopped[0].out_features == 7


def test_folding_a_batch_norm_keeps_the_function() -> None:
    torch.manual_seed(0)
    model = PocketCNN(PocketCNNConfig(widths=(4, 8), inner=((6,), (5,)))).train()
    images = torch.randn(50, 1, 8, 8)
    for _ in range(3):
        model(images)
    model.eval().requires_grad_(False)
    before, norms = model(images), trace(model, images[:1]).batch_norms
    assert norms
    for path, norm in norms.items():
        fold_batch_norm(model.get_submodule(path), model.get_submodule(norm))
    assert torch.allclose(model(images), before, atol=1e-5)


def test_merging_of_features_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match=r"threshold=2; it is a share in \[0, 1\]"):
        IterativeFeatureMerging(threshold=2.0).clusters(torch.ones(3, 1), torch.ones(3, 1), 1)
    bare = nn.BatchNorm2d(3, affine=False)
    with pytest.raises(UserError, match="needs batch norms with a scale"):
        fold_batch_norm(nn.Conv2d(2, 3, 1), bare)


def gene(folder: Any, seed: int) -> tuple[str, dict[str, Tensor]]:
    """A checkpoint of a single block."""
    tensors = weights(seed, torch.float32, layers=1)
    return str(save(folder, tensors, num_hidden_layers=1, dtype="float32")), tensors


@pytest.mark.parametrize("depth", [1, 3, LAYERS])
def test_blocks_are_expanded_by_the_formula(tmp_path: Any, depth: int) -> None:
    (first, a), (second, b) = (gene(tmp_path / name, i) for i, name in enumerate("ab"))
    slices = tuple(Slice((Parent(first, (0, 1)), Parent(second, (0, 1)))) for _ in range(depth))
    report = merge(Recipe("tleg", slices), out=tmp_path / "out")
    made = Checkpoint(tmp_path / "out")
    assert report["blocks"] == depth
    for name in made.names():
        source = name.replace(f".{name.split('.')[2]}.", ".0.", 1) if ".layers." in name else name
        place = int(name.split(".")[2]) if ".layers." in name else 0
        wanted = (a[source].double() + place / depth * b[source].double()).float()
        torch.testing.assert_close(made.read(name), wanted, rtol=2e-7, atol=1e-7)


def test_expansion_takes_two_models() -> None:
    with pytest.raises(UserError, match="was given 1 models"):
        TLEG().merge([torch.ones(2)], None, block=(0, 1))
