"""Safetensors checkpoints, read lazily and checked before anything is used, and written atomically.

The header is parsed here, so that a damaged or hostile file ends in one sentence and never in a traceback, an
allocation of the size that it asks for, or a crash. A tensor is copied out with a plain read and nothing is mapped:
pages of a mapped file count as resident, so that reading block after block would fill the memory, and a mapped file
that shrinks meanwhile kills the process.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trimtab.core.errors import UserError
from trimtab.core.journal import writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# safetensors' name of a type -> bytes an element, torch's name
DTYPES: dict[str, tuple[int, str]] = {
    **{"BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"), "U16": (2, "uint16"), "I16": (2, "int16")},
    **{"U32": (4, "uint32"), "I32": (4, "int32"), "U64": (8, "uint64"), "I64": (8, "int64")},
    **{"F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"), "F8_E8M0": (1, "float8_e8m0fnu")},
    **{"F8_E4M3FNUZ": (1, "float8_e4m3fnuz"), "F8_E5M2FNUZ": (1, "float8_e5m2fnuz")},
    **{"F16": (2, "float16"), "BF16": (2, "bfloat16"), "F32": (4, "float32"), "F64": (8, "float64")},
    "C64": (8, "complex64"),
}
MAX_HEADER = 100_000_000
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, safetensors' type name, shape, and first and last byte (exclusive) in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Checkpoint:
    """A checkpoint on disk: a `.safetensors` file, an index file, or a folder that holds either.

    Opening reads the headers alone and checks all of them; no file stays open between reads.

    Args:
        path: the file or folder.

    Raises:
        UserError: something is missing, damaged, inconsistent, or a pickle.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = write_safetensors({"a": torch.ones(2, 3)}, folder / "model.safetensors")
    >>> checkpoint = Checkpoint(folder)
    >>> checkpoint.names(), checkpoint.shape("a"), checkpoint.bytes
    (['a'], (2, 3), 24)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _saying(self.path):
            files, weight_map = _resolve(self.path)
        self.files: list[Path] = files
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        for file in files:
            entries, metadata = read_header(file)
            self.metadata.update(metadata)
            for name, entry in entries.items():
                if weight_map is not None:
                    if weight_map.get(name) != file.name:
                        continue
                elif name in self._entries:
                    other = self._entries[name].file.name
                    what = f"tensor {name!r} is in {other} and again in {file.name}"
                    raise UserError(f"{self.path}: {what}; remove the file that is not wanted")
                self._entries[name] = entry
        absent = [name for name in weight_map or () if name not in self._entries]
        if absent:
            where = (weight_map or {})[absent[0]]
            what = f"the index lists {len(absent)} tensor(s) that the files do not hold, first {absent[0]!r} in {where}"
            raise damaged(self.path, what)
        if not self._entries:
            raise UserError(f"{self.path}: holds no tensors; name a checkpoint with weights")

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        """Where a tensor lies."""
        entry = self._entries.get(name)
        if entry is None:
            known = f"among the {len(self._entries)} stored; Checkpoint.names() lists them"
            raise UserError(f"{self.path}: there is no tensor {name!r} {known}")
        return entry

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """The type of a tensor as safetensors calls it: `F32`, `BF16`, `F16`, `U8`, ..."""
        return self.entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self.entry(name).stop - self.entry(name).start

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(entry.stop - entry.start for entry in self._entries.values())

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        return read_entry(self.entry(name))

    def hash(self) -> str:
        """SHA-256 over the files' names and contents, hexadecimal; a file that did not change is read once."""
        total = hashlib.sha256()
        for file in sorted(self.files, key=lambda f: f.name):
            total.update(f"{file.name}\0{file_hash(file)}\n".encode())
        return total.hexdigest()

    def check_finite(self, names: Iterable[str] | None = None) -> None:
        """Read floating-point tensors piece by piece and refuse NaN and infinity.

        Raises:
            UserError: names the tensors that hold NaN or infinity, with the count.
        """
        import torch

        bad: list[str] = []
        for name in self.names() if names is None else names:
            entry = self.entry(name)
            dtype = _torch_dtype(entry.dtype)
            if not (dtype.is_floating_point or dtype.is_complex):
                continue
            nan = infinite = 0
            for start in range(entry.start, entry.stop, _CHUNK):
                piece = torch.empty(min(_CHUNK, entry.stop - start), dtype=torch.uint8)
                read_into(entry, start, piece.numpy().data)
                values = piece.view(dtype)
                values = values.float() if dtype.itemsize == 1 else values
                isnan = int(values.isnan().sum())
                nan, infinite = nan + isnan, infinite + values.numel() - isnan - int(values.isfinite().sum())
            if nan or infinite:
                bad.append(f"{name} ({nan} NaN, {infinite} infinite of {prod(entry.shape)})")
        if bad:
            more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
            found = f"weights are not finite: {', '.join(bad[:3])}{more}"
            raise UserError(f"{self.path}: {found}; use a checkpoint with finite weights")


