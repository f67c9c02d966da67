"""Adapters on disk: PEFT's format wherever the delta is a low-rank pair; else the trained tensors by their paths.

A folder holds `trimtab_adapter.json` (method, level, the base's hash, the adapted paths) and one of

- `adapter_config.json` and `adapter_model.safetensors`: PEFT's own, of type LORA:
  `base_model.model.<path>.lora_A.weight` `[r, in]` and `lora_B.weight` `[out, r]` (the scale is in B, and
  `lora_alpha` is r), and for DoRA `lora_magnitude_vector` `[out]`.
  Trained columns are a pair too: A picks them, B is their change;
- `delta.safetensors`: `<path>/<name>` for every trained or drawn tensor of the method's module.

A fresh head is there whole, in PEFT's format as one of `modules_to_save`: `base_model.model.<path>.weight` and `bias`.

Nothing of it is code, and nothing is unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.journal import commit_folder, write_atomic, writing
from trimtab.core.level import parse_level
from trimtab.engine.run import PackedLinear
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.peft import CONFIG, LENGTHS, PREFIX, WEIGHTS, read_adapter
from trimtab.parts.frozen import Frame, Frozen
from trimtab.parts.ladder import Rung
from trimtab.parts.lowrank_delta import LowRank
from trimtab.parts.shared import Shared
from trimtab.parts.trained_grid import OnGrid

FORMAT = 1
ABOUT, DELTA = "trimtab_adapter.json", "delta.safetensors"
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "embedding": "FEATURE_EXTRACTION"}


def frames(model: nn.Module) -> dict[str, Frame | Rung]:
    """The adapted linears or blocks of a model, by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Frame | Rung)}


