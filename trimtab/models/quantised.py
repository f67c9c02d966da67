"""Models that others quantised, loaded into our packed form as they are: GGUF, GPTQ, AWQ, compressed-tensors.

Each becomes the `Contents` of an artifact, so that everything which runs an artifact runs them too. No weight is
rounded: each is repacked at the level that says the same numbers, or unpacked to `fp32` where no level does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.models.artifact import Contents
from trimtab.models.source import TASKS, Source, read_config, skeleton_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trimtab.formats.checkpoint import Checkpoint
    from trimtab.formats.integers import Foreign
    from trimtab.formats.packed import Packed

# files in which AutoGPTQ and AutoAWQ kept what config.json says today
_OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass
class Quantised:
    """A model that others quantised, opened.

    Fields:
        contents: its weights, as an artifact has them.
        skeleton: makes the module without weights.
        tokenizer: loads its tokenizer, None where it has none.
        notes: sentences on weights that could not stay small.
    """

    contents: Contents
    skeleton: Callable[[], nn.Module]
    tokenizer: Callable[[], Any]
    notes: list[str] = field(default_factory=list)


def is_quantised(path: Path | str) -> bool:
    """Whether a path is a GGUF file, or a folder whose configuration says that it is quantised."""
    path = Path(path).expanduser()
    return path.suffix.lower() == ".gguf" or (
        (path / "config.json").is_file() and _settings(path, read_config(path)) is not None
    )


def open_quantised(path: Path | str) -> Quantised:
    """Read the headers, scales and zero points of a quantised model and check them against its configuration.

    Raises:
        UserError: it is damaged, of a format that does not load, or its tensors are not those of its configuration.
    """
    path = Path(path).expanduser()
    return _open_gguf(path) if path.suffix.lower() == ".gguf" else _open_folder(path)


class _Weights:
    """The parts of a `Contents`, collected tensor by tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows: dict[str, dict[str, Any]] = {}
        self.packed: dict[str, Callable[[], Packed]] = {}
        self.dense: dict[str, Callable[[], Tensor]] = {}
        self.edits: list[dict[str, Any]] = []

    def add_packed(self, name: str, weight: Foreign) -> None:
        from trimtab.formats.structure import flipped

        path, _, _ = name.rpartition(".")
        module = self.model.get_submodule(path)
        shape = list(module.get_parameter("weight").shape)
        if weight.order is not None:
            order = weight.order
            self.edits.append({"op": "gather", "path": path})
            self.dense[f"{path}.order"] = lambda: order
            if f"{path}.bias" in self.dense:
                self.dense[f"{path}.linear.bias"] = self.dense.pop(f"{path}.bias")
            name = f"{path}.linear.weight"
        self.packed[name] = weight.read
        self.rows[name] = {
            "level": str(weight.level),
            "matrix": list(weight.shape),
            "shape": shape,
            "transposed": flipped(module),
        }

    def contents(self, folder: Path, name: str, task: str) -> Contents:
        manifest = {"task": task, "source": {"name": name}, "edits": self.edits, "packed": self.rows}
        return Contents(folder, manifest, self.packed, tuple(self.dense), lambda key: self.dense[key]())


def _module(config: dict[str, Any], where: str) -> nn.Module:
    """The module of a configuration, whose every value a damaged file may have changed."""
    try:
        return skeleton_of(config, where)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"the configuration of {where} does not make a model: {reason}; download it again") from error


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones under each of their names."""
    state = set(model.state_dict(keep_vars=True))
    return dict(model.named_parameters(remove_duplicate=False)) | {n: b for n, b in model.named_buffers() if n in state}


def _check_complete(tensors: dict[str, Tensor], found: set[str], where: str) -> None:
    covered = {id(tensors[name]) for name in found}
    absent = [name for name, tensor in tensors.items() if id(tensor) not in covered]
    if absent:
        raise UserError(
            f"{where} lacks {len(absent)} of the model's tensors, {absent[0]} first; it may be incomplete, or saved by "
            "another version of the architecture: download it again"
        )


# ---- GGUF


def _open_gguf(path: Path) -> Quantised:
    from trimtab.core.level import Dense
    from trimtab.formats.gguf_reader import (
        BLOCKS,
        DENSE,
        GGUF,
        configuration,
        file_names,
        has_tokenizer,
        rotated_heads,
        starts_text,
    )
    from trimtab.formats.integers import Foreign

    file = GGUF(path)
    config = configuration(file)

    def skeleton() -> nn.Module:
        return _module(config, str(path))

    model = skeleton()
    tensors = _tensors(model)
    names = file_names(file, tensors)
    _check_complete(tensors, set(names), str(path))
    weights = _Weights(model)
    for name, target in names.items():
        shape, level = file.shape(target), file.level(target)
        if shape != tuple(tensors[name].shape):
            raise UserError(
                f"{path}: tensor {target} has shape {list(shape)}, and the metadata makes it "
                f"{list(tensors[name].shape)}: the two do not belong together; download it again"
            )
        heads = rotated_heads(file, target, config)

        def read(target: str = target, heads: int | None = heads) -> Packed:
            return file.read(target, heads)

        if isinstance(level, Dense):
            weights.dense[name] = lambda read=read: read().tensors["weight"]  # type: ignore[misc]
        else:
            weights.add_packed(name, Foreign(level, shape, read))

    def tokenizer() -> Any:
        if not has_tokenizer(file):
            return None
        from transformers import AutoTokenizer

        try:
            made = AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises many kinds for what it does not know
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise UserError(
                f"the tokenizer of {path} does not load: {reason}; give the model as a Hugging Face folder"
            ) from error
        if not starts_text(file):
            made.bos_token = None
        return made

    notes = []
    if wide := Counter(file.kinds[t] for t in names.values() if file.kinds[t] not in (*BLOCKS, *DENSE)):
        kinds = ", ".join(f"{n} of {kind}" for kind, n in wide.most_common())
        notes.append(f"{wide.total()} of {len(names)} tensors are held in fp32, for no level has their type: {kinds}")
    return Quantised(weights.contents(path.parent, str(path), "causal-lm"), skeleton, tokenizer, notes)


# ---- folders


def _settings(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What a folder says of its quantisation, with `quant_method`; None where it says nothing."""
    if "quantization_config" in config:
        found = config["quantization_config"]
        if not isinstance(found, dict):
            raise UserError(f"{folder}: the quantization_config of config.json is no object; download it again")
        return found
    for name, method in _OLD_CONFIGS.items():
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text("utf-8"))
            except (ValueError, RecursionError):
                found = None
            if not isinstance(found, dict):
                raise UserError(f"{folder / name} is no JSON object; download it again")
            return {"quant_method": method, **found}
    return None


