"""Text to train on: JSON lines of chats, instructions or text, or plain text; windows with the prompts masked.

| line | trained on |
|---|---|
| `{"messages": [{"role": "user", "content": ...}, ...]}` | what the assistant says |
| `{"prompt": ..., "completion": ...}`; `instruction`, `input` and `output` or `response` | the completion |
| `{"text": ...}` | all of it |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.tasks.text import start_token, tokenize_bytes

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
HELD_OUT = 0.1  # share of the examples that is kept apart
PROMPTS, ANSWERS = ("prompt", "instruction", "question"), ("completion", "output", "response", "answer")


@dataclass(frozen=True)
class Example:
    """Pieces of text, in order, each trained on or only read."""

    pieces: tuple[tuple[str, bool], ...]

    def held_out(self) -> bool:
        """Whether it is among those kept apart: its content alone decides."""
        digest = hashlib.sha256(repr(self.pieces).encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


@dataclass(frozen=True)
class Windows:
    """Token windows of one length.

    Fields:
        tokens: int64 `[n, length]`, column 0 the start token.
        labels: the same, -100 where nothing is to be predicted.
        bytes: bytes of text that each covers.
        truncated: examples that were longer than a window and lost their end.
    """

    tokens: Tensor
    labels: Tensor
    bytes: Tensor
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.tokens)


def read_examples(path: Path, skip_bad: bool = False) -> tuple[list[Example], int]:
    """The examples of a `.jsonl` file, or a text file as one example; and how many lines were left out.

    Args:
        skip_bad: leave lines out that are no example; otherwise the first one is an error.

    Raises:
        UserError: the file is missing, empty, no UTF-8, or a line (named by its number) is no example.
    """
    if not path.is_file():
        raise UserError(f"there is no data file {path}; give JSON lines or a text file with --data")
    raw = path.read_bytes()
    if path.suffix not in (".jsonl", ".json"):
        from trimtab.tasks.build import read_text

        return [Example(((read_text(path), True),))], 0
    found, bad = [], []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_example(json.loads(line.decode("utf-8"))))
        except (ValueError, RecursionError) as error:  # what is no UTF-8, no JSON, or no example
            bad.append((number, str(error).splitlines()[0][:120]))
            if not skip_bad:
                raise UserError(
                    f"{path}, line {number}: {bad[0][1]}; correct it, or leave such lines out with --skip-bad"
                ) from error
    if not found:
        numbers = f": all {len(bad)} lines are bad, line {bad[0][0]} first ({bad[0][1]})" if bad else ""
        raise UserError(
            f"{path} holds no example{numbers}; give JSON lines with messages, prompt and completion, or text"
        )
    return found, len(bad)


def _example(row: Any) -> Example:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, and a {type(row).__name__} was found")
    if "messages" in row:
        return _chat(row["messages"])
    prompt, answer = (next((k for k in keys if k in row), None) for keys in (PROMPTS, ANSWERS))
    if prompt and answer:
        read = [row[prompt], *([row["input"]] if row.get("input") else [])]
        if not all(isinstance(t, str) for t in (*read, row[answer])) or not row[answer]:
            raise ValueError(f"`{prompt}` and `{answer}` must be texts, the latter not empty")
        joined = "\n".join(read)
        gap = "" if prompt == "prompt" else "\n\n"
        return Example(((joined + gap, False), (row[answer], True)))
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"]:
            raise ValueError("`text` must be a text that is not empty")
        return Example(((row["text"], True),))
    raise ValueError(f"neither messages, nor a prompt with its completion, nor text, but {', '.join(row) or 'nothing'}")


def _chat(messages: Any) -> Example:
    sound = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not sound or not any(m["role"] == "assistant" for m in messages):
        raise ValueError("`messages` must be a list of {role, content}, the assistant's among them")
    pieces = []
    for m in messages:
        pieces += [(f"<|{m['role']}|>\n", False), (f"{m['content']}\n", m["role"] == "assistant")]
    return Example(tuple(pieces))


def split_examples(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and those kept apart; of one text alone the last tenth is."""
    if len(examples) == 1 and len(examples[0].pieces) == 1:
        text = examples[0].pieces[0][0]
        cut = len(text) - max(1, int(HELD_OUT * len(text)))
        return [Example(((text[:cut], True),))], [Example(((text[cut:], True),))]
    apart = [e for e in examples if e.held_out()]
    apart = apart or list(examples[-1:])
    return [e for e in examples if e not in apart] or list(examples), apart


def windows(examples: Iterable[Example], tokenizer: Any, length: int, pack: bool = True) -> Windows:
    """Examples as windows of `length` tokens.

    Args:
        pack: examples follow one another in a window, with the end token between them; otherwise each has a window of
            its own, filled up with tokens that nothing is predicted from. Plain text is cut, not truncated.

    Raises:
        UserError: the tokenizer has no start token, or there is nothing to predict.
    """
    import torch

    start, end = start_token(tokenizer), tokenizer.eos_token_id
    rows: list[tuple[list[int], list[int], int]] = []
    ids: list[int] = []
    labels: list[int] = []
    size = truncated = 0
    room = length - 1

    def close() -> None:
        nonlocal ids, labels, size
        if any(label != IGNORED for label in labels):
            rows.append((ids, labels, size))
        ids, labels, size = [], [], 0

    for example in examples:
        tokens, wanted, sizes = _tokens(example, tokenizer, end)
        if len(example.pieces) == 1:  # plain text: a stream
            while tokens:
                take = room - len(ids)
                ids, labels, size = ids + tokens[:take], labels + wanted[:take], size + sum(sizes[:take])
                tokens, wanted, sizes = tokens[take:], wanted[take:], sizes[take:]
                if len(ids) == room:
                    close()
            continue
        if len(tokens) > room:
            truncated += 1
            tokens, wanted, sizes = tokens[:room], wanted[:room], sizes[:room]
        if not pack or len(ids) + len(tokens) > room:
            close()
        ids, labels, size = ids + tokens, labels + wanted, size + sum(sizes)
    close()
    if not rows:
        raise UserError(
            f"the data hold nothing to predict in windows of {length} tokens: prompts fill them; raise --length"
        )
    fill = end if end is not None else start
    t = torch.full((len(rows), length), fill)
    y = torch.full((len(rows), length), IGNORED)
    t[:, 0] = start
    for i, (a, b, _) in enumerate(rows):
        t[i, 1 : len(a) + 1], y[i, 1 : len(b) + 1] = torch.tensor(a), torch.tensor(b)
    return Windows(t, y, torch.tensor([size for *_, size in rows]), truncated)


def _tokens(example: Example, tokenizer: Any, end: int | None) -> tuple[list[int], list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    sizes: list[int] = []
    for i, (text, trained) in enumerate(example.pieces):
        new, covered = tokenize_bytes(tokenizer, text)
        if end is not None and i < len(example.pieces) - 1:  # one end token, behind the last piece
            new, covered = new[:-1], covered[:-1]
        ids, sizes = ids + new, sizes + covered
        labels += new if trained else [IGNORED] * len(new)
    return ids, labels, sizes
