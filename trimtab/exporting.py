"""From an artifact to the formats that other tools load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.method import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.formats.packed import Packed
    from trimtab.models.artifact import Contents

FORMATS = ("hf", "gguf", "compressed-tensors")


def export(artifact: str | Path, to: str, out: str | Path, *, dtype: str = "bf16", type: str = "F16") -> dict[str, Any]:
    """Write an artifact as a plain Hugging Face folder, a GGUF file or a compressed-tensors folder.

    Args:
        artifact: an artifact's folder, or that of a run.
        to: `hf`, `gguf` or `compressed-tensors`.
        out: folder or file to write; an existing one with other content is refused.
        dtype: of the weights of `hf`.
        type: GGUF type for what the plan leaves open.

    Returns:
        `files`, `bytes`, `exact` and `requantised` weights, notes.

    Raises:
        UserError: unknown format, a level or structure that the format cannot say, or an unwritable place.
    """
    from trimtab.formats.compressed_tensors import export_compressed_tensors
    from trimtab.formats.gguf import export_gguf
    from trimtab.formats.huggingface import export_hf
    from trimtab.models.artifact import is_artifact, open_artifact

    if to not in FORMATS:
        raise UserError(f"unknown format {to!r}{did_you_mean(to, FORMATS)}; choose from {', '.join(FORMATS)}")
    folder = Path(artifact)
    folder = folder if is_artifact(folder) or not is_artifact(folder / "artifact") else folder / "artifact"
    contents = open_artifact(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json: a Python function's model has no Hugging Face form; load it with "
            "trimtab.load"
        )
    config = json.loads(path.read_text())
    if edits := contents.manifest.get("edits"):
        config = _plain_config(edits, config, to)
    tensors = _tensors(contents)
    if to == "hf":
        return export_hf(tensors, config, folder, out, dtype)
    if to == "gguf":
        return export_gguf(tensors, config, folder, out, type)
    return export_compressed_tensors(tensors, config, folder, out)


def _plain_config(edits: list[dict[str, Any]], config: dict[str, Any], to: str) -> dict[str, Any]:
    """The configuration of an edited model, where it is still a plain model of its architecture."""
    from trimtab.formats.structure import plain_config_changes, replay
    from trimtab.models.source import skeleton_of

    changes = plain_config_changes(replay(skeleton_of(config, to), edits), edits)
    if changes is None:
        raise UserError(
            f"the plan changed the structure in a way that {to} cannot say (parts of blocks are gone or differ in "
            "width); run it with trimtab"
        )
    return {**config, **changes}


def _tensors(contents: Contents) -> Iterator[tuple[str, Tensor | Packed]]:
    """Parameters in the shape that the module holds them, packed where that is a plain matrix."""
    from trimtab.models.artifact import dense_parameter

    for name in sorted((*contents.packed, *contents.dense)):
        if name not in contents.packed:
            yield name, contents.read(name)
            continue
        row = contents.manifest["packed"][name]
        plain = not row["transposed"] and list(row["matrix"]) == list(row["shape"])
        yield name, contents.packed[name]() if plain else dense_parameter(contents, name)
