"""Plain Hugging Face folders, and what every exporter needs: a model's stock shape, a fresh folder, the side files.

An exporter is a pure mapping. Its input is a stream of (tensor name, dense tensor or `Packed`) under the names that the
stock architecture gives to its parameters, the configuration as a dictionary and the folder of the original, from which
tokenizer and licence are copied. Where the module stores its weight as `(in, out)` (GPT-2's Conv1D), a dense tensor
comes as the module stores it and a `Packed` as methods see it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.journal import writing
from trimtab.core.level import DENSE_BITS, NM, Codebook, Dense, Float, Int, Level, Plus, Rank, Shape, Sparse
from trimtab.formats.checkpoint import write_bytes, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.formats.packed import Packed

Tensors = Iterable[tuple[str, "Tensor | Packed"]]

TARGETS = ("hf", "gguf", "compressed-tensors")
SHARD_BYTES = 4_000_000_000
_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)


def expressible(target: str, level: Level, shape: Shape) -> bool:
    """Whether a target takes a weight of this shape at this level as it is, and this machine's loaders read it back.

    Args:
        target: `hf` (dense weights), `gguf` (block types) or `compressed-tensors` (`pack-quantized`).
        level: the level.
        shape: shape of the weight, `(out, in, ...)`.

    >>> expressible("compressed-tensors", Int(4, 64, symmetric=True), (128, 256))
    True
    >>> expressible("gguf", Int(4, 48), (128, 96))
    False
    """
    if target == "hf":
        correction = level.extra if isinstance(level, Plus) else level
        return isinstance(level, Dense | Int | Float | Codebook | Sparse | NM | Rank | Plus) and not (
            isinstance(correction, Rank) and correction.bias
        )
    if target == "gguf":
        from trimtab.formats.gguf import block_type

        return isinstance(level, Dense) or block_type(level, shape) is not None
    if target == "compressed-tensors":
        from trimtab.formats.compressed_tensors import fits

        # transformers 5.23 with compressed-tensors 0.20 loads no asymmetric weights in this format, its own included
        return isinstance(level, Dense) or (fits(level, shape) and isinstance(level, Int) and level.symmetric)
    raise UserError(f"unknown export target {target!r}; the targets are {', '.join(TARGETS)}")


def export_hf(
    tensors: Tensors,
    config: Mapping[str, Any],
    source_folder: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    dtype: str = "bf16",
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write a folder that stock transformers loads with no Trimtab: every weight dense, in one floating-point type.

    Args:
        tensors: (name, dense tensor or `Packed`) of the whole model.
        config: the original's `config.json`.
        source_folder: where tokenizer, generation settings and licence are copied from; None: nowhere.
        out: the folder to make; it may exist if it is empty.
        dtype: `fp32` (holds every level exactly), `bf16` or `fp16`.
        shard_bytes: the most bytes of tensors a file.

    Returns:
        `files`, `bytes`, `exact` (packed weights whose every value the type holds), `requantised` (those it rounds)
        and `notes`.

    Raises:
        UserError: the tensors do not make the stock architecture, a level stores a bias, a weight overflows fp16, or
            the folder cannot be made.
    """
    import torch

    from trimtab.formats.packed import DTYPES, Packed

    if dtype not in DTYPES:
        raise UserError(f"asked to export weights in {dtype!r}; the types are {', '.join(DENSE_BITS)}")
    stock = Stock(config)
    flow = Flow(tensors, stock, "a plain Hugging Face folder")
    counts: Counter[str] = Counter()
    levels: Counter[str] = Counter()

    def dense() -> Iterator[tuple[str, Tensor]]:
        for name, value in flow:
            full = stock.dense(name, value)
            cast = to_dtype(name, full, DTYPES[dtype])
            if isinstance(value, Packed):
                counts["exact" if torch.equal(cast.float(), full.float()) else "requantised"] += 1
                levels[str(value.level)] += 1
            yield name, cast

    with fresh_folder(out) as folder:
        write_safetensors(dense(), folder / "model.safetensors", shard_bytes=shard_bytes)
        write_config(folder, config, flow, {"dtype": str(DTYPES[dtype]).removeprefix("torch.")})
        copy_companions(source_folder, folder)
        rounded = f"{counts['requantised']} of {levels.total()} compressed weights were rounded to it"
        write_card(folder, levels, f"All weights are stored dense in {dtype}; {rounded}.")
    return summary(out, counts)


