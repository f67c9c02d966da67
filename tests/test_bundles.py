"""Neurons on disk: what was written is read back, by any set of neurons, and damaged files end in one sentence."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from trimtab.core.errors import UserError
from trimtab.formats.bundles import Bundles, bundled, runs, write_bundles

STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def written(
    path: Path, neurons: int = 9, width: int = 3, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(neurons)
    made = {f"layers.{i:04d}.neurons": torch.randn(neurons, width, generator=rng).to(dtype) for i in range(2)}
    specs = [(name, STORED[dtype], tuple(tensor.shape)) for name, tensor in made.items()]
    write_bundles(path, specs, made.__getitem__, {"rank": "0"})
    return made


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(list(STORED)), st.data())
def test_any_neurons_are_read_back_in_as_few_reads_as_they_have_runs(
    tmp_path_factory: pytest.TempPathFactory, neurons: int, width: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("bundles") / "a.safetensors"
    made = written(path, neurons, width, dtype)
    with Bundles(path, threads=data.draw(st.sampled_from([1, 2])), cold=data.draw(st.booleans())) as file:
        for name, tensor in made.items():
            wanted = sorted(data.draw(st.sets(st.integers(0, neurons - 1))))
            reads, size = file.reads, file.bytes
            assert torch.equal(file.read(name, wanted), tensor[wanted])
            gaps = sum(b != a + 1 for a, b in pairwise(wanted))
            assert file.reads - reads == gaps + bool(wanted)
            assert file.bytes - size == len(wanted) * width * dtype.itemsize
            assert torch.equal(file.whole(name), tensor)


@given(st.sets(st.integers(0, 50)))
def test_runs_are_the_numbers_again(numbers: set[int]) -> None:
    found = runs(sorted(numbers))
    assert [n for first, length in found for n in range(first, first + length)] == sorted(numbers)


def test_a_stranger_can_open_it(tmp_path: Path) -> None:
    made = written(tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == made.keys() and all(torch.equal(found[name], made[name]) for name in made)


def test_a_record_is_rows_and_then_the_column() -> None:
    gate, up, down = torch.randn(5, 2), torch.randn(5, 2), torch.randn(4, 5)
    made = bundled([gate, up], down)
    assert torch.equal(made[3], torch.cat([gate[3], up[3], down[:, 3]]))


def test_what_is_asked_for_wrongly_is_said(tmp_path: Path) -> None:
    written(tmp_path / "a.safetensors")
    with Bundles(tmp_path / "a.safetensors") as file:
        for wanted in ([9], [-1], [3, 3], [4, 2]):
            with pytest.raises(UserError, match="numbers 0 to 8"):
                file.read("layers.0000.neurons", wanted)
        with pytest.raises(UserError, match="expected"):
            file.spec("layers.0000.neurons", rows=8)
        with pytest.raises(UserError, match="there is no tensor"):
            file.read("layers.0002.neurons", [0])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400))
def test_a_file_that_was_cut_off_is_refused(tmp_path_factory: pytest.TempPathFactory, left: int) -> None:
    path = tmp_path_factory.mktemp("bundles") / "a.safetensors"
    written(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(left, len(whole) - 1)])
    with pytest.raises(UserError) as error:
        Bundles(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 40], [9, 1 << 30], [-9, 3], ["9", 3], [9, 3, 0]])
def test_hostile_sizes_are_refused(tmp_path: Path, shape: list[object]) -> None:
    header = {"layers.0000.neurons": {"dtype": "F32", "shape": shape, "data_offsets": [0, 108]}}
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(108))
    with pytest.raises(UserError):
        Bundles(path).spec("layers.0000.neurons")


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(path)
    with Bundles(path) as file:
        with open(path, "r+b") as handle:
            handle.truncate(path.stat().st_size - 40)
        with pytest.raises(UserError, match="became shorter"):
            file.read("layers.0001.neurons", list(range(9)))


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    def tensor(name: str) -> torch.Tensor:
        if name.endswith("1"):
            raise RuntimeError("killed")
        return torch.zeros(2, 2)

    with pytest.raises(RuntimeError):
        write_bundles(tmp_path / "a.safetensors", [("0", "F32", (2, 2)), ("1", "F32", (2, 2))], tensor)
    assert list(tmp_path.iterdir()) == []