def read_entry(entry: Entry) -> Tensor:
    """A tensor, in memory of its own."""
    import torch

    tensor = torch.empty(entry.shape, dtype=_torch_dtype(entry.dtype))
    if tensor.numel():
        read_into(entry, entry.start, tensor.reshape(-1).view(torch.uint8).numpy().data)
    return tensor


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[name][1])


_HASHES: dict[tuple[str, int, int], str] = {}


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal, remembered for this process by path, size and time of change."""
    path = Path(path)
    with reading(path) as file:
        info = os.fstat(file.fileno())
        key = (str(path.resolve()), info.st_size, info.st_mtime_ns)
        if key not in _HASHES:
            digest = hashlib.sha256()
            while piece := file.read(1 << 20):
                digest.update(piece)
            _HASHES[key] = digest.hexdigest()
    return _HASHES[key]


def damaged(path: Path, what: str) -> UserError:
    """What to say of a file that contradicts itself."""
    return UserError(f"{path}: {what}; it is damaged or incomplete: download it again")


# ---- which files


def _resolve(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a checkpoint and, where an index says so, the file name for each tensor."""
    if path.is_dir():
        if (path / "model.safetensors").exists():
            return [path / "model.safetensors"], None
        indexes = sorted(path.glob(f"*{INDEX}"))
        if len(indexes) > 1:
            names = ", ".join(i.name for i in indexes)
            raise UserError(f"{path}: holds {len(indexes)} index files ({names}); name the one that is meant")
        if indexes:
            return _read_index(indexes[0])
        files = sorted(path.glob("*.safetensors"))
        if files:
            return files, None
        pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise UserError(_pickle(path / pickles[0]))
        raise UserError(f"{path}: there is no .safetensors file in this folder; name one that holds the weights")
    if not path.exists():
        raise FileNotFoundError
    if path.suffix in PICKLES:
        raise UserError(_pickle(path))
    return _read_index(path) if path.name.endswith(".json") else ([path], None)


def _pickle(path: Path) -> str:
    convert = "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)`"
    return (
        f"{path}: this is a pickle, which can run code when it is opened, so it is never unpickled; "
        f"where you trust it, convert it with {convert}, or take the publisher's .safetensors"
    )


def _read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    with reading(path) as file:
        raw = file.read(MAX_HEADER + 1)
    content = _json(path, raw, "index")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(path, "the index has no weight_map from tensor names to file names")
    for name in sorted(set(weight_map.values())):
        plain = name == os.path.basename(name) and not set(name) & set("\\:\0")
        if plain and name.endswith(PICKLES):
            raise UserError(_pickle(path.parent / name))
        if not plain or not name.endswith(".safetensors"):
            only = "only .safetensors files in the index's own folder are read"
            raise UserError(f"{path}: the index names {name!r}, and {only}; correct the index or download it again")
        if not (path.parent / name).is_file():
            raise damaged(path, f"the index names {name}, which is missing")
    return [path.parent / name for name in sorted(set(weight_map.values()))], weight_map