# ---- the stock architecture


class Stock:
    """What transformers' own class for a configuration expects: shapes by name, tied names, kinds of modules.

    Raises:
        UserError: transformers itself has no such architecture (code that a model file names is never run).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        import torch
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.pytorch_utils import Conv1D

        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise UserError(
                f"the configuration names the model type {kind!r}, which transformers does not know; "
                "export a model of one of its architectures"
            )
        fields = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
        try:
            self.config = CONFIG_MAPPING[kind].from_dict(fields)
            name = str((config.get("architectures") or [""])[0])
            found = getattr(transformers, name, None) if name.isidentifier() else None
            with torch.device("meta"):
                if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                    model = found(self.config)
                else:
                    model = transformers.AutoModelForCausalLM.from_config(self.config)
        except Exception as reason:
            found = str(reason)[:200]
            raise UserError(
                f"the configuration of type {kind!r} makes no model: {found}; correct config.json"
            ) from None
        self.kind: str = kind
        self.shapes: dict[str, Shape] = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self.aliases: dict[str, str] = dict(model.all_tied_weights_keys)
        self.linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self.conv1d = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        self.ignored = [
            re.compile(p) for p in (*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$")
        ]

    def dense(self, name: str, value: Tensor | Packed) -> Tensor:
        """The weight as the module stores it."""
        from trimtab.formats.packed import Packed

        if not isinstance(value, Packed):
            return value
        full = value.dense()
        return full.T.contiguous() if site_of(name) in self.conv1d else full


class Flow:
    """A stream of tensors, checked against the stock architecture; a weight that is tied and equal comes once.

    `untied` says, once the stream has ended, whether weights that were tied were compressed apart: then both are passed
    on, and the configuration has to say so.
    """

    def __init__(self, tensors: Tensors, stock: Stock, target: str) -> None:
        self.stock, self.target, self.untied = stock, target, False
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, Tensor | Packed]]:
        stock = self.stock
        sources = set(stock.aliases.values())
        held: dict[str, Tensor | Packed] = {}
        seen: set[str] = set()
        for name, value in self._tensors:
            if name not in stock.shapes and any(p.search(name) for p in stock.ignored):
                continue
            self._check(name, value)
            seen.add(name)
            if name in sources or name in stock.aliases:
                held[name] = value
            if name not in stock.aliases:
                yield name, value
        absent = sorted(stock.shapes.keys() - seen - stock.aliases.keys())
        from_alias = {source: alias for alias, source in stock.aliases.items() if alias in held}
        for name in [n for n in absent if n in from_alias]:  # a tied weight may come by its other name alone
            absent.remove(name)
            held[name] = held[from_alias[name]]
            yield name, held[name]
        if absent:
            raise UserError(
                f"{self.target} needs the whole stock {stock.kind} architecture, and {len(absent)} of its "
                f"{len(stock.shapes)} weights are missing, first {absent[0]!r}: a removed part cannot be expressed"
            )
        pairs = [(alias, source) for alias, source in stock.aliases.items() if alias in held]
        self.untied = any(not self._same(source, held[source], alias, held[alias]) for alias, source in pairs)
        if self.untied:
            for alias, source in stock.aliases.items():
                yield alias, held.get(alias, held[source])

    def _check(self, name: str, value: Tensor | Packed) -> None:
        from trimtab.formats.packed import Packed

        stock = self.stock
        expected = stock.shapes.get(name)
        if expected is None:
            raise UserError(
                f"{self.target} cannot hold {name!r}: the stock {stock.kind} architecture has no such weight; "
                "export a plan without the step that added it"
            )
        flipped = isinstance(value, Packed) and site_of(name) in stock.conv1d
        shape = tuple(value.shape)
        if (shape[::-1] if flipped else shape) != expected:
            raise UserError(
                f"{site_of(name)} has shape {shape} and the configuration says {expected}: {self.target} cannot "
                "express a structural edit of single layers; export a plan without one"
            )
        if isinstance(value, Packed) and value.bias() is not None:
            raise UserError(
                f"{site_of(name)} is at level {value.level}, which stores a bias that {self.target} has no place for; "
                f"choose {str(value.level).removesuffix('/bias')}"
            )

    def _same(self, name: str, one: Tensor | Packed, other_name: str, other: Tensor | Packed) -> bool:
        import torch

        return one is other or torch.equal(
            self.stock.dense(name, one).float(), self.stock.dense(other_name, other).float()
        )


def site_of(name: str) -> str:
    """The module's path that a parameter's name stands for."""
    return name.removesuffix(".weight")


def to_dtype(name: str, tensor: Tensor, dtype: Any) -> Tensor:
    """A tensor in a floating-point type; whole numbers stay as they are.

    Raises:
        UserError: a value is too large for the type.
    """
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()) and bool(tensor.isfinite().all()):
        largest = float(tensor.abs().max())
        raise UserError(
            f"{name} holds {largest:.4g}, too large for {str(dtype).removeprefix('torch.')}; export in bf16 or fp32"
        )
    return cast


# ---- folders


@contextmanager
def fresh_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when all went well and vanishes when not.

    Raises:
        UserError: `out` exists and is not an empty folder, or cannot be made.
    """
    out = Path(out)
    with writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not an empty folder; name a new folder or remove this one")
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.parent / f".{out.name}.{secrets.token_hex(6)}.tmp"
        temporary.mkdir()
        try:
            yield temporary
            os.replace(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def copy_companions(source: str | os.PathLike[str] | None, folder: Path) -> None:
    """Copy tokenizer, generation settings and licence, where the source has them."""
    for name in _COMPANIONS if source is not None else ():
        file = Path(source or "") / name
        if file.is_file():
            write_bytes(folder / name, [file.read_bytes()])


def write_config(folder: Path, config: Mapping[str, Any], flow: Flow, changes: Mapping[str, Any]) -> None:
    """Write `config.json`: the original's, without what speaks of its own storage, and with the changes."""
    dropped = ("_name_or_path", "auto_map", "quantization_config", "torch_dtype", "dtype")
    content = {k: v for k, v in config.items() if k not in dropped} | dict(changes)
    if flow.untied:
        content["tie_word_embeddings"] = False
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True)
    write_bytes(folder / "config.json", [text.encode() + b"\n"])


