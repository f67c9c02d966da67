"""From tokens to OpenAI's answers: choices that grow piece by piece, and the shapes that they are told in."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from trimtab.server.link import Event, Job
from trimtab.server.text import Vocabulary, Writer

LEAST = -9999.0  # a log-probability below cannot be told in JSON


@dataclass(frozen=True)
class Entry:
    """A token, what it was given, and what else there was: pairs of token and log-probability."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]] | None
    offset: int


@dataclass
class Piece:
    """What is new of a choice."""

    choice: int
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    reason: str | None = None


class Choice:
    """One text in the making.

    Args:
        place: its index in the answer.
        vocabulary: of the model.
        prompt: its tokens.
        stops: strings that end it.
        ends: tokens that end it.
        echo: the prompt as text, if that is to come first.
    """

    def __init__(
        self,
        place: int,
        vocabulary: Vocabulary,
        prompt: list[int],
        stops: tuple[str, ...],
        ends: frozenset[int],
        echo: str | None = None,
    ) -> None:
        self.place, self.prompt, self.tokens = place, prompt, 0
        self._vocabulary, self._ends, self._echo = vocabulary, ends, echo
        self._writer = Writer(stops)
        self._before = 0  # characters of the echo
        self._waiting: list[Entry] = []
        self.reason: str | None = None

    def take(self, event: Event) -> Piece | None:
        """What an event makes known; None if that is nothing yet."""
        piece = Piece(self.place)
        if self._echo is not None:
            piece.text, self._before, self._echo = self._echo, len(self._echo), None
        if event.kind == "prompt":
            piece.entries = self._of_prompt(event)
        elif event.kind == "token" and self.reason is None:
            self._grow(event, piece)
        elif event.kind == "end" and self.reason is None:
            piece.text += self._writer.add(b"", last=True)
            self._flush(piece, all_of_them=True)
            piece.reason = self.reason = "stop" if self._writer.stopped else event.reason
        return piece if piece.text or piece.entries or piece.reason else None

    def _grow(self, event: Event, piece: Piece) -> None:
        self.tokens += 1
        ends = event.token in self._ends
        if event.logprob is not None and not ends:
            offset = self._before + self._writer.reached
            self._waiting.append(Entry(event.token, _least(event.logprob), _pairs(event.top), offset))
        hidden = ends or event.token in self._vocabulary.special
        piece.text += self._writer.add(b"" if hidden else self._vocabulary.bytes_of(event.token))
        self._flush(piece, all_of_them=False)
        if self._writer.stopped:
            piece.reason = self.reason = "stop"

    def _flush(self, piece: Piece, *, all_of_them: bool) -> None:
        """Entries go out with their text; those of text that a stop string took away never do."""
        shown = self._before + self._writer.written
        out = [entry for entry in self._waiting if entry.offset < shown or (all_of_them and not self._writer.stopped)]
        piece.entries += out
        self._waiting = [] if self._writer.stopped else self._waiting[len(out) :]

    def _of_prompt(self, event: Event) -> list[Entry]:
        writer, entries = Writer(), []
        tops = event.top or [None] * len(self.prompt)
        for token, logprob, top in zip(self.prompt, event.logprob, tops, strict=True):
            entries.append(Entry(token, None if logprob is None else _least(logprob), _pairs(top), writer.reached))
            writer.add(b"" if token in self._vocabulary.special else self._vocabulary.bytes_of(token))
        return entries


def _least(value: float) -> float:
    return value if value > LEAST else LEAST


def _pairs(top: list[list[Any]] | None) -> list[tuple[int, float]] | None:
    return None if top is None else [(int(token), _least(value)) for token, value in top]


async def pieces(events: AsyncIterator[Event], job: Job, choices: list[Choice]) -> AsyncIterator[Piece]:
    """What becomes known of all choices; the engine stops with one when its stop string was found."""
    async for event in events:
        if (piece := choices[event.choice].take(event)) is not None:
            if piece.reason == "stop" and event.kind != "end":
                job.cancel(event.choice)
            yield piece


class Shape:
    """How an answer is told.

    Args:
        vocabulary: of the model.
        model: the name that was asked for.
        chat: a chat's shapes, and not a completion's.
        alternatives: other tokens to tell beside each one; None: no log-probabilities.
    """

    def __init__(self, vocabulary: Vocabulary, model: str, *, chat: bool, alternatives: int | None) -> None:
        self._vocabulary, self._chat, self._alternatives = vocabulary, chat, alternatives
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, merged: list[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one."""
        kind = "chat.completion" if self._chat else "text_completion"
        told = []
        for piece in merged:
            said: dict[str, Any] = {"text": piece.text}
            if self._chat:
                said = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
            told.append(self._choice(piece, said))
        return self._head | {"object": kind, "choices": told, "usage": usage}

    def opening(self, choice: int) -> dict[str, Any]:
        """A chat's first piece of each choice."""
        return self._choice(Piece(choice), {"delta": {"role": "assistant", "content": ""}})

    def part(self, piece: Piece) -> dict[str, Any]:
        """A piece of a choice."""
        said: dict[str, Any] = {"text": piece.text}
        if self._chat:
            said = {"delta": {"content": piece.text} if piece.text or piece.entries else {}}
        return self._choice(piece, said)

    def chunk(self, told: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An event of a stream."""
        return (
            self._head
            | {"object": "chat.completion.chunk" if self._chat else "text_completion"}
            | {
                "choices": told,
                **more,
            }
        )

    def _choice(self, piece: Piece, said: dict[str, Any]) -> dict[str, Any]:
        told = None if self._alternatives is None else self._told(piece.entries)
        return {"index": piece.choice, **said, "logprobs": told, "finish_reason": piece.reason}

    def _told(self, entries: list[Entry]) -> dict[str, Any] | None:
        if self._chat:
            return {"content": [self._chat_entry(entry) for entry in entries], "refusal": None} if entries else None
        name = self._vocabulary.name
        return {
            "tokens": [name(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }

    def _top(self, entry: Entry) -> dict[str, float] | None:
        """By name; the token itself is always among them, and of two with one name the likelier is told."""
        if entry.logprob is None:
            return None
        told: dict[str, float] = {}
        for token, logprob in (*(entry.top or ()), (entry.token, entry.logprob)):
            told.setdefault(self._vocabulary.name(token), logprob)
        return told

    def _chat_entry(self, entry: Entry) -> dict[str, Any]:
        top = (entry.top or [])[: self._alternatives]
        return self._one(entry.token, entry.logprob) | {"top_logprobs": [self._one(*pair) for pair in top]}

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = self._vocabulary.bytes_of(token)
        return {"token": self._vocabulary.name(token), "logprob": logprob, "bytes": list(raw)}


def merged(parts: list[Piece], choices: int) -> list[Piece]:
    """All pieces of each choice as one."""
    whole = [Piece(choice) for choice in range(choices)]
    for part in parts:
        one = whole[part.choice]
        one.text += part.text
        one.entries += part.entries
        one.reason = part.reason or one.reason
    return whole