def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into a plain linear, in place; a matrix that was trained on a grid stays packed.

    Raises:
        UserError: a method's delta depends on the input, so that no plain linear has its function.
    """
    for path, frame in frames(model).items():
        try:
            merged = PackedLinear(frame.packed(), frame.bias) if isinstance(frame, OnGrid) else frame.merged()
        except NotImplementedError:
            raise UserError(f"{path} is adapted by a method that cannot be merged; serve it as an adapter") from None
        model.set_submodule(path, merged)
    return model


def write_merged(source: Path, model: nn.Module, folder: Path) -> int:
    """Write an artifact anew with what was trained on its grids, at the same levels; its bytes on disk.

    Args:
        source: the artifact that the model was opened from.
        model: its linears trained on a grid, not merged.

    Raises:
        UserError: an adapter is no change of scales and codes, so that no artifact of these levels has its function.
    """
    from trimtab.models.artifact import MANIFEST, open_artifact, write_artifact

    contents = open_artifact(source)
    packed = {}
    for path, frame in frames(model).items():
        if not isinstance(frame, OnGrid):
            raise UserError(
                f"{path} is adapted by a method that leaves no grid; serve it as an adapter beside {source}"
            )
        packed[f"{path}.weight"] = frame.packed()
    rows = contents.manifest["packed"]
    tensors = {name: packed[name] if name in packed else read() for name, read in contents.packed.items()}
    names = sorted([*tensors, *contents.dense])
    return write_artifact(
        folder,
        ((name, tensors[name] if name in tensors else contents.read(name)) for name in names),
        {name: (row["shape"], row["transposed"]) for name, row in rows.items()},
        {k: v for k, v in contents.manifest.items() if k not in ("packed", "format")},
        [p for p in sorted(source.iterdir()) if p.is_file() and p.name != MANIFEST and "safetensors" not in p.name],
    )


def write_adapter(folder: Path, model: nn.Module, about: Mapping[str, Any], base: str, task: str) -> int:
    """Write a model's adapters: all or nothing; their bytes on disk.

    Args:
        about: method, level, the base's hash; path and classes of a fresh head, if there is one.
        base: the name that PEFT is to load the base under.
    """
    found = frames(model)
    pairs = {path: frame.factored() for path, frame in found.items()}
    ranks = {path: len(pair[0]) for path, pair in pairs.items() if pair is not None}
    head = about.get("head")
    whole = dict(model.get_submodule(head).named_parameters()) if head else {}
    temporary = folder.with_name(f".{folder.name}.part")
    with writing(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            if len(ranks) == len(found):
                lengths = any(pair is not None and pair[2] is not None for pair in pairs.values())
                config = _config(model, found, ranks, lengths, base, task) | {
                    "modules_to_save": [head] if head else None
                }
                write_atomic(temporary / CONFIG, lambda p: p.write_text(json.dumps(config, indent=2), "utf-8"))
                own = {f"{PREFIX}{head}.{name}": value.detach() for name, value in whole.items()}
                write_safetensors(dict(_peft(pairs)) | own, temporary / WEIGHTS)
            else:
                own = {f"{head}/{name}": value.detach() for name, value in whole.items()}
                write_safetensors(dict(_plain(found)) | own, temporary / DELTA)
            entry = {"format": FORMAT, **about, "sites": list(found), "peft": len(ranks) == len(found)}
            entry["shapes"] = [[frame.out_features, frame.in_features] for frame in found.values()]
            write_atomic(temporary / ABOUT, lambda p: p.write_text(json.dumps(entry, indent=1), "utf-8"))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    commit_folder(temporary, folder)
    return sum(p.stat().st_size for p in folder.iterdir())


def _peft(pairs: Mapping[str, Any]) -> Any:
    for path, (a, b, lengths) in pairs.items():
        yield f"{PREFIX}{path}.lora_A.weight", a.contiguous()
        yield f"{PREFIX}{path}.lora_B.weight", b.contiguous()
        if lengths is not None:
            yield f"{PREFIX}{path}{LENGTHS}", lengths.contiguous()


def _plain(found: Mapping[str, Frame | Rung]) -> Any:
    seen: dict[int, Tensor] = {}  # what several share is stored with the first
    for path, frame in found.items():
        for name, value in frame.state_dict(keep_vars=True).items():
            if not name.startswith("base.") and id(value) not in seen:
                seen[id(value)] = value
                yield f"{path}/{name}", value.detach().contiguous()


def _config(
    model: nn.Module, found: Mapping[str, Frame | Rung], ranks: Mapping[str, int], lengths: bool, base: str, task: str
) -> dict[str, Any]:
    names = sorted({path.rpartition(".")[2] for path in found})
    same = {
        p for p, m in model.named_modules() if p.rpartition(".")[2] in names and (isinstance(m, Frame) or _linear(m))
    }
    common = max(ranks.values(), default=1)
    others = {path: rank for path, rank in ranks.items() if rank != common}
    return {
        **{"peft_type": "LORA", "task_type": TASK_TYPES.get(task), "base_model_name_or_path": base},
        **{"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": others},
        **{"target_modules": names if same == set(found) else sorted(found), "bias": "none", "lora_dropout": 0.0},
        **{"use_dora": lengths, "use_rslora": False, "inference_mode": True, "init_lora_weights": True},
        "fan_in_fan_out": any(frame.frozen.transposed for frame in found.values()),
    }


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def read_about(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of itself; of one by PEFT, what its configuration says.

    Raises:
        UserError: the folder holds no adapter, or a damaged one.
    """
    path = next((p for n in (ABOUT, CONFIG) if (p := folder / n).is_file()), None)
    if path is None:
        raise UserError(f"{folder} holds no adapter: neither {ABOUT} nor {CONFIG} is there; `trimtab adapt` makes one")
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train the adapter again") from error
    return found


def check_base(folder: Path, hashes: Callable[[], Collection[str]], about: Mapping[str, Any] | None = None) -> None:
    """Refuse an adapter that says it was trained on another model.

    Args:
        about: what its folder says of itself; None: it is read.
        hashes: gives those that fit, if they are known; called where the adapter names one.

    Raises:
        UserError: it names a hash that is not among them.
    """
    named = (read_about(folder) if about is None else about).get("hash")
    if named is not None and (known := hashes()) and named not in known:
        raise UserError(
            f"{folder} was trained on a model of hash {named}, and this one has {' or '.join(sorted(known))}: its "
            "outputs would be others; name the model that it was trained on, or insist with --force"
        )