def write_card(folder: Path, levels: Mapping[str, int], note: str) -> None:
    """Write the model card: what was done to which number of weights."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [trimtab]",
        "---",
        "",
        "# Compressed with Trimtab",
        "",
        note,
        "",
    ]
    if levels:
        lines += [
            "| level | weights at it |",
            "|---|---|",
            *(f"| `{level}` | {n} |" for level, n in sorted(levels.items())),
            "",
        ]
    lines += ["The licence of the original model applies.", ""]
    write_bytes(folder / "README.md", ["\n".join(lines).encode()])


def merge_card(report: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The model card of a merge: its parents with hashes, the method, and the recipe."""
    names = [parent["name"] for parent in report["parents"]]
    lines = ["---", "library_name: transformers", "tags: [merge, trimtab]", "base_model:"]
    lines += [*(f"- {json.dumps(name)}" for name in names), "---", "", "# Merged with Trimtab", ""]
    lines += [f"{len(names)} models, merged with `{report['method']}`, {report['tensors']} tensors.", ""]
    lines += ["| model | part | SHA-256 of the tensors that were read |", "|---|---|---|"]
    for parent in report["parents"]:
        lines.append(
            f"| `{parent['name']}` | {'base' if parent['base'] else 'parent'} | `{parent['tensors_sha256']}` |"
        )
    lines += ["", "The recipe:", "", "```json", json.dumps(recipe, indent=1, ensure_ascii=False), "```", ""]
    return "\n".join([*lines, "The licences of the merged models apply.", ""])


def summary(out: str | os.PathLike[str], counts: Mapping[str, int], notes: Iterable[str] = ()) -> dict[str, Any]:
    """What an exporter returns: files, their bytes, how many weights were written exactly or rounded, and notes."""
    out = Path(out)
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    return {
        "files": [str(f) for f in files],
        "bytes": sum(f.stat().st_size for f in files),
        "exact": counts["exact"],
        "requantised": counts["requantised"],
        "notes": list(notes),
    }
