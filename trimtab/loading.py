"""Load a model or an artifact to run it here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Loaded:
    """A model ready to run.

    Fields:
        model: the module, in eval mode, fp32.
        tokenizer: its tokenizer, or None.
        task: what it is for.
        name: where it came from.
        notes: sentences on what loading could not keep as it was.
    """

    model: nn.Module
    tokenizer: Any
    task: str
    name: str
    notes: tuple[str, ...] = ()

    def stream(self, prompt: str, tokens: int = 64, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """Text that goes on from the prompt, piece by piece.

        Raises:
            UserError: the model writes no text, or the prompt is empty or too long.
        """
        import torch

        from trimtab.engine.run import generate

        if self.task != "causal-lm" or self.tokenizer is None:
            raise UserError(f"{self.name} is for {self.task}; only a causal language model writes text")
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        ids = ([start] if start is not None else []) + ids
        limit = getattr(self.model.config, "max_position_embeddings", None) or len(ids) + tokens
        if not ids:
            raise UserError(
                "the prompt is empty, and the tokenizer has no start token; give at least one word with --prompt"
            )
        if len(ids) + 1 > limit:
            raise UserError(f"the prompt has {len(ids)} tokens, and the model's context is {limit}; shorten the prompt")
        stop = frozenset({self.tokenizer.eos_token_id} - {None})
        new: list[int] = []
        said = ""
        for token in generate(
            self.model,
            torch.tensor([ids]),
            min(tokens, limit - len(ids)),
            stop=stop,
            temperature=temperature,
            seed=seed,
        ):
            new.append(token)
            text = self.tokenizer.decode(new)
            if not text.endswith("\ufffd"):
                yield text[len(said) :]
                said = text

    def generate(self, prompt: str, tokens: int = 64, *, temperature: float = 0.0, seed: int = 0) -> str:
        """The text that goes on from the prompt."""
        return "".join(self.stream(prompt, tokens, temperature=temperature, seed=seed))


def load(path: str | Path, *, model: str | None = None, packed: bool = False) -> Loaded:
    """An artifact of `fit`, a model that others quantised, or any model that `fit` takes, ready to run.

    Args:
        path: an artifact's folder, a GGUF file, a folder quantised by GPTQ, AWQ or compressed-tensors, or the name of a
            model.
        model: for an artifact of a Python function's model: that function, `module:function`.
        packed: keep packed linears packed in memory and unpack them for each use: least memory, and slower.

    Raises:
        UserError: there is nothing of that name, or it is damaged.
    """
    from trimtab.models.artifact import build, is_artifact, open_artifact
    from trimtab.models.quantised import is_quantised, open_quantised
    from trimtab.models.source import open_source

    if not is_artifact(path):
        if (Path(path) / "report.json").is_file() and is_artifact(Path(path) / "artifact"):
            return load(Path(path) / "artifact", model=model, packed=packed)
        if is_quantised(path):
            opened = open_quantised(path)
            module = build(opened.contents, opened.skeleton, packed=packed)
            task = opened.contents.manifest["task"]
            return Loaded(module, opened.tokenizer(), task, str(path), tuple(opened.notes))
        source = open_source(str(path))
        tokenizer = source.tokenizer() if source.task != "classification" and source.folder else None
        return Loaded(source.materialise(), tokenizer, source.task, source.name)
    contents = open_artifact(path)
    module = build(contents, open_source(model).skeleton if model else None, packed=packed)
    tokenizer = None
    if (contents.folder / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(contents.folder, local_files_only=True, trust_remote_code=False)
    return Loaded(module, tokenizer, contents.manifest["task"], str(path))


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