# ---- headers


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors that a safetensors file holds, and its metadata, after every check that the header alone allows.

    Raises:
        UserError: the file is missing, cut off, no safetensors, or its header contradicts itself or the file's size.
    """
    with reading(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(9)
        if len(head) < 9 or head[8:] != b"{":
            raise UserError(_not_safetensors(path, head + file.read(64), size))
        length = struct.unpack("<Q", head[:8])[0]
        if length > MAX_HEADER:
            raise damaged(path, f"the header claims {length} bytes, more than the {MAX_HEADER} that the format allows")
        if 8 + length > size:
            raise damaged(path, f"the file is cut off: the header claims {length} bytes and the file has {size}")
        raw = head[8:] + file.read(length - 1)
    header = _json(path, raw, "header")
    if not isinstance(header, dict):
        raise damaged(path, "the header is not a table of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise damaged(path, "the header's __metadata__ is not a table of texts")
    base = 8 + length
    entries = {name: _entry(path, name, fields, base, size) for name, fields in header.items()}
    end, before = base, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < end:
            raise damaged(path, f"the bytes of tensor {name!r} overlap those of {before}")
        if entry.start > end:
            raise damaged(path, f"{entry.start - end} bytes before tensor {name!r} belong to nothing")
        end, before = entry.stop, repr(name)
    if end != size:
        raise damaged(path, f"{size - end} bytes after the last tensor belong to nothing")
    return entries, metadata


def _entry(path: Path, name: str, fields: Any, base: int, size: int) -> Entry:
    fields = fields if isinstance(fields, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 64 and len(offsets) == 2
    if (
        not numbers
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in [*shape, *offsets])
        or prod(max(n, 1) for n in shape) >= 1 << 59  # strides must fit 64 bits even where an axis is empty
    ):
        raise damaged(path, f"the header's entry of tensor {name!r} has no sound shape and data_offsets")
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = f"the types that can be read are {', '.join(DTYPES)}"
        raise UserError(f"{path}: tensor {name!r} has the type {str(dtype)[:40]!r}; {known}")
    start, stop = offsets
    if stop < start or base + stop > size:
        what = f"tensor {name!r} lies in bytes {start} to {stop} of the data, of which the file holds {size - base}"
        raise damaged(path, f"the file is cut off: {what}")
    if prod(shape) * DTYPES[dtype][0] != stop - start:
        raise damaged(path, f"tensor {name!r} of shape {shape} in {dtype} does not take {stop - start} bytes")
    return Entry(path, dtype, tuple(shape), base + start, base + stop)


def _json(path: Path, raw: bytes, what: str) -> Any:
    def no_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice")
        return table

    if len(raw) > MAX_HEADER:
        raise damaged(path, f"the {what} is longer than {MAX_HEADER} bytes")
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=no_twins)
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate is JSON, but no name that can be written
        return content
    except (ValueError, RecursionError) as reason:
        raise damaged(path, f"the {what} is not sound JSON ({str(reason)[:80]})") from None


def _not_safetensors(path: Path, head: bytes, size: int) -> str:
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05" and len(head) > 1):
        return _pickle(path)
    if head.startswith(b"version https://git-lfs"):
        return f"{path}: this is a Git LFS pointer and not the weights; fetch them with `git lfs pull`"
    if head.startswith(b"GGUF"):
        return f"{path}: this is a GGUF file and safetensors are expected; name the original checkpoint"
    if size < 9:
        return f"{path}: the file is cut off: it has {size} bytes, fewer than any safetensors file; download it again"
    return f"{path}: this is no safetensors file: it does not begin with a header; download it again or name another"


# ---- reading and writing bytes


@contextmanager
def _saying(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file or folder; name one that exists") from None
    except OSError as reason:
        raise UserError(f"{path}: cannot be read: {reason.strerror or reason}; name a file that can") from None


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A file open for reading.

    Raises:
        UserError: it is missing, no regular file, or cannot be read.
    """
    with _saying(path):
        if path.exists() and not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path}: this is not a regular file; name one that holds weights")
        with open(path, "rb") as file:
            yield file


def read_into(entry: Entry, start: int, target: memoryview) -> None:
    """Fill `target` with the bytes of a tensor's file from `start` on.

    Raises:
        UserError: the file has become shorter, or cannot be read.
    """
    with reading(entry.file) as file:
        file.seek(start)
        done = 0
        while done < len(target):
            count = file.readinto(target[done:])  # type: ignore[attr-defined]
            if not count:
                raise UserError(
                    f"{entry.file}: the file became shorter while it was read; leave it alone and try again"
                )
            done += count


