"""Sparse linears and convolutions that stand for torch's own: what runs on the kernels, and what does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import artifact_of
from torch import nn

import trimtab
from trimtab.core.level import parse_level
from trimtab.core.method import method
from trimtab.kernels.native import native
from trimtab.kernels.sparse import module as modules
from trimtab.kernels.sparse.module import SparseConv2d, SparseLinear

wide = pytest.mark.skipif(
    native() is None or not native().__name__.endswith(("vnni", "avx512")), reason="no kernels of AVX-512"
)


def sparse(like: nn.Linear | nn.Conv2d, level: str) -> Any:
    """The module that stands for this one, whose weight becomes sparse."""
    packed = method("magnitude").solve(like.weight.detach().flatten(1), parse_level(level))
    like.weight = nn.Parameter(packed.dense().reshape(like.weight.shape), requires_grad=False)
    like.bias.requires_grad_(False)
    return modules.stand_in(like, packed)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The modules that ran on the kernels."""
    found: list[type] = []
    for cls in (SparseLinear, SparseConv2d):
        plain = cls.on_kernels
        monkeypatch.setattr(cls, "on_kernels", lambda self, x, plain=plain: found.append(type(self)) or plain(self, x))
    return found


@wide
@pytest.mark.parametrize("level", ["50%", "2:4", "90%"])
def test_they_stand_for_torchs_own(level: str, calls: list[type]) -> None:
    torch.manual_seed(0)
    for like, shape in ((nn.Linear(256, 300), (2, 9, 256)), (nn.Conv2d(8, 12, 3, 2, 1), (1, 8, 9, 9))):
        stands, x = sparse(like, level), torch.randn(shape)
        assert isinstance(stands, type(like)) and stands.weight is like.weight
        assert torch.allclose(stands(x), like(x), atol=1e-4) and len(calls) == 1
        assert torch.allclose(copy.deepcopy(stands)(x), like(x), atol=1e-4)
        calls.clear()


@wide
def test_images_of_several_sizes(calls: list[type]) -> None:
    conv = nn.Conv2d(8, 12, 3, 2, 1)
    stands = sparse(conv, "70%")
    for size in ((9, 9), (10, 7), (5, 5), (4, 4), (16, 16), (9, 9)):
        x = torch.randn(3, 8, *size).to(memory_format=torch.channels_last)
        assert torch.allclose(stands(x), conv(x), atol=1e-5)
    assert len(calls) == 6


@wide
def test_what_is_trained_changed_or_of_another_type_stays_on_torch(calls: list[type]) -> None:
    like = nn.Linear(256, 256)
    stands, x = sparse(like, "80%"), torch.randn(16, 256)
    stands(x.clone().requires_grad_()).sum().backward()
    assert torch.equal(stands.double()(x.double()), like(x.double()))
    stands.float().weight.mul_(2)
    assert torch.equal(stands(x), like(x)) and not calls
    stands = sparse(nn.Linear(256, 256), "80%")
    stands.weight = like.weight
    assert torch.equal(stands(x), nn.functional.linear(x, like.weight, stands.bias)) and not calls


def test_what_was_not_measured_faster_stays_on_torch() -> None:
    def pays(like: Any, level: str, inputs: int) -> bool:
        return sparse(like, level).pays(inputs)

    small, large = nn.Linear(64, 64), nn.Linear(2048, 1024)
    assert not pays(small, "90%", 100) and not pays(large, "30%", 100) and not pays(large, "3:4", 100)
    assert pays(large, "50%", 1) and pays(large, "2:4", 1) and not pays(nn.Linear(256, 256), "90%", 1)
    conv, point, depth = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
    assert pays(conv, "50%", 1) and pays(conv, "70%", 32) and not pays(conv, "50%", 32)
    assert pays(point, "50%", 1) and not pays(point, "75%", 32) and not pays(depth, "66%", 1)
    assert modules.stand_in(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), sparse(conv, "50%").packed) is None


@wide
@pytest.mark.parametrize("name", ["pocket-cnn", "pocket-vit"])
@torch.no_grad()
def test_loaded_classifiers_use_the_kernels_unless_told_otherwise(
    name: str, tmp_path: Path, calls: list[type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "IN_CACHE", 64)  # the shipped ones are smaller than what pays
    made = artifact_of(name, "magnitude @ 75%", tmp_path / "artifact")
    exact, fast = trimtab.load(made, kernels=False).model, trimtab.load(made).model
    images = torch.rand(8, 1, 8, 8)
    expected, found = (m(images) for m in (exact, fast))
    assert calls and not any(isinstance(m, SparseLinear | SparseConv2d) for m in exact.modules())
    expected, found = (getattr(out, "logits", out) for out in (expected, found))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_the_page_of_speeds_is_its_record() -> None:
    from benchmarks.sparse import PAGE, RECORD, page

    row = json.loads(RECORD.read_text("utf-8").splitlines()[-1])
    assert PAGE.read_text("utf-8") == page(row)
