"""Healing: the numbers that packed weights store are trained, and nothing else of the artifact changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import seeded
from conftest import Said, fitted, tree
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Int, parse_level
from trimtab.core.method import method
from trimtab.formats.packed import Packed
from trimtab.models.artifact import open_artifact
from trimtab.parts.moving import Moving, movable

SOLVED = {
    "integers": ("rtn", "3b/g32"),
    "symmetric": ("rtn", "4b/row/sym"),
    "rotated": ("rtn", "4b/g32/h"),
    "anywhere": ("magnitude", "50%"),
    "two of four": ("magnitude", "2:4"),
}
PLAN = "rtn @ model.layers.*=2b/g32"


def solved(name: str) -> tuple[nn.Module, Packed]:
    solver, level = SOLVED[name]
    layer = nn.Linear(64, 24)
    chosen: Any = method(solver)
    gram = torch.eye(64)
    given = {k: {"gram": gram, "absmean": torch.ones(64), "mean": torch.zeros(64)}[k] for k in chosen.needs()}
    packed = chosen.solve(layer.weight.detach(), parse_level(level), **given)
    layer.weight.data.copy_(packed.dense())
    return layer, packed


@pytest.mark.parametrize("name", SOLVED)
def test_what_was_trained_is_what_is_packed_bit_for_bit(name: str) -> None:
    layer, packed = solved(name)
    moving, x = Moving(layer, packed), torch.randn(5, 64, generator=seeded(0))
    assert torch.equal(moving(x), layer(x)), "untrained, it is what it was"
    with torch.no_grad():
        for p in moving.changes:
            p.add_(0.2 * torch.randn(p.shape, generator=seeded(1)))
    after = moving.packed()
    assert after.flaw() is None and after.nbytes == packed.nbytes == packed.level.bytes((24, 64))
    assert torch.equal(nn.functional.linear(x, after.dense(), layer.bias), moving(x))
    changed = {k for k in after.tensors if not torch.equal(after.tensors[k], packed.tensors[k])}
    assert changed == set(movable(packed)), "codes, masks and places stay"


@pytest.mark.parametrize("name", SOLVED)
def test_the_gradient_is_that_of_the_stored_numbers(name: str) -> None:
    layer, packed = solved(name)
    moving, x = Moving(layer, packed), torch.randn(5, 64, generator=seeded(0))
    moving(x).square().sum().backward()
    held = {n: packed.tensors[n].float().requires_grad_(True) for n in movable(packed)}
    dense = Packed(packed.level, packed.shape, {**packed.tensors, **held}).dense()
    nn.functional.linear(x, dense, layer.bias).square().sum().backward()
    for p, n in zip(moving.changes, movable(packed), strict=True):
        assert torch.allclose(p.grad, held[n].grad * moving.unit(n), rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None and len(list(moving.parameters())) == len(moving.changes) + 2


def test_a_convolution_moves_too() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1)
    chosen: Any = method("rtn")
    packed = chosen.solve(conv.weight.detach().flatten(1), Int(4, None))
    conv.weight.data.copy_(packed.dense().view_as(conv.weight))
    x = torch.randn(2, 4, 5, 5, generator=seeded(0))
    moving = Moving(conv, packed)
    assert torch.equal(moving(x), conv(x))
    moving(x).sum().backward()
    assert float(moving.changes[0].grad.abs().sum()) > 0


def held(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: dict(read().tensors) for name, read in open_artifact(folder).packed.items()}


@pytest.fixture(scope="module")
def plain(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fitted(tiny, tmp_path_factory.mktemp("runs") / "plain", data=str(text), plan=PLAN)


@pytest.fixture(scope="module")
def healed(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fitted(tiny, tmp_path_factory.mktemp("runs") / "healed", data=str(text), plan=PLAN, heal=30)


def test_a_healed_result_is_better_at_the_same_bytes(plain: Any, healed: Any) -> None:
    report = healed.report
    healing = report["healing"]
    assert healing["kept"] and healing["damage"][1] < healing["damage"][0] and healing["loss"][1] < healing["loss"][0]
    assert report["best"]["value"] < healing["before"]["value"] == pytest.approx(plain.report["best"]["value"])
    assert healing["before"]["healed"][1] < 0 and "healed in 30 steps" in report["verdict"]
    assert report["best"]["bytes"] == healing["before"]["bytes"] == plain.report["best"]["bytes"]
    assert plain.report["healing"] is None
    ours, theirs = held(healed.artifact), held(plain.artifact)
    assert healing["sites"] == len(ours) == len(theirs)
    for name, tensors in ours.items():
        same = {k for k in tensors if torch.equal(tensors[k], theirs[name][k])}
        assert same == {"codes", "zero"}, name


class _Stop(Exception):
    pass


def test_cut_off_while_healing_it_ends_with_the_same_bytes(tiny: Path, text: Path, tmp_path: Path, healed: Any) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "train" and done == 27:
            raise _Stop

    with pytest.raises(_Stop):
        fitted(tiny, tmp_path / "cut", data=str(text), plan=PLAN, heal=30, progress=stop)
    assert not (tmp_path / "cut" / "report.json").exists()
    again = fitted(tiny, tmp_path / "cut", data=str(text), plan=PLAN, heal=30, resume=True)
    assert tree(again.artifact) == tree(healed.artifact)
    assert again.report["best"] == healed.report["best"]


def test_what_stores_no_such_numbers_is_left_and_said(tiny: Path, text: Path, tmp_path: Path) -> None:
    run = fitted(tiny, tmp_path / "run", data=str(text), plan="rtn @ model.layers.*=mxint8", heal=2)
    assert not run.report["healing"]["kept"] and "nothing was healed" in run.report["verdict"]


def test_negative_steps_are_refused(tiny: Path, tmp_path: Path, cli: Callable[..., Said]) -> None:
    with pytest.raises(UserError, match="-1 steps"):
        fitted(tiny, tmp_path / "run", plan=PLAN, heal=-1)
    assert not (tmp_path / "run").exists()
    said = cli("fit", tiny, "--plan", PLAN, "--heal", "x", "--out", tmp_path / "run")
    assert said.code == 2 and json.dumps("x") not in said.out
