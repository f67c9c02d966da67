"""Reading and writing safetensors: damaged, hostile and impossible input ends in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as reference_load
from safetensors.torch import load_file, save_file

from trimtab.core.errors import UserError
from trimtab.formats.checkpoint import DTYPES, Checkpoint, file_hash, write_bytes, write_safetensors


def many_types() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, generator=generator)
    tensors = {
        name: (values * 10).to(getattr(torch, name))
        for _, name in DTYPES.values()
        if name not in ("bool", "uint16", "uint32", "uint64", "uint8", "float8_e8m0fnu", "complex64")
    }
    whole = {name: torch.arange(7).to(getattr(torch, name)) for name in ("uint8", "uint16", "uint32", "uint64")}
    odd = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "bool": values > 0, "view": values.T[1:]}
    return tensors | whole | odd | {"e8m0": torch.arange(5, dtype=torch.uint8).view(torch.float8_e8m0fnu)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*flat)


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


# ---- what is written is read, here and by the library


def test_round_trip_and_the_library_agrees(tmp_path: Path) -> None:
    tensors = many_types()
    write_safetensors(tensors, tmp_path / "a.safetensors", {"plan": "x"})
    checkpoint = Checkpoint(tmp_path)
    library = load_file(tmp_path / "a.safetensors")
    assert checkpoint.names() == sorted(tensors) and set(library) == set(tensors)
    for name, tensor in tensors.items():
        assert same(checkpoint.read(name), tensor) and same(library[name], tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape) and name in checkpoint
        assert DTYPES[checkpoint.dtype(name)][1] == str(tensor.dtype).removeprefix("torch.")
    assert checkpoint.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert checkpoint.metadata == {"format": "pt", "plan": "x"}

    save_file({k: v.contiguous() for k, v in tensors.items() if v.numel()}, tmp_path / "b.safetensors")
    theirs = Checkpoint(tmp_path / "b.safetensors")
    assert all(same(theirs.read(name), tensors[name]) for name in theirs.names())


def test_bytes_do_not_depend_on_the_order_or_on_the_time(tmp_path: Path) -> None:
    tensors = many_types()
    for name, order in (("a", tensors), ("b", dict(reversed(tensors.items()))), ("c", tensors.items())):
        write_safetensors(order, tmp_path / f"{name}.safetensors", {"y": "1", "x": "2"})
    contents = {(tmp_path / f"{name}.safetensors").read_bytes() for name in "abc"}
    assert len(contents) == 1


def test_shards_as_transformers_names_them(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    written = write_safetensors(iter(tensors.items()), tmp_path / "model.safetensors", shard_bytes=100)
    assert [f.name for f in written] == [
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads(written[-1].read_text())
    assert index["metadata"]["total_size"] == 200 and set(index["weight_map"]) == set(tensors)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.files == written[:-1] and all(same(checkpoint.read(n), t) for n, t in tensors.items())
    assert Checkpoint(written[-1]).hash() == checkpoint.hash()
    assert not list(tmp_path.glob(".*"))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2), "b": torch.zeros(100), "c": torch.zeros(2)}
    files = write_safetensors(tensors, tmp_path / "model.safetensors", shard_bytes=50)
    assert len(files) == 4
    assert Checkpoint(tmp_path).names() == ["a", "b", "c"]


def test_hash_follows_the_contents(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors({"a": torch.zeros(4)}, path)
    first, one = Checkpoint(path).hash(), file_hash(path)
    assert first == Checkpoint(tmp_path).hash()
    write_safetensors({"a": torch.ones(4)}, path)
    assert Checkpoint(path).hash() != first and file_hash(path) != one


def test_reading_block_after_block_keeps_memory_bounded(tmp_path: Path) -> None:
    size = 16 << 20
    write_safetensors(
        {f"block{i}": torch.full((size,), i, dtype=torch.uint8) for i in range(8)}, tmp_path / "m.safetensors"
    )
    checkpoint, process = Checkpoint(tmp_path), psutil.Process()
    before = process.memory_info().rss
    highest = 0
    for i in range(8):
        block = checkpoint.read(f"block{i}")
        assert block[-1] == i
        highest = max(highest, process.memory_info().rss - before)
        del block
    assert highest < 4 * size, f"reading {8 * size} bytes in 8 blocks took {highest} bytes"


def test_importing_the_reader_does_not_import_torch() -> None:
    code = "import sys, trimtab.formats.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- input that is not sound


def refused(path: Path, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 600 + len(str(path))
    return message


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"a": F32}, bytes(7), "cut off"),
        ({"a": F32}, bytes(9), "belong to nothing"),
        ({"a": F32, "b": F32}, bytes(8), "overlap"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), "overlap"),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20), "belong to nothing"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), "bytes 8 to 0"),
        ({"a": {**F32, "data_offsets": [-8, 0]}}, bytes(8), "data_offsets"),
        ({"a": {**F32, "data_offsets": [0, 8.0]}}, bytes(8), "data_offsets"),
        ({"a": {**F32, "data_offsets": [0, 1 << 80]}}, bytes(8), "cut off"),
        ({"a": {**F32, "shape": [3]}}, bytes(8), "does not take 8 bytes"),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), "shape"),
        ({"a": {**F32, "shape": "2"}}, bytes(8), "shape"),
        ({"a": {**F32, "shape": [0, 1 << 62], "data_offsets": [0, 0]}}, b"", "shape"),
        ({"a": {**F32, "dtype": "F4"}}, bytes(8), "'F4'"),
        ({"a": {**F32, "dtype": None}}, bytes(8), "'None'"),
        ({"a": {"dtype": "F32"}}, bytes(8), "data_offsets"),
        ({"a": [1]}, bytes(8), "data_offsets"),
        ({"a": F32, "__metadata__": {"x": 1}}, bytes(8), "__metadata__"),
        ({"__metadata__": {}}, b"", "no tensors"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b'{"a": ', b"", "JSON"),
        (b'{"\\ud800": 1}', b"", "JSON"),
        (b'{"\xff": 1}', b"", "JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"}", b"", "JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", b"", "JSON"),
        (b"[1]", b"", "does not begin with a header"),
    ],
)
def test_headers_that_contradict_themselves(tmp_path: Path, header: Any, data: bytes, word: str) -> None:
    refused(raw_file(tmp_path / "m.safetensors", header, data), word)


def test_headers_longer_than_the_file_or_the_format(tmp_path: Path) -> None:
    refused(raw_file(tmp_path / "m.safetensors", {"a": F32}, bytes(8), length=1000), "cut off", "1000")
    refused(raw_file(tmp_path / "m.safetensors", {"a": F32}, bytes(8), length=100_000_001), "100000001", "100000000")
    refused(raw_file(tmp_path / "m.safetensors", {"a": F32}, bytes(8), length=(1 << 64) - 1), "100000000")
    (tmp_path / "m.safetensors").write_bytes(b"")
    refused(tmp_path / "m.safetensors", "0 bytes")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    poison = pickle.dumps(Trap())
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "x.ckpt"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_bytes(poison)
        for path in (folder, folder / name):
            refused(path, "never unpickled", "save_pretrained", name)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(poison)
    refused(disguised, "never unpickled")
    torch.save({"a": torch.zeros(1)}, disguised)
    refused(disguised, "never unpickled")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "model.safetensors.index.json", "never unpickled")
    assert not (tmp_path / "sprung").exists()


def test_a_sound_file_whose_length_looks_like_a_pickle_opens(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "m.safetensors", json.dumps({"a": F32}).encode().ljust(0x280), bytes(8))
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert Checkpoint(path).names() == ["a"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"GGUF\x03\0\0\0\0\0\0\0", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "does not begin with a header"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, word)


def test_missing_and_odd_places(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such file")
    refused(tmp_path, "no .safetensors")
    refused(tmp_path / ("x" * 300), "cannot be read")
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path, "not a regular file")


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ({"weight_map": {"a": "../model.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "own folder"),
        ({"weight_map": {"a": "..\\model.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "sub/model.safetensors"}}, "own folder"),
        ({"weight_map": {"a": "C:model.safetensors"}}, "own folder"),
        ({"weight_map": {"a": ".."}}, "own folder"),
        ({"weight_map": {"a": ""}}, "own folder"),
        ({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}, "missing"),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "cannot be read"),
        ({"weight_map": {"a": "model-1.safetensors", "absent": "model-1.safetensors"}}, "'absent'"),
        ({"weight_map": {"a": 1}}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ([], "weight_map"),
        (b"\x00", "JSON"),
    ],
)
def test_indexes(tmp_path: Path, index: Any, word: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors({"a": torch.zeros(2)}, folder / "model-1.safetensors")
    write_safetensors({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / "model.safetensors.index.json").write_bytes(text)
    refused(folder, word)


def test_the_same_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    for name in "xy":
        write_safetensors({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "x.safetensors", "y.safetensors", "'a'")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors({"a": torch.zeros(1000)}, path)
    checkpoint = Checkpoint(path)
    os.truncate(path, 200)
    with pytest.raises(UserError, match="shorter"):
        checkpoint.read("a")
    with pytest.raises(UserError, match="no tensor 'b'"):
        checkpoint.read("b")


def test_weights_that_are_not_finite_are_named_and_counted(tmp_path: Path) -> None:
    bad = torch.zeros(3, 4)
    bad[0, 0], bad[1, :2] = float("nan"), float("inf")
    tiny = torch.zeros(4).to(torch.float8_e5m2)
    tiny[1] = float("-inf")
    good = {"fine": torch.zeros(3), "whole": torch.zeros(3, dtype=torch.int64)}
    write_safetensors({**good, "bad": bad.bfloat16(), "tiny": tiny}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check_finite(["fine", "whole"])
    with pytest.raises(UserError) as caught:
        checkpoint.check_finite()
    assert "bad (1 NaN, 2 infinite of 12)" in str(caught.value) and "tiny (0 NaN, 1 infinite of 4)" in str(caught.value)


# ---- fuzz


def base_file() -> bytes:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(5, dtype=torch.int8), "c": torch.zeros(0, 2)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        write_safetensors(tensors, path, {"note": "x"})
        return path.read_bytes()


BASE = base_file()
HEADER_END = 8 + struct.unpack("<Q", BASE[:8])[0]


def accepts_no_more_than_the_library(content: bytes) -> None:
    """Either one sentence, or tensors that the library reads too, with the same values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        path.write_bytes(content)
        try:
            checkpoint = Checkpoint(path)
            ours = {name: checkpoint.read(name) for name in checkpoint.names()}
        except UserError as reason:
            assert "\n" not in str(reason)
            return
    theirs = reference_load(content)
    assert set(ours) == set(theirs)
    assert all(same(ours[name], theirs[name]) for name in ours)


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, HEADER_END - 1), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, len(BASE))),
)
@example(flips=[(0, 255)], cut=None)
@example(flips=[(7, 128)], cut=None)
def test_flipped_and_cut_headers(flips: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(BASE)
    for place, value in flips:
        content[place] = value
    accepts_no_more_than_the_library(bytes(content[:cut]))


numbers = st.one_of(st.integers(-2, 20), st.sampled_from([1 << 31, 1 << 63, 1 << 64, 10**30, 1.5, None, "2", True]))
fields = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "", None, 3]),
        "shape": st.one_of(st.lists(numbers, max_size=3), numbers),
        "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), st.lists(numbers, max_size=3), numbers),
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["a", "b", "c", "", "__metadata__"]), fields, max_size=3), st.integers(0, 24))
def test_headers_made_up(header: dict[str, Any], size: int) -> None:
    text = json.dumps(header).encode()
    accepts_no_more_than_the_library(struct.pack("<Q", len(text)) + text + bytes(size))


