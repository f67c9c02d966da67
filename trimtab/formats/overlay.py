"""A checkpoint that is another one with some tensors changed: links to its files, and the changed tensors beside."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trimtab.core.journal import writing
from trimtab.formats.checkpoint import INDEX, Checkpoint, index_bytes, read_header, write_bytes, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

HELD = 1 << 28  # bytes of changed tensors that are in memory at a time


def overlay(base: Checkpoint, folder: Path, changed: Iterable[tuple[str, Tensor]]) -> Checkpoint:
    """Write a folder that reads as the base with these tensors in place of its own.

    Args:
        folder: is made anew; the base's files are linked, so that they must stay where they are.
        changed: a stream of names that the base has, each once, and tensors.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        written = write_safetensors(changed, folder / "changed.safetensors", shard_bytes=HELD)
        own = {name: file.name for file in written if file.suffix == ".safetensors" for name in read_header(file)[0]}
        for file in written:
            if file.name.endswith(INDEX):
                file.unlink()
        links = {file: f"base-{i}.safetensors" for i, file in enumerate(base.files)}
        for file, name in links.items():
            (folder / name).symlink_to(file.resolve())
        where = {name: own.get(name, links[base.entry(name).file]) for name in base.names()}
        write_bytes(folder / f"model{INDEX}", [index_bytes(where, base.bytes)])
    return Checkpoint(folder)
