"""Adapters in the format of PEFT: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
LENGTHS = ".lora_magnitude_vector"
PLAIN = {  # settings that make an adapter more than W + scale * B A, and what they are where it is no more than that
    **{"use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "layer_replication": None},
    **{"trainable_token_indices": None, "target_parameters": None, "use_qalora": False},
}


@dataclass(frozen=True)
class Adapter:
    """A low-rank correction of some linears.

    Fields:
        factors: path of the linear -> (down `[rank, in]`, up `[out, rank]` times the scale), fp32.
        name: where it came from.
        config: its configuration.
        lengths: path -> lengths `[out]` that the rows of the sum are scaled to, of DoRA.
        whole: path of a module that was trained whole, as a fresh head is -> its tensors by name.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    name: str
    config: dict[str, Any]
    lengths: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of it."""
        return max(len(down) for down, _ in self.factors.values())


def read_adapter(folder: Path | str, dora: bool = False, whole: bool = False) -> Adapter:
    """A LoRA adapter of PEFT, `W + scale * B A` with scale alpha / r, or alpha / sqrt(r) of rank-stabilised ones.

    Args:
        dora: take lengths of rows as well, which are more than a correction that is added.
        whole: take modules that were trained whole as well.

    Raises:
        UserError: it is no adapter, damaged, holds NaN, or is more than a low-rank correction of linears.
    """
    from trimtab.formats.checkpoint import Checkpoint

    folder = Path(folder).expanduser()
    config = _config(folder, [name for name, taken in (("use_dora", dora), ("modules_to_save", whole)) if taken])
    checkpoint = Checkpoint(folder / WEIGHTS)
    checkpoint.check_finite()
    halves: dict[str, dict[str, Tensor]] = {}
    lengths: dict[str, Tensor] = {}
    saved = tuple(config.get("modules_to_save") or ())
    modules: dict[str, dict[str, Tensor]] = {}
    for name in checkpoint.names():
        if dora and name.endswith(LENGTHS):
            lengths[name.removeprefix(PREFIX).removesuffix(LENGTHS)] = checkpoint.read(name).float()
            continue
        path, _, parameter = name.removeprefix(PREFIX).rpartition(".")
        if path.endswith(saved):
            modules.setdefault(path, {})[parameter] = checkpoint.read(name)
            continue
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name.removeprefix(PREFIX))
        if found is None:
            raise UserError(
                f"{folder} holds {name}, which is no factor of a linear (lora_A, lora_B); only those run here"
            )
        halves.setdefault(found[1], {})[found[2]] = checkpoint.read(name).float()
    if not halves:
        raise UserError(f"{folder} is an adapter without weights; train it again")
    factors = {}
    for path, pair in sorted(halves.items()):
        down, up = pair.get("A"), pair.get("B")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise UserError(f"{folder} is damaged: the factors of {path} do not fit together; download it again")
        factors[path] = down, up * _scale(config, path, len(down))
    return Adapter(factors, str(folder), config, lengths, modules)


def _config(folder: Path, taken: Collection[str]) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} is no adapter: it needs {CONFIG} and {WEIGHTS}, as PEFT saves them")
    try:
        config = json.loads(path.read_text("utf-8"))
        sound = isinstance(config, dict) and float(config["lora_alpha"]) == config["lora_alpha"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or no configuration of LoRA; download it again") from error
    if not sound or str(config.get("peft_type")).upper() != "LORA":
        raise UserError(f"{folder} is an adapter of type {config.get('peft_type') if sound else '?'}; LORA runs here")
    for key, plain in PLAIN.items():
        if key in taken:
            continue
        if config.get(key, plain) not in (plain, None, []):
            raise UserError(
                f"{folder} has {key}={config[key]!r}, which is more than a low-rank correction; merge it instead"
            )
    return config


def _scale(config: dict[str, Any], path: str, rank: int) -> float:
    try:
        patterns = dict(config.get("alpha_pattern") or {})
        alpha = next((a for key, a in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)), config["lora_alpha"])
        return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
    except (re.error, TypeError, ValueError) as error:
        raise UserError(f"alpha_pattern of the adapter cannot be read: {error}; see its {CONFIG}") from error