def _reader(folder: Path, settings: dict[str, Any]) -> Any:
    """What reads the weights of a method, from its settings."""
    method = str(settings.get("quant_method") or settings.get("method") or "unknown").lower()
    if method == "gptq":
        from trimtab.formats.gptq import GPTQ

        return GPTQ(settings, str(folder))
    if method == "awq":
        from trimtab.formats.awq import AWQ

        return AWQ(settings, str(folder))
    if method == "compressed-tensors":
        from trimtab.formats.compressed_tensors import CompressedTensors

        return CompressedTensors(settings, str(folder))
    raise UserError(
        f"{folder} is quantised by {method:.40}; what others quantised loads from GGUF files and from folders of GPTQ, "
        "AWQ and compressed-tensors: give one of these, or the original in floating point"
    )


def _open_folder(folder: Path) -> Quantised:
    from trimtab.formats.checkpoint import Checkpoint
    from trimtab.formats.integers import FLOATS

    config = read_config(folder)
    settings = _settings(folder, config)
    assert settings is not None, "is_quantised comes first"
    reader = _reader(folder, settings)
    checkpoint = Checkpoint(folder)
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(checkpoint.names()):  # making so many modules might never end
        raise UserError(
            f"{folder}: config.json says that there are {layers} layers, and the checkpoint holds "
            f"{len(checkpoint.names())} tensors: the two do not belong together; download the model again"
        )

    def skeleton() -> nn.Module:
        return _module(config, str(folder))

    model = skeleton()
    tensors = _tensors(model)
    weights = _Weights(model)
    plain = {n for n in tensors if n in checkpoint and checkpoint.dtype(n) in FLOATS}
    for name in plain:
        if checkpoint.shape(name) != tuple(tensors[name].shape):
            raise UserError(
                f"{folder}: {name} has shape {checkpoint.shape(name)}, and config.json makes it "
                f"{tuple(tensors[name].shape)}: the two do not belong together; download the model again"
            )
        weights.dense[name] = lambda name=name: checkpoint.read(name)  # type: ignore[misc]
    checkpoint.check_finite(plain)
    coded = {n for n in tensors if n not in plain and _has_codes(checkpoint, n)}
    _check_complete(tensors, plain | coded, str(folder))
    levels: Counter[str] = Counter()
    for name in sorted(coded):
        site = name.removesuffix(".weight")
        weight = reader.read(checkpoint, site, _matrix(model, site, folder))
        _check_bias(checkpoint, f"{site}.bias", tensors)
        weights.add_packed(name, weight)
        levels[str(weight.level)] += 1
    if not coded:
        raise UserError(f"{folder} says that it is quantised, and no weight of it is; download it again")
    notes = []
    if wide := levels["fp32"]:
        notes.append(f"{wide} of {levels.total()} weights are held in fp32: fp16 does not hold their scales")
    architecture = (config.get("architectures") or [""])[0]
    task = next((t for suffix, t in TASKS.items() if architecture.endswith(suffix)), "embedding")
    contents = weights.contents(folder, str(folder), task)
    source = Source(str(folder), task, skeleton, contents.read, contents.dense, "", checkpoint.bytes, folder, config)
    return Quantised(contents, skeleton, source.tokenizer if task != "classification" else lambda: None, notes)


def _has_codes(checkpoint: Checkpoint, name: str) -> bool:
    site = name.removesuffix(".weight")
    return name.endswith(".weight") and any(n in checkpoint for n in (f"{site}.qweight", f"{name}_packed", name))


def _matrix(model: nn.Module, site: str, folder: Path) -> tuple[int, int]:
    """The shape of a linear's weight, `(out, in)`."""
    from torch import nn

    from trimtab.formats.structure import flipped

    module = model.get_submodule(site)
    if type(module) is not nn.Linear and not (flipped(module) and hasattr(module, "nf")):
        raise UserError(f"{folder}: {site} is quantised and is {type(module).__name__}; quantised linears alone load")
    rows, cols = module.get_parameter("weight").shape
    return (cols, rows) if flipped(module) else (rows, cols)


def _check_bias(checkpoint: Checkpoint, name: str, tensors: dict[str, Tensor]) -> None:
    """AutoGPTQ stores a bias of zeros for layers that have none."""
    if name not in tensors and name in checkpoint and bool(checkpoint.read(name).count_nonzero()):
        raise UserError(
            f"{checkpoint.path} holds {name}, which the configuration's architecture does not have; the two do not "
            "belong together: download it again"
        )
