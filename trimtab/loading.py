"""Load a model or an artifact to run it here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from trimtab.engine.session import Runtime, Timing, Writer
    from trimtab.formats.packed import Packed
    from trimtab.models.artifact import Contents


@dataclass
class Loaded:
    """A model ready to run.

    Fields:
        model: the module, in eval mode, fp32.
        tokenizer: its tokenizer, or None.
        task: what it is for.
        name: where it came from.
        packed: parameter name -> reader of the packed weight, for those that it stores packed.
        share: to write text, the module's weights give way to those of the kernels, so that they are in memory once.
        context: tokens that a text may have; None: as many as the model can.
        cache: how keys and values are stored, see `formats.cache`.
        timing: how long the last text took.
        notes: sentences on what loading could not keep as it was.
    """

    model: nn.Module
    tokenizer: Any
    task: str
    name: str
    packed: Mapping[str, Callable[[], Packed]] = field(default_factory=dict)
    share: bool = False
    context: int | None = None
    cache: str = "fp16"
    timing: Timing | None = None
    _runtime: Runtime | None = None
    _writer: Writer | None = None
    notes: tuple[str, ...] = ()

    def stream(self, prompt: str, tokens: int = 64, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Text that goes on from the prompt, piece by piece.

        Raises:
            UserError: the model writes no text, or the prompt is empty or too long.
        """
        from trimtab.engine.session import Timing, generate

        ids = self._prompt(prompt)
        limit = min(self._limit(len(ids) + tokens), len(ids) + tokens)
        stop = frozenset({self.tokenizer.eos_token_id} - {None})
        new: list[int] = []
        shown = known = 0  # tokens whose text is out; the last are decoded again, for a word to know its neighbour
        self.timing = Timing()
        for token in generate(
            self.writer(limit), ids, limit - len(ids), stop=stop, temperature=temperature, seed=seed, timing=self.timing
        ):
            new.append(token)
            said, text = self.tokenizer.decode(new[shown:known]), self.tokenizer.decode(new[shown:])
            if not text.endswith("\ufffd"):
                yield text[len(said) :]
                shown, known = known, len(new)

    def generate(self, prompt: str, tokens: int = 64, *, temperature: float = 0.0, seed: int = 0) -> str:
        """The text that goes on from the prompt."""
        return "".join(self.stream(prompt, tokens, temperature=temperature, seed=seed))

    def writer(self, context: int) -> Writer:
        """What writes text of up to so many tokens; made when it is first asked for, and again for a longer text."""
        from trimtab.engine.session import Runtime

        if self._runtime is None:
            self._runtime = Runtime(self.model, self.packed, self.share)
        if self._writer is None or self._writer.context < context:
            whole = self._limit(context)
            self._writer = None  # its cache makes room for the longer one
            room = self.context or min(whole, -(-context // 256) * 256)
            self._writer = self._runtime.open(room, cache=self.cache)
        return self._writer

    @property
    def engine(self) -> str:
        """What wrote the last text: the kernels and their threads, or torch and its."""
        import torch

        return self._runtime.engine if self._runtime is not None else f"torch, {torch.get_num_threads()} threads"

    def _limit(self, asked: int) -> int:
        """Tokens that a text may have; where neither model nor user set a limit, as many as asked for."""
        own = getattr(self.model.config, "max_position_embeddings", None) or asked
        return min(own, self.context or own)

    def _prompt(self, prompt: str) -> list[int]:
        if self.task != "causal-lm" or self.tokenizer is None:
            raise UserError(f"{self.name} is for {self.task}; only a causal language model writes text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt is no UTF-8 at character {error.start + 1}; give it as UTF-8 text") from error
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        ids = ([start] if start is not None else []) + ids
        if not ids:
            raise UserError(
                "the prompt is empty, and the tokenizer has no start token; give at least one word with --prompt"
            )
        limit = self._limit(len(ids) + 1)
        if len(ids) + 1 > limit:
            raise UserError(f"the prompt has {len(ids)} tokens, and the model's context is {limit}; shorten the prompt")
        return ids


def load(
    path: str | Path, *, model: str | None = None, packed: bool = False, kernels: bool = True, cache: str = "fp16"
) -> Loaded:
    """An artifact of `fit`, a model that others quantised, or any model that `fit` takes, ready to run.

    Args:
        path: an artifact's folder, a GGUF file, a folder quantised by GPTQ, AWQ or compressed-tensors, or the name of a
            model.
        model: for an artifact of a Python function's model: that function, `module:function`.
        packed: keep packed linears packed in memory, and share what the kernels hold: least memory.
        kernels: of a model that writes no text, run sparse linears and convolutions on the compiled kernels where those
            are at least as fast, in fp32 as torch does; False: all on torch, which is what `fit` measured.
        cache: to write text, how keys and values are stored: `fp16`, `bf16`, `fp32`, or packed by KIVI as `kivi4` or
            `kivi2`, with a fraction of the bytes.

    Raises:
        UserError: there is nothing of that name, it is damaged, or there is no such cache.
    """
    from trimtab.formats.cache import CacheFormat

    CacheFormat.parse(cache)
    loaded = _load(path, model, packed, kernels)
    loaded.cache = cache
    return loaded


def _load(path: str | Path, model: str | None, packed: bool, kernels: bool) -> Loaded:
    from trimtab.models.artifact import build, is_artifact, open_artifact, use_kernels
    from trimtab.models.quantised import is_quantised, open_quantised
    from trimtab.models.source import open_source

    if not is_artifact(path):
        if (Path(path) / "report.json").is_file() and is_artifact(Path(path) / "artifact"):
            return _load(Path(path) / "artifact", model, packed, kernels)
        if is_quantised(path):
            opened = open_quantised(path)
            module = build(opened.contents, opened.skeleton, packed=packed)
            task = opened.contents.manifest["task"]
            loaded = Loaded(module, opened.tokenizer(), task, str(path), opened.contents.packed, packed)
            loaded.notes = tuple(opened.notes)
            return loaded
        source = open_source(str(path))
        tokenizer = source.tokenizer() if source.task != "classification" and source.folder else None
        return Loaded(source.materialise(), tokenizer, source.task, source.name)
    contents = open_artifact(path)
    _check_memory(contents, packed)
    module = build(contents, open_source(model).skeleton if model else None, packed=packed)
    if kernels and contents.manifest["task"] != "causal-lm":
        use_kernels(module, contents)
    tokenizer = None
    if (contents.folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(contents.folder, local_files_only=True, trust_remote_code=False)
    return Loaded(module, tokenizer, contents.manifest["task"], str(path), packed=contents.packed, share=packed)


def _check_memory(contents: Contents, packed: bool) -> None:
    from trimtab.engine.session import free_bytes, said_bytes
    from trimtab.models.artifact import folder_bytes

    needed, free = folder_bytes(contents.folder), free_bytes()
    if not packed:
        needed += sum(4 * prod(row["shape"]) for row in contents.manifest["packed"].values())
    if free is not None and needed > free:
        cure = "free some, or fit the model to fewer" if packed else "load it with packed=True, or `run --packed`"
        raise UserError(f"{contents.folder} needs {said_bytes(needed)}, and {said_bytes(free)} are free; {cure}")


def read_report(run: str | Path) -> dict[str, Any]:
    """The evidence of a finished run.

    Raises:
        UserError: the folder holds no finished run.
    """
    path = Path(run) / "report.json"
    if not path.is_file():
        unfinished = (Path(run) / "journal.jsonl").is_file()
        cure = (
            "an unfinished run; go on with `trimtab fit ... --resume`"
            if unfinished
            else "no run; `trimtab fit` makes one"
        )
        raise UserError(f"{run} holds {cure}")
    try:
        report = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; `trimtab fit ... --resume` writes it again") from error
    if not isinstance(report, dict) or not {"best", "original", "front", "plan", "sites"} <= set(report):
        raise UserError(f"{path} is no report of a fit; `trimtab fit ... --resume` writes it again")
    return report
