"""Text and tokens without torch: the tokenizer's file, the bytes of each token, and text that grows token by token."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError

SAMPLE = "Ab “c” é 日本 🙂\n\td1"


class Vocabulary:
    """What a model's tokenizer.json says: text to tokens, and each token's bytes."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            said = json.loads(path.read_text("utf-8"))
            self._tokenizer = Tokenizer.from_str(path.read_text("utf-8"))
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"no tokenizer can be read from {path}: {error}; serve needs the model's own") from None
        kinds = set(_kinds(said.get("decoder")))
        self._added = {row["id"]: row["content"].encode() for row in said.get("added_tokens", ())}
        self.special = frozenset(row["id"] for row in said.get("added_tokens", ()) if row.get("special"))
        self._letters = _byte_letters() if "ByteLevel" in kinds else None
        self._bytes: dict[int, bytes] = {}
        tokens = self.encode(SAMPLE, special=False)
        whole = self._tokenizer.decode(tokens, skip_special_tokens=False)
        if (mine := self.text(tokens, special=True)).lstrip() != whole.lstrip():
            raise UserError(
                f"the tokenizer in {path} joins tokens in a way that serve does not know (decoder {sorted(kinds)}): "
                f"{mine!r} where it says {whole!r}; byte-level and sentencepiece tokenizers are known"
            )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around one if `special`."""
        return list(self._tokenizer.encode_batch([text], add_special_tokens=special)[0].ids)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text."""
        if (found := self._bytes.get(token)) is None:
            found = self._bytes[token] = self._read(token)
        return found

    def text(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """Text of tokens; special ones are left out unless asked for."""
        parts = (self.bytes_of(token) for token in tokens if special or token not in self.special)
        return b"".join(parts).decode("utf-8", "replace")

    def name(self, token: int) -> str:
        """How a token is written on its own: its text, or its bytes where they are no whole characters."""
        try:
            return (raw := self.bytes_of(token)).decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _read(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        if (piece := self._tokenizer.id_to_token(token)) is None:
            return b""
        if self._letters is not None:
            return b"".join(self._letters.get(letter, letter.encode()) for letter in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("▁", " ").encode()


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    """Kinds of a decoder, those of a sequence one by one."""
    if decoder:
        yield decoder["type"]
        for inner in decoder.get("decoders", ()):
            yield from _kinds(inner)


def _byte_letters() -> dict[str, bytes]:
    """GPT-2's alphabet: a printable letter for each byte; those that print stand for themselves.

    >>> _byte_letters()["Ġ"], _byte_letters()["a"]
    (b' ', b'a')
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = {chr(byte): bytes([byte]) for byte in plain}
    rest = (byte for byte in range(256) if byte not in plain)
    return letters | {chr(256 + place): bytes([byte]) for place, byte in enumerate(rest)}


class Writer:
    """The text of one choice as its tokens come: whole characters only, and nothing of a string that ends it.

    >>> writer = Writer(("END",))
    >>> [writer.add(part) for part in (b"a E", b"N", b"X \\xf0\\x9f", b"\\x99\\x82", b"EN", b"D b")], writer.stopped
    (['a ', '', 'ENX ', '🙂', '', ''], True)
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.written = 0  # characters given so far
        self.stopped = False

    @property
    def reached(self) -> int:
        """Characters so far, those held back too."""
        return self.written + len(self._held)

    def add(self, raw: bytes, *, last: bool = False) -> str:
        """What may be shown now; all that is left if these bytes are the last, but for half a character."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(raw)
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if last else max((_begun(self._held, stop) for stop in self._stops), default=0)
            cut = len(self._held) - keep
            shown, self._held = self._held[:cut], self._held[cut:]
        self.written += len(shown)
        return shown


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop string may have begun.

    >>> _begun("so EN", "END"), _begun("so", "END")
    (2, 0)
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
