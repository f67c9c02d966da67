"""Artifacts: what `fit` hands over and `run` loads. Safetensors, the configuration, and `trimtab.json`; nothing of it
is code.

`trimtab.json` says for each packed weight its level and shape, the changes of structure, the plan, and where it all
came from. A packed weight lies in the safetensors file as `<parameter>.<part>`
(`model.layers.0.mlp.up_proj.weight.codes`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.journal import commit_folder, write_atomic, writing
from trimtab.core.level import NM, Level, Sparse, parse_level
from trimtab.formats.packed import Packed, tensor_names
from trimtab.models.source import fill, skeleton_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trimtab.engine.program import Matrix
    from trimtab.formats.checkpoint import Checkpoint

FORMAT = 1
MANIFEST = "trimtab.json"
SHARD = 1 << 30


@dataclass
class Contents:
    """An artifact's manifest, parsed and checked, and a reader of its tensors.

    Fields:
        folder: where it lies.
        manifest: the parsed `trimtab.json`.
        packed: parameter name -> reader of the packed weight.
        dense: names of the tensors stored as they are.
        read: reads one of these.
    """

    folder: Path
    manifest: dict[str, Any]
    packed: dict[str, Callable[[], Packed]]
    dense: tuple[str, ...]
    read: Callable[[str], Tensor]


def write_artifact(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor | Packed]],
    shapes: Mapping[str, tuple[list[int], bool]],
    manifest: dict[str, Any],
    sidecars: list[Path],
) -> int:
    """Write an artifact: all of it or nothing; its bytes on disk.

    Args:
        tensors: parameter name -> tensor or packed weight, streamed.
        shapes: parameter name -> (shape in the module, stored transposed) of packed weights.
        manifest: plan, edits, source, task.
        sidecars: configuration and tokenizer files to copy.
    """
    from trimtab.formats.checkpoint import write_safetensors

    packed: dict[str, Any] = {}

    def flat() -> Iterator[tuple[str, Tensor]]:
        for name, value in tensors:
            if isinstance(value, Packed):
                shape, transposed = shapes[name]
                packed[name] = {
                    "level": str(value.level),
                    "matrix": list(value.shape),
                    "shape": shape,
                    "transposed": transposed,
                }
                for part, tensor in value.tensors.items():
                    yield f"{name}.{part}", tensor
            else:
                yield name, value

    temporary = folder.with_name(f".{folder.name}.part")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            write_safetensors(flat(), temporary / "model.safetensors", shard_bytes=SHARD)
            for path in sidecars:
                shutil.copyfile(path, temporary / path.name)
            text = json.dumps(
                {"format": FORMAT, **manifest, "packed": dict(sorted(packed.items()))},
                separators=(",", ":"),
                sort_keys=True,
            )
            write_atomic(temporary / MANIFEST, lambda p: p.write_text(text))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    commit_folder(temporary, folder)
    return folder_bytes(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def open_artifact(folder: Path | str) -> Contents:
    """Read an artifact's manifest and check it against its tensors.

    Raises:
        UserError: it is no artifact, of a newer format, or damaged.
    """
    from trimtab.formats.checkpoint import Checkpoint

    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no artifact: it has no {MANIFEST}; `trimtab fit` makes one")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no JSON; fit the model again") from error
    if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {manifest.get('format')!r}, and this Trimtab reads {FORMAT}; update one or the other"
        )
    for key, kind in (("packed", dict), ("task", str), ("edits", list), ("source", dict)):
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            raise UserError(f"{path} is damaged: its entry {key!r} is missing or of another kind; fit the model again")
    checkpoint = Checkpoint(folder)
    names = set(checkpoint.names())
    packed: dict[str, Callable[[], Packed]] = {}
    for name, row in manifest["packed"].items():
        try:
            level, matrix = parse_level(row["level"]), tuple(int(n) for n in row["matrix"])
            parts = {part: f"{name}.{part}" for part in tensor_names(level)}
            sound = isinstance(row["transposed"], bool) and prod(row["shape"]) == prod(matrix)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise UserError(f"{path} is damaged: its entry of {name} cannot be read; fit the model again") from error
        size = sum(checkpoint.nbytes(p) for p in parts.values())
        if not sound or size != level.bytes(matrix):
            raise UserError(
                f"{folder} is damaged: {name} holds {size} bytes for {row['shape']}, and {level} of {matrix} takes "
                f"{level.bytes(matrix)}; fit the model again"
            )
        names -= set(parts.values())
        packed[name] = partial(_unpacked, checkpoint, name, level, matrix, parts)
    return Contents(folder, manifest, packed, tuple(sorted(names)), checkpoint.read)


def _unpacked(
    checkpoint: Checkpoint, name: str, level: Level, matrix: tuple[int, ...], parts: dict[str, str]
) -> Packed:
    packed = Packed(level, matrix, {k: checkpoint.read(v) for k, v in parts.items()})
    if flaw := packed.flaw():
        raise UserError(f"{checkpoint.path} is damaged: {name} holds {flaw}; fit the model again")
    return packed


def dense_parameter(contents: Contents, name: str) -> Tensor:
    """A packed parameter as the module holds it: unpacked, turned and shaped, fp32."""
    row = contents.manifest["packed"][name]
    weight = contents.packed[name]().dense()
    weight = weight.T.contiguous() if row["transposed"] else weight
    return weight.reshape(row["shape"])


class ContentsStore:
    """Parameters read from an artifact's files, for a program that needs no module (`trimtab.engine.program.Store`)."""

    def __init__(self, contents: Contents) -> None:
        self.contents = contents

    def matrix(self, at: Matrix) -> Packed | Tensor:
        """What is stored of a weight, `[out, in]`."""
        if self.is_packed(at):
            return self.contents.packed[at.name]()
        weight = self.contents.read(at.name)
        weight = weight.T if at.transposed else weight
        if weight.shape != (at.rows, at.cols):
            raise UserError(
                f"{self.contents.folder} is damaged: {at.name} has shape {tuple(weight.shape)}, and the model's "
                f"configuration says {(at.rows, at.cols)}; fit the model again"
            )
        return weight

    def is_packed(self, at: Matrix) -> bool:
        """Whether it is packed."""
        return at.name in self.contents.packed

    def nbytes(self, at: Matrix) -> int:
        """About how many bytes the kernels will hold of it."""
        level = self.contents.manifest["packed"][at.name]["level"] if self.is_packed(at) else "bf16"
        return parse_level(level).bytes((at.rows, at.cols))

    def vector(self, name: str) -> Tensor | None:
        """A parameter of one dimension, fp32; None where there is none of that name."""
        stored = self.contents.read(name).float() if name in self.contents.dense else None
        path, _, key = name.rpartition(".")
        shift = _shift(self.contents, f"{path}.weight") if key == "bias" else None
        return stored if shift is None else shift if stored is None else stored + shift