def attach(model: nn.Module, folder: Path, base_hash: str | None = None, force: bool = False) -> nn.Module:
    """Put a folder's adapter onto a model, in place; also one that PEFT wrote, where it is a LoRA.

    Args:
        base_hash: of the model that it is put onto; None: not compared.
        force: put it on although it was trained on another model.

    Raises:
        UserError: it is no adapter, was trained on another model, or names a linear that the model lacks.
    """
    about = read_about(folder)
    if base_hash and not force:
        check_base(folder, lambda: (base_hash,), about)
    return _attach_delta(model, folder, about) if (folder / DELTA).is_file() else _attach_pair(model, folder)


def _attach_pair(model: nn.Module, folder: Path) -> nn.Module:
    adapter = read_adapter(folder, dora=True, whole=True)
    for path, tensors in adapter.whole.items():
        _put_head(model, path, tensors, folder)
    for path, (a, b) in adapter.factors.items():
        module = _module(model, path, folder)
        base = Frozen(module)
        if a.shape[1:] != (base.in_features,) or b.shape != (base.out_features, len(a)):
            raise UserError(
                f"{folder}: the factors of {path} are {tuple(b.shape)} and {tuple(a.shape)}, and the model's matrix is "
                f"{base.out_features} x {base.in_features}: the adapter is of another model"
            )
        frame = LowRank(module, a.clone(), b.clone(), 1.0, magnitude=path in adapter.lengths)
        if frame.magnitude is not None:
            frame.magnitude.data.copy_(adapter.lengths[path])
        model.set_submodule(path, frame)
    return model


def _put_head(model: nn.Module, path: str, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Put a linear that was trained whole in the place of a model's."""
    old, weight = _module(model, path, folder), tensors.get("weight")
    if weight is None or weight.ndim != 2 or not isinstance(old, nn.Linear) or weight.shape[1] != old.in_features:
        raise UserError(
            f"{folder} replaces {path}, which is no linear of that many inputs here: it is of another model"
        )
    head = nn.Linear(old.in_features, len(weight), "bias" in tensors, dtype=weight.dtype)
    head.load_state_dict(dict(tensors))
    model.set_submodule(path, head)


def _attach_delta(model: nn.Module, folder: Path, about: Mapping[str, Any]) -> nn.Module:
    from trimtab.core.plan import parse_method

    file, chosen, level = Checkpoint(folder / DELTA), parse_method(about["method"]), parse_level(about["level"])
    modules = {path: _module(model, path, folder) for path in about["sites"]}
    shared = Shared(tuple((rows, cols) for rows, cols in about["shapes"]))
    for place, (path, module) in enumerate(modules.items()):
        rows, cols = shared.shapes[place]
        stats = {
            **{"rng": torch.Generator(), "gram": torch.eye(cols), "mean": torch.zeros(cols)},
            **{"absmean": torch.ones(cols), "grad": torch.zeros(rows, cols)},
            "shared": shared.at(place),
        }
        frame = chosen.wrap(module, level, **{k: stats[k] for k in chosen.needs()})  # type: ignore[attr-defined]
        mine: dict[str, Tensor] = {n.split("/", 1)[1]: file.read(n) for n in file.names() if n.startswith(f"{path}/")}
        _, unknown = frame.load_state_dict(mine, strict=False)
        if unknown:
            raise UserError(f"{folder} holds {unknown[0]} for {path}, which {about['method']} does not know")
        model.set_submodule(path, frame)
    if head := about.get("head"):
        tensors = {n.rpartition("/")[2]: file.read(n) for n in file.names() if n.startswith(f"{head}/")}
        _put_head(model, head, tensors, folder)
    return model


def _module(model: nn.Module, path: str, folder: Path) -> nn.Module:
    from trimtab.core.method import did_you_mean

    known = dict(model.named_modules())
    if path not in known:
        raise UserError(f"{folder} adapts {path}, which the model lacks{did_you_mean(path, known)}")
    return known[path]
