"""The parts that a merge leaves of each parent, on disk, and the parent's tensors made of them again.

A folder `tasks` beside the merged model holds safetensors and `tasks.json`, which says how they were made, from which
base, and the SHA-256 of every tensor of that base. Part `p` of tensor `t` is called `shared/t.p`, or `0/t.p` where it
is the first task's own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.journal import writing
from trimtab.core.method import TaskMerger, did_you_mean, method
from trimtab.engine.merge import passes_of, tiles
from trimtab.engine.merge_stream import Job
from trimtab.formats.checkpoint import (
    DTYPES,
    Checkpoint,
    Entry,
    damaged,
    read_entry,
    read_into,
    write_bytes,
    write_safetensors,
)

FOLDER, DESCRIPTION, FORMAT = "tasks", "tasks.json", 1
HELD = 1 << 28  # bytes of parts that are in memory at a time


# ---- written


def write_tasks(folder: Path, jobs: Sequence[Job], tasks: Sequence[str], digests: Mapping[str, Sequence[str]],
                said: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Write what is stored of every parent, a tensor at a time.

    Args:
        folder: is made anew.
        jobs: of a merge whose method is a `TaskMerger`.
        tasks: names of the parents, in the jobs' order.
        digests: for each tensor the SHA-256 of what was read of it, the base's last.
        said: goes into the description: the method's name and its settings, and the name of the base.

    Returns:
        `names`, `shared_bytes` and `own_bytes`: bytes of the tensors that all share, and of each task's own.
    """
    sizes = {"shared": 0, **{str(i): 0 for i in range(len(tasks))}}

    def parts() -> Iterator[tuple[str, Tensor]]:
        for job in jobs:
            for owner, found in _split(job).items():
                for part, tensor in found.items():
                    sizes[owner] += tensor.numel() * tensor.element_size()
                    yield f"{owner}/{job.piece.name}.{part}", tensor

    tensors = {
        job.piece.name: {"shape": list(job.piece.shape), "dtype": job.dtype, "base": digests[job.piece.name][-1]}
        for job in jobs
    }
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_safetensors(parts(), folder / "model.safetensors", shard_bytes=HELD)
        content = {"format": FORMAT, **said, "tasks": list(tasks), "tensors": tensors}
        write_bytes(folder / DESCRIPTION, [json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"])
    own = {name: sizes[str(i)] for i, name in enumerate(tasks)}
    return {"names": list(tasks), "shared_bytes": sizes["shared"], "own_bytes": own}


def _split(job: Job) -> dict[str, dict[str, Tensor]]:
    """By owner, the parts of a tensor as they are stored; what is not merged is shared as it is."""
    piece, stored = job.piece, _type(job.dtype)
    if piece.method is None:
        return {"shared": {"copy": read_entry(job.entries[0])}}
    assert isinstance(piece.method, TaskMerger) and not passes_of(piece)
    whole = [slice(0, job.count)]
    shared: dict[str, list[Tensor]] = {}
    own: list[dict[str, list[Tensor]]] = [{} for _ in job.sources]
    for tile, at in enumerate(tiles(job.count) if piece.method.tiled else whole):
        *tensors, base = (_read(entry, at) for entry in job.entries)
        if not piece.method.tiled:
            tensors, base = [t.reshape(piece.shape) for t in tensors], base.reshape(piece.shape)
        both, each = piece.method.split(tensors, base, **piece.given({}, tile))
        for kept, found in zip((shared, *own), (both, *each), strict=True):
            for part, tensor in found.items():
                kept.setdefault(part, []).append(tensor.to(stored) if tensor.is_floating_point() else tensor)
    owners = {"shared": shared, **{str(i): found for i, found in enumerate(own)}}
    return {owner: {part: torch.cat(t) for part, t in found.items()} for owner, found in owners.items()}


def _read(entry: Entry, at: slice) -> Tensor:
    """Consecutive elements of a tensor, in fp32."""
    width = DTYPES[entry.dtype][0]
    raw = torch.empty((at.stop - at.start) * width, dtype=torch.uint8)
    read_into(entry, entry.start + at.start * width, raw.numpy().data)
    return raw.view(_type(entry.dtype)).float()


def _type(name: str) -> torch.dtype:
    return getattr(torch, DTYPES[name][1])


# ---- read again


@dataclass(frozen=True)
class Tasks:
    """What lies in a folder `tasks`, checked against its description as far as headers tell.

    Fields:
        folder: the folder itself.
        names: of the tasks.
        base: name of the model that all were tuned from.
        method: makes the tensors.
        tensors: for each tensor of a task its shape, its type and the SHA-256 of the base's.
        checkpoint: the parts.
    """

    folder: Path
    names: tuple[str, ...]
    base: str
    method: TaskMerger
    tensors: dict[str, dict[str, Any]]
    checkpoint: Checkpoint

    def restored(self, task: str, base: Checkpoint | None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one task's model.

        Args:
            base: the model that the task was tuned from, where `method.restores_on_base()`.

        Raises:
            UserError: there is no such task, the base is another one, or parts are missing.
        """
        if task not in self.names:
            known = ", ".join(self.names)
            raise UserError(f"{self.folder} holds the tasks {known}, and no {task!r}{did_you_mean(task, self.names)}")
        owner, names = str(self.names.index(task)), set(self.checkpoint.names())
        found: dict[str, dict[str, dict[str, str]]] = {}
        for name in names:
            whose, _, rest = name.partition("/")
            tensor, _, part = rest.rpartition(".")
            found.setdefault(tensor, {}).setdefault(whose, {})[part] = name
        for tensor, row in self.tensors.items():
            shared, own = (found.get(tensor, {}).get(whose, {}) for whose in ("shared", owner))
            if "copy" in shared:
                yield tensor, self.checkpoint.read(shared["copy"])
                continue
            if not shared or not own:
                raise damaged(self.folder, f"parts of tensor {tensor!r} are missing")
            origin = None if base is None else self._origin(tensor, row["base"], base)
            try:
                made = self.method.restore(origin, self._parts(shared), self._parts(own)).reshape(row["shape"])
            except (RuntimeError, KeyError, ValueError):
                raise damaged(self.folder, f"the parts of tensor {tensor!r} do not fit together") from None
            yield tensor, made.to(_type(row["dtype"]))

    def _parts(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        tensors = {part: self.checkpoint.read(name) for part, name in names.items()}
        return {part: t.float() if t.is_floating_point() else t for part, t in tensors.items()}

    def _origin(self, name: str, digest: str, base: Checkpoint) -> Tensor:
        tensor = read_entry(base.entry(name))
        raw = tensor.reshape(-1).view(torch.uint8).numpy().data
        if hashlib.sha256(raw).hexdigest() != digest:
            raise UserError(f"{name} of {base.path} is not what it was in {self.base} when the tasks were merged; name "
                            "that model with --base")  # fmt: skip
        return tensor.float()


def open_tasks(folder: Path) -> Tasks:
    """The tasks that were kept with a merged model.

    Args:
        folder: of the merged model.

    Raises:
        UserError: none were kept, or what was kept is damaged.
    """
    path = folder / FOLDER / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} keeps no tasks: it has no {FOLDER}/{DESCRIPTION}; merge with --keep-tasks")
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise UserError(f"{path} has format {content['format']!r}, and this Trimtab reads {FORMAT}; update one")
        names, base, name = content["tasks"], content["base"], content["method"]
        sound = all(isinstance(n, str) for n in (*names, base, name))
        tensors = {str(k): {**v, "shape": [int(n) for n in v["shape"]]} for k, v in content["tensors"].items()}
        sound = sound and all(v["dtype"] in DTYPES and isinstance(v["base"], str) for v in tensors.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise damaged(path, "it does not say what is kept") from None
    made = method(name) if sound else None
    if not isinstance(made, TaskMerger):
        raise damaged(path, "it does not say what is kept")
    return Tasks(path.parent, tuple(names), base, made, tensors, Checkpoint(path.parent))