def _shift(contents: Contents, name: str) -> Tensor | None:
    """What a packed weight adds to its module's bias, where its level stores that."""
    row = contents.manifest["packed"].get(name)
    stored = row is not None and "bias" in tensor_names(parse_level(row["level"]))
    return contents.packed[name]().bias() if stored else None


def build(
    contents: Contents, skeleton: Callable[[], nn.Module] | None = None, packed: bool = False, tables: bool = False
) -> nn.Module:
    """The artifact's module with its weights, in eval mode, in fp32.

    Args:
        skeleton: for a model that came from a Python function: makes that module again; the artifact itself names no
            code to run.
        packed: linears stay packed in memory and unpack for each use.
        tables: so do tables of tokens, which code that looks for torch's own then does not find.
    """
    import torch

    from trimtab.formats.structure import replay

    model = skeleton() if skeleton else make_skeleton(contents)
    replay(model, contents.manifest.get("edits", []))
    if packed:
        _stay_packed(model, contents, tables)
    names = (*contents.packed, *contents.dense)

    def read(name: str) -> Tensor:
        return dense_parameter(contents, name) if name in contents.packed else contents.read(name)

    fill(model, names, read)
    for name in contents.packed:
        shift = _shift(contents, name)
        if shift is not None:
            module = model.get_submodule(name.rpartition(".")[0])
            if not hasattr(module, "weight"):
                continue
            old = module._parameters.get("bias")
            module._parameters["bias"] = torch.nn.Parameter(shift if old is None else old + shift, requires_grad=False)
    return model.eval()


def uses(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by its identity: more than one where it is tied."""
    counts: dict[int, int] = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        counts[id(p)] = counts.get(id(p), 0) + 1
    return counts


def _stay_packed(model: nn.Module, contents: Contents, tables: bool) -> None:
    """Replace linears, and tables, whose weight is packed and not tied by modules that unpack."""
    from torch import nn

    from trimtab.engine.run import PackedEmbedding, PackedLinear

    counts = uses(model)
    for name, reader in contents.packed.items():
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        if counts.get(id(module._parameters.get("weight"))) != 1:
            continue
        if tables and type(module) is nn.Embedding:
            model.set_submodule(path, PackedEmbedding(reader()))
        if type(module) is nn.Linear:
            bias = contents.read(f"{path}.bias").float() if f"{path}.bias" in contents.dense else None
            model.set_submodule(path, PackedLinear(reader(), bias))


def use_kernels(model: nn.Module, contents: Contents) -> None:
    """From now on sparse linears and convolutions run on the kernels where those are at least as fast as torch."""
    from trimtab.kernels.sparse.module import stand_in

    for name, reader in contents.packed.items():
        path, _, parameter = name.rpartition(".")
        sparse = isinstance(parse_level(contents.manifest["packed"][name]["level"]), Sparse | NM)
        found = stand_in(model.get_submodule(path), reader()) if sparse and parameter == "weight" else None
        if found is not None:
            model.set_submodule(path, found.eval())


def make_skeleton(contents: Contents) -> nn.Module:
    """The original's module without weights, from the artifact's configuration.

    Raises:
        UserError: it came from a Python function, which an artifact does not hold.
    """
    from trimtab.models.source import read_config

    if (stitched := contents.manifest.get("stitched")) is not None:
        from trimtab.models.stitched import skeleton_of_stitched

        return skeleton_of_stitched(stitched, str(contents.folder))
    path = contents.folder / "config.json"
    if not path.is_file():
        made_by = contents.manifest.get("source", {}).get("name", "a Python function")
        raise UserError(
            f"{contents.folder} came from {made_by}; name that function again with --model, for an artifact holds no "
            "code"
        )
    return skeleton_of(read_config(contents.folder), str(contents.folder))


def is_artifact(path: Path | str) -> bool:
    """Whether a folder is an artifact."""
    return (Path(path) / MANIFEST).is_file()