# ---- writing where it cannot be done


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does, without one: the kernel refuses to let any file grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may write anywhere, so act as nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("shard", [None, 40_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, shard: int | None) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"what was there before")
    tensors = {f"t{i}": torch.zeros(5000) for i in range(4)}
    with files_of_at_most(30_000), pytest.raises(UserError, match="disk is full") as caught:
        write_safetensors(tensors, tmp_path / "m.safetensors", shard_bytes=shard)
    assert str(tmp_path) in str(caught.value)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("m.safetensors", b"what was there before")]


def test_a_folder_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as name:  # outside pytest's own folder, which another user may not enter
        folder = Path(name)
        folder.chmod(0o555)
        with (
            without_privileges(),
            pytest.raises(UserError, match=r"cannot be written: Permission denied; .*may write to"),
        ):
            write_safetensors({"a": torch.zeros(1)}, folder / "m.safetensors")
        assert not list(folder.iterdir())


def test_a_file_that_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_safetensors({"a": torch.zeros(1)}, folder / "m.safetensors")
        (folder / "m.safetensors").chmod(0)
        with without_privileges():
            refused(folder, "cannot be read", "Permission denied")


def test_a_failing_stream_leaves_nothing(tmp_path: Path) -> None:
    def stream() -> Any:
        yield "a", torch.zeros(100)
        yield "b", torch.zeros(100)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="broke"):
        write_safetensors(stream(), tmp_path / "m.safetensors", shard_bytes=10)
    assert not list(tmp_path.iterdir())


def test_tensors_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice"):
        write_safetensors([("a", torch.zeros(1)), ("a", torch.zeros(1))], tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="reserved"):
        write_safetensors({"__metadata__": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="complex128"):
        write_safetensors({"a": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="cannot be written"):
        write_bytes(tmp_path / "absent" / "x.json", [b"{}"])
    assert not list(tmp_path.iterdir())
