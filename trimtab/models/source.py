"""A model to work on: its skeleton without weights, its weights read on demand, and what else its folder holds.

A name is one of: `pocket-lm` and its siblings, a local Hugging Face folder, `package.module:function` (a Python
function that returns an
`nn.Module`), or a hub name that the local cache holds or the network gives.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.method import did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trimtab.formats.checkpoint import Checkpoint

# what a folder must give along with the weights, and an artifact or export copies
SIDECARS = (
    *(
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
    ),
)
MOST_LAYERS = 4096  # more come from a damaged configuration, and making so many modules might never end
TASKS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForImageClassification": "classification",
}


@dataclass
class Source:
    """A model to work on.

    Fields:
        name: what the user called it.
        task: the name of the task that its architecture is for.
        skeleton: makes the module in eval mode with all parameters on the meta device and all buffers real.
        read: reads a parameter (or persistent buffer) by the name that the skeleton gives it, in the stored type.
        names: every name that `read` knows, each storage once.
        hash: SHA-256 of the weights' files (or tensors), 16 digits.
        bytes: bytes on disk of weights and sidecars.
        folder: where the files lie; None for a Python function's model.
        config: `config.json`, or {}.
        dtype: the type most weights are stored in.
    """

    name: str
    task: str
    skeleton: Callable[[], nn.Module]
    read: Callable[[str], Tensor]
    names: tuple[str, ...]
    hash: str
    bytes: int
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bf16"

    def sidecars(self) -> list[Path]:
        """Files that go along with the weights."""
        return [p for n in SIDECARS if self.folder and (p := self.folder / n).is_file()]

    def tokenizer(self) -> Any:
        """The model's own tokenizer.

        Raises:
            UserError: the folder has none that loads.
        """
        from transformers import AutoTokenizer

        if not self.folder or not any(
            (self.folder / n).exists() for n in ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
        ):
            raise UserError(
                f"{self.name} has no tokenizer files (tokenizer.json); put the model's own tokenizer into its folder"
            )
        try:
            return AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a broken file
            raise UserError(f"the tokenizer of {self.name} does not load: {_first_line(error)}") from error

    def materialise(self) -> nn.Module:
        """The whole model with its weights in fp32."""
        model = self.skeleton()
        fill(model, self.names, self.read)
        return model


def fill(
    model: nn.Module, names: Iterable[str], read: Callable[[str], Tensor], dtype: torch.dtype | None = None
) -> None:
    """Give a skeleton its weights, in fp32 unless told otherwise; tied parameters stay tied."""
    import torch

    shared: dict[int, Any] = {}
    known = set(names)
    for module_name, module in model.named_modules():
        for key, old in list(module._parameters.items()):
            if old is None or not old.is_meta:
                continue
            full = f"{module_name}.{key}" if module_name else key
            if id(old) not in shared:
                aliases = (
                    [full]
                    if full in known
                    else [n for n, p in model.named_parameters(remove_duplicate=False) if p is old and n in known]
                )
                if not aliases:
                    raise UserError(f"the checkpoint has no tensor for {full}; the download may be incomplete")
                value = read(aliases[0])
                if value.shape != old.shape:
                    raise UserError(
                        f"{full} has shape {tuple(value.shape)} in the checkpoint, and the configuration says "
                        f"{tuple(old.shape)}"
                    )
                shared[id(old)] = torch.nn.Parameter(value.to(dtype or torch.float32), requires_grad=False)
            module._parameters[key] = shared[id(old)]
        for key, old in list(module._buffers.items()):
            full = f"{module_name}.{key}" if module_name else key
            if old is not None and full in known:
                module._buffers[key] = read(full).to(old.dtype)


def open_source(name: str) -> Source:
    """The model of that name.

    Raises:
        UserError: there is no such model, it is damaged, or it is of a kind that cannot be taken.
    """
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) and not Path(name).exists():
        return _entry_point(name)
    return _from_folder(name, folder_of(name))


def folder_of(name: str) -> Path:
    """The folder of the model of that name: a pocket model, a local folder, or a snapshot of a hub name.

    Raises:
        UserError: there is none.
    """
    from trimtab.models.pocket import POCKET

    if name in POCKET:
        return POCKET[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{name} is a file; give the folder that holds config.json and the .safetensors weights")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return _hub(name)
    raise UserError(
        f"there is no model {name!r}{did_you_mean(name, POCKET)}; give a folder, a hub name like owner/name, "
        f"module:function, or one of {', '.join(POCKET)}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _original_config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder that holds an original model."""
    if (folder / "trimtab.json").is_file():
        raise UserError(f"{folder} is a Trimtab artifact, already compressed; give the original model")
    return read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`.

    Raises:
        UserError: it is missing, no JSON object, or names its architectures in another way than by a list.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json; give a Hugging Face model folder")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({_first_line(error)}); download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is JSON, but no object; download it again")
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: its `architectures` is no list of names; download it again")
    return config


def skeleton_of(config_dict: Mapping[str, Any], where: str) -> nn.Module:
    """The module that a configuration describes, of transformers or ours: parameters on the meta device, buffers real;
    nothing of the folder is run.

    Raises:
        UserError: the configuration names no known architecture, or makes no model.
    """
    from trimtab.models.pocket.cnn import MODEL_TYPE, PocketCNN

    if config_dict.get("model_type") == MODEL_TYPE:
        return _on_meta(PocketCNN.from_config(dict(config_dict)))
    import torch
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    config_dict = {
        k: v for k, v in config_dict.items() if not k.startswith("_") and k not in ("auto_map", "quantization_config")
    }
    architectures = config_dict.get("architectures") or []
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        count = config_dict.get(key)
        if isinstance(count, int) and count > MOST_LAYERS:
            raise UserError(
                f"the configuration of {where} asks for {count} layers, and a model has at most {MOST_LAYERS} here; "
                f"correct its `{key}`"
            )
    known = {n: t for mapping in _mappings(modeling_auto) for t, n in mapping.items()}
    if not architectures or architectures[0] not in known:
        raise UserError(
            f"{where} is of architecture {(architectures or ['unknown'])[0]}, which is none of this transformers' "
            "causal "
            "or masked language models, encoders and image classifiers; no code of a model's folder is ever run"
        )
    try:
        config = AutoConfig.for_model(**config_dict)
        cls = getattr(transformers, architectures[0])
        with torch.device("meta"):
            model = (
                cls._from_config(config, attn_implementation="sdpa") if cls._supports_sdpa else cls._from_config(config)
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the configuration of {where} does not make a model: {_first_line(error)}") from error
    model.eval()
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            module._buffers[key] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)
    return model


def _mappings(auto: Any) -> list[Any]:
    wanted = ("CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "")
    return [getattr(auto, f"MODEL_{'FOR_' if w else ''}{w}{'_' if w else ''}MAPPING_NAMES") for w in wanted]


def _from_folder(name: str, folder: Path) -> Source:
    from trimtab.models.pocket.cnn import MODEL_TYPE

    config = _original_config(folder)
    return (_pocket_cnn if config.get("model_type") == MODEL_TYPE else _huggingface)(name, folder, config)


def _huggingface(name: str, folder: Path, config: dict[str, Any]) -> Source:
    from trimtab.formats.checkpoint import Checkpoint

    if "quantization_config" in config:
        raise UserError(
            f"{name} is already quantised ({config['quantization_config'].get('quant_method', 'unknown')}); give the "
            "original in floating point"
        )
    checkpoint = Checkpoint(folder)
    architecture = (config.get("architectures") or [""])[0]
    task = next((t for suffix, t in TASKS.items() if architecture.endswith(suffix)), "embedding")
    model = skeleton_of(config, name)
    aliases = _aliases(model, checkpoint, name)
    checkpoint.check_finite()

    def read(parameter: str) -> Tensor:
        return checkpoint.read(aliases[parameter])

    bytes_ = checkpoint.bytes + sum((folder / n).stat().st_size for n in SIDECARS if (folder / n).is_file())
    dtype = _main_dtype([(checkpoint.dtype(c), checkpoint.shape(c)) for c in aliases.values()])
    return Source(
        name,
        task,
        lambda: skeleton_of(config, name),
        read,
        tuple(aliases),
        checkpoint.hash()[:16],
        bytes_,
        folder,
        config,
        dtype,
    )


def _aliases(model: nn.Module, checkpoint: Checkpoint, where: str) -> dict[str, str]:
    """Parameter name -> name in the checkpoint, which may lack the base model's prefix, have it in excess, or be older.

    Raises:
        UserError: a tensor is missing, or has another shape than the configuration says.
    """
    stored = set(checkpoint.names())
    renamed, merged = _renamed(model, stored)
    prefix = getattr(model, "base_model_prefix", "")
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(_persistent(model))}
    found: dict[str, str] = {}
    for name in tensors:
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if source := candidate if candidate in stored else renamed.get(candidate):
                found[name] = source
                break
    covered = {id(tensors[n]) for n in found}
    absent = [n for n in tensors if id(tensors[n]) not in covered]
    if absent and merged:
        raise UserError(
            f"{where} stores {merged} apart, and its architecture holds it in one tensor with others; load the model "
            "with transformers and save it with `save_pretrained(folder, save_original_format=False)`"
        )
    if absent:
        raise UserError(
            f"the checkpoint of {where} lacks {len(absent)} of the model's tensors, {absent[0]} first; it may be "
            "incomplete, or saved by another version of the architecture: download it again"
        )
    first: dict[int, str] = {}
    for name in found:
        first.setdefault(id(tensors[name]), name)
    aliases = {n: found[n] for n in first.values()}
    for name, source in aliases.items():
        if checkpoint.shape(source) != tuple(tensors[name].shape):
            raise UserError(
                f"{source} of {where} has shape {checkpoint.shape(source)} in the checkpoint, and config.json makes "
                f"it {tuple(tensors[name].shape)}: the two do not belong together; download the model again"
            )
    return aliases


def checkpoint_names(config: Mapping[str, Any], checkpoint: Checkpoint, where: str) -> list[str]:
    """A checkpoint's names of the tensors of its model, in the order in which the module has them."""
    return list(_aliases(skeleton_of(config, where), checkpoint, where).values())


def _renamed(model: nn.Module, stored: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """Name in the model -> older name in the checkpoint, as this transformers renames it; a name that is but a part."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(model)
    names = [c for c in changes if isinstance(c, WeightRenaming)]
    rest = [c for c in changes if not isinstance(c, WeightRenaming)]
    found, part = {}, None
    for name in sorted(stored):
        new, converted = rename_source_key(name, names, rest)
        if converted is not None:
            part = part or name
        elif new != name:
            found[new] = name
    return found, part


def _persistent(model: nn.Module) -> list[tuple[str, Tensor]]:
    keep = set(model.state_dict(keep_vars=True))
    return [(n, b) for n, b in model.named_buffers() if n in keep]


def _main_dtype(stored: list[tuple[str, tuple[int, ...]]]) -> str:
    from collections import Counter
    from math import prod

    total: Counter[str] = Counter()
    for dtype, shape in stored:
        total[{"F32": "fp32", "BF16": "bf16", "F16": "fp16"}.get(str(dtype).upper(), "fp32")] += prod(shape)
    return total.most_common(1)[0][0] if total else "fp32"


def _pocket_cnn(name: str, folder: Path, config: dict[str, Any]) -> Source:
    from trimtab.formats.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    size = checkpoint.bytes + (folder / "config.json").stat().st_size
    return Source(
        name,
        "classification",
        lambda: skeleton_of(config, name),
        checkpoint.read,
        tuple(checkpoint.names()),
        checkpoint.hash()[:16],
        size,
        folder,
        config,
        "fp32",
    )


def _on_meta(model: nn.Module) -> nn.Module:
    import torch

    for module in model.modules():
        for key, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[key] = torch.nn.Parameter(p.to("meta"), requires_grad=False)
    return model.eval()


def from_module(model: nn.Module, name: str, task: str = "classification") -> Source:
    """A module in memory as a source; the module is copied when worked on, never changed."""
    import copy
    import hashlib

    tensors = dict(model.state_dict())
    digest = hashlib.sha256()
    for key, tensor in tensors.items():
        digest.update(key.encode() + tensor.contiguous().reshape(-1).view(dtype=_uint8()).numpy().tobytes())
    broken = [k for k, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise UserError(
            f"{name}: {broken[0]} holds NaN or infinite weights; a model with broken weights cannot be fitted"
        )
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    return Source(
        name,
        task,
        lambda: _on_meta(copy.deepcopy(model)),
        lambda n: tensors[n],
        tuple(tensors),
        digest.hexdigest()[:16],
        size,
        None,
        {},
        "fp32",
    )


def _uint8() -> Any:
    import torch

    return torch.uint8


def _entry_point(name: str) -> Source:
    import torch

    made = call_entry(name)
    if not isinstance(made, torch.nn.Module):
        raise UserError(f"{name} returned a {type(made).__name__}; it must return an nn.Module")
    return from_module(made.eval(), name)


def call_entry(name: str) -> Any:
    """What the function that `package.module:function` names returns; the current folder is importable.

    Raises:
        UserError: the module or the function is not there, or importing or calling it fails.
    """
    module_name, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    importlib.invalidate_caches()
    try:
        return getattr(importlib.import_module(module_name), function)()
    except Exception as error:  # the code is the user's own
        raise UserError(
            f"{name} was asked for, and calling it fails: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.safetensors.index.json", *SIDECARS]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"{name} is no local folder, and the hub does not give it ({_first_line(error)}); download it first, or "
            "check the name and the network"
        ) from error
