"""Whole models joined into one on disk: `trimtab merge` by methods that look at the models at once.

    models -> traced, joined on data without labels -> batch norms settled -> a plain folder, or an artifact -> renamed

A result that is a model of its parents' architecture is a Hugging Face folder. One that no configuration says, as parts
of other widths, or two models stitched together, is an artifact: configuration, edits, weights.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.journal import commit_folder, writing
from trimtab.core.method import Joiner
from trimtab.merging import STORED, check_output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trimtab.models.source import Source

ITEMS = 64  # items of data that a join looks at, for each that the task calls one


def join(
    models: Sequence[str | os.PathLike[str]],
    *,
    method: Joiner,
    out: str | os.PathLike[str],
    data: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Join two models on data, and write the result.

    Args:
        models: folders, hub names or names of pocket models.
        method: a joiner, like `PLeaS(extra=0.25)`.
        out: the folder to write.
        data: what the models are looked at on, as for `fit`; labels are not read.
        dtype: `bf16`, `fp16` or `fp32`; by default the type of the first model.
        overwrite: replace what is in the folder.

    Returns:
        The report: `out`, `method`, `settings`, `parents`, `form` (`plain` or `artifact`), `tensors`, `bytes`,
        `seconds`.

    Raises:
        UserError: bad input, or models that cannot be joined; nothing was written.
    """
    from trimtab.engine import joining
    from trimtab.models.source import open_source
    from trimtab.tasks.build import task_for

    start = time.perf_counter()
    sources = [open_source(os.fspath(name)) for name in models]
    _check(sources, Path(out), dtype, overwrite)
    task = task_for(sources[0], data)
    batch = task.batch("calibration", ITEMS * task.multiple)
    parents = [source.materialise() for source in sources]
    parts = [batch.take(i, i + task.chunk).inputs for i in range(0, len(batch), task.chunk)]
    batches = [_named(parents[0], inputs) for inputs in parts]
    joined = joining.join(method, parents, batches)
    joining.settle(joined, batches)
    report = save(joined, sources, out=out, method=method, dtype=dtype, overwrite=overwrite)
    return {**report, "seconds": time.perf_counter() - start}


def save(
    model: nn.Module,
    sources: Sequence[Source],
    *,
    out: str | os.PathLike[str],
    method: Joiner,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a joined model, trained further or not, in a form that `load` takes; the report of `join`.

    Args:
        sources: the models that it was joined of.
        method: what joined them, for the description.

    Raises:
        UserError: a type that is none, a result that cannot be described, or a folder that cannot be written.
    """
    from trimtab.models.artifact import folder_bytes
    from trimtab.parts.stitching import Stitched

    folder = Path(out)
    _check(sources, folder, dtype, overwrite)
    work = folder.absolute().parent / f".{folder.name}.joining"
    stored = dtype or sources[0].dtype
    with writing(folder):
        shutil.rmtree(work, ignore_errors=True)
        try:
            if isinstance(model, Stitched):
                form, count = "artifact", _write_stitched(work, model, sources, method, stored)
            else:
                form, count = _write_one(work, model, sources[0], method, stored)
            commit_folder(work, folder.absolute())
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    found = {"out": str(out), "method": method.card.name, "settings": method.config(), "form": form}
    return {**found, "parents": [s.name for s in sources], "tensors": count, "bytes": folder_bytes(folder)}


def _named(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs by the names that a model's forward gives them, in their order where it has others."""
    names = list(inspect.signature(model.forward).parameters)
    return dict(inputs) if set(inputs) <= set(names) else dict(zip(names, inputs.values(), strict=False))


def _check(sources: Sequence[Source], out: Path, dtype: str | None, overwrite: bool) -> None:
    if dtype not in (None, *STORED):
        raise UserError(f"unknown type {dtype!r}; give bf16, fp16 or fp32")
    for source in sources:
        if source.folder is None:
            raise UserError(f"{source.name} is a Python function; models that are joined to a folder come from folders")
    folders = [source.folder.resolve() for source in sources if source.folder]
    if len(set(folders)) < len(folders):
        raise UserError(f"{sources[0].name} was named twice among the models to join; name two different ones")
    kinds = {source.name: source.task for source in sources}
    if len(set(kinds.values())) > 1:
        raise UserError(f"models for {', '.join(kinds.values())} were to be joined; they must be for one task")
    check_output(out, {s.name: s.folder.resolve() for s in sources if s.folder}, overwrite)


def _write_one(work: Path, model: nn.Module, source: Source, method: Joiner, stored: str) -> tuple[str, int]:
    """A model of the parents' class: plain where a configuration says it."""
    from trimtab.formats.checkpoint import write_safetensors
    from trimtab.formats.packed import DTYPES
    from trimtab.formats.structure import plain_config_changes, replay, widening
    from trimtab.models.artifact import write_artifact

    edits = widening(source.skeleton(), model)
    state = model.state_dict()
    tensors = {n: t.to(DTYPES[stored]) if (t := state[n]).is_floating_point() else t for n in sorted(source.names)}
    changes: dict[str, Any] | None = {}
    if edits:
        described = replay(source.skeleton(), edits)
        changes = plain_config_changes(described, edits) if "architectures" in source.config else None
    if changes is None:
        manifest = _manifest(source, method, stored, edits)
        write_artifact(work, iter(tensors.items()), {}, manifest, source.sidecars())
        return "artifact", len(tensors)
    work.mkdir(parents=True)
    write_safetensors(tensors, work / "model.safetensors")
    for path in source.sidecars():
        shutil.copyfile(path, work / path.name)
    config = {k: v for k, v in source.config.items() if k != "torch_dtype"} | changes
    if "architectures" in config:
        config["dtype"] = str(DTYPES[stored]).removeprefix("torch.")
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return "plain", len(tensors)


def _write_stitched(work: Path, model: Any, sources: Sequence[Source], method: Joiner, stored: str) -> int:
    from trimtab.formats.packed import DTYPES
    from trimtab.models.artifact import write_artifact
    from trimtab.models.stitched import describe

    if sources[0].task != "classification":
        raise UserError(f"{method.card.name} of models for {sources[0].task} has no form on disk; it has one of models "
                        "for classification")  # fmt: skip
    state = model.state_dict()
    names = [f"anchors.{i}.{name}" for i, source in enumerate(sources) for name in source.names]
    names += [name for name in state if name.startswith("stitches.")]
    tensors = {n: t.to(DTYPES[stored]) if (t := state[n]).is_floating_point() else t for n in sorted(names)}
    manifest = _manifest(sources[0], method, stored, [])
    manifest["stitched"] = describe(model, [source.config for source in sources])
    write_artifact(work, iter(tensors.items()), {}, manifest, [])
    return len(tensors)


def _manifest(source: Source, method: Joiner, stored: str, edits: list[dict[str, Any]]) -> dict[str, Any]:
    fields = ", ".join(f"{name}={value!r}" for name, value in method.config().items())
    said = f"{method.card.name}({fields})" if fields else method.card.name
    return {
        **{"task": source.task, "dtype": stored, "plan": "", "joined": said, "edits": edits},
        "source": {"name": source.name, "hash": source.hash},
    }