def write_bytes(path: str | os.PathLike[str], pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file atomically: to a temporary name in the same folder, synchronised to the disk, then renamed.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    path = Path(path)
    with writing(path):
        temporary = _write_temporary(path, pieces)
        _rename({temporary: path})


def _write_temporary(path: Path, pieces: Iterable[bytes | memoryview]) -> Path:
    temporary = path.parent / f".{path.name}.{secrets.token_hex(6)}.tmp"
    try:
        with open(temporary, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return temporary


def _rename(moves: Mapping[Path, Path]) -> None:
    for source, target in moves.items():
        os.replace(source, target)
    for folder in {target.parent for target in moves.values()}:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_safetensors(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
) -> list[Path]:
    """Write tensors to a safetensors file, atomically; the same tensors give the same bytes.

    Args:
        tensors: by name, or a stream of (name, tensor), of which one shard at a time is held in memory.
        path: the file; of several shards the first is called `model-00001-of-0000n.safetensors`, and an index is added.
        metadata: texts for the header; `format: pt` is added.
        shard_bytes: the most bytes of tensors a file (a larger tensor has a file of its own); None: one file.

    Returns:
        The files written, the index last.

    Raises:
        UserError: the disk is full, the folder cannot be written, a name comes twice, or a type cannot be stored.
    """
    path = Path(path)
    stream = sorted(tensors.items()) if isinstance(tensors, Mapping) else tensors
    temporary: list[Path] = []
    weight_map: dict[str, int] = {}
    total = 0
    with writing(path):
        try:
            for shard in _shards(path, stream, shard_bytes):
                temporary.append(_write_temporary(path, _pieces(shard, metadata)))
                weight_map |= dict.fromkeys(shard, len(temporary))
                total += sum(t.numel() * t.element_size() for t in shard.values())
            if len(temporary) == 1:
                _rename({temporary[0]: path})
                return [path]
            files = [path.with_name(name) for name in shard_names(path.stem, len(temporary))]
            index = path.with_name(f"{path.stem}{INDEX}")
            where = {name: files[i - 1].name for name, i in weight_map.items()}
            temporary.append(_write_temporary(index, [index_bytes(where, total)]))
            _rename(dict(zip(temporary, [*files, index], strict=True)))
            return [*files, index]
        except BaseException:
            for file in temporary:
                file.unlink(missing_ok=True)
            raise


def _shards(path: Path, stream: Iterable[tuple[str, Tensor]], limit: int | None) -> Iterator[dict[str, Tensor]]:
    seen: set[str] = set()
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in stream:
        if name in seen or name == "__metadata__":
            raise UserError(f"{path}: tensor {name!r} comes twice or has a reserved name; give each a name of its own")
        seen.add(name)
        size = tensor.numel() * tensor.element_size()
        if limit is not None and shard and held + size > limit:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += size
    yield shard


def layout(
    specs: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The beginning of a safetensors file that holds such tensors, and first and last byte (exclusive) of each in it.

    Args:
        specs: name, safetensors' type name and shape of each; the widest types are put first, so that every tensor
            lies on a multiple of its element's size.
        metadata: texts for the header; `format: pt` is added.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    offset, places = 0, {}
    for name, dtype, shape in sorted(specs, key=lambda spec: (-DTYPES[spec[1]][0], spec[0])):
        end = offset + prod(shape) * DTYPES[dtype][0]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        places[name], offset = (offset, end), end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    base = 8 + len(raw)
    return struct.pack("<Q", len(raw)) + raw, {name: (base + a, base + b) for name, (a, b) in places.items()}


def shard_names(stem: str, count: int) -> list[str]:
    """File names of so many shards; one alone is called by its stem."""
    several = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return several if count > 1 else [f"{stem}.safetensors"]


def index_bytes(weight_map: Mapping[str, str], total: int) -> bytes:
    """The content of an index file: where each tensor lies, and the bytes of all."""
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    """Header and data."""
    import torch

    names = {f"torch.{name}": stored for stored, (_, name) in DTYPES.items()}
    for name, tensor in tensors.items():
        if str(tensor.dtype) not in names or tensor.layout != torch.strided:
            found = f"{tensor.dtype} ({tensor.layout})"
            raise UserError(f"tensor {name!r} is {found}, which safetensors cannot store; convert it first")
    header, places = layout(((n, names[str(t.dtype)], t.shape) for n, t in tensors.items()), metadata)
    yield header
    for name in places:
        if count := tensors[name].numel():
            flat = tensors[name].detach().cpu().contiguous().as_strided((count,), (1,))  # one row may have any stride
            yield flat.view(torch.uint8).numpy().data
