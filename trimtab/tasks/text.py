"""Text for the causal-language-model task: the Python standard library found on this machine, split by module.

`train` calibrates and trains, `search` steers a search, `test` gives the verdict. The split hashes a module's path,
never its content, so one module lies on the same side in every Python version.
"""

from __future__ import annotations

import functools
import hashlib
import io
import sysconfig
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "search", "test")

# Installed packages are not the library; the others hold generated tables or input data rather than written code.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"})
SKIPPED_PREFIXES = ("lib2to3/tests/data/", "test/encoded_modules/", "test/tokenizedata/", "config-", "lib-dynload/")
# Written on the machine, by its build or by its owner.
SKIPPED_NAMES = ("_sysconfigdata", "sitecustomize", "usercustomize")
SMALLEST = 256
"""Modules below this many bytes (empty `__init__.py` and the like) carry no text worth modelling."""


@dataclass(frozen=True)
class Document:
    """One module: its path below the standard library, with forward slashes, and its source text."""

    path: str
    text: str

    @property
    def bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Blocks:
    """Token blocks of one length and the bytes of text that each predicts.

    Args:
        tokens: int64 [n, length]; column 0 is the start token, which is given and never predicted.
        bytes: int64 [n], UTF-8 bytes covered by columns 1 to length-1 of each row.
    """

    tokens: Tensor
    bytes: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def split_of(path: str) -> str:
    """Name the split of a module: SHA-256 of its path modulo 100 is `train` below 94, `search` below 97, else `test`.

    >>> split_of("json/decoder.py"), split_of("ast.py"), split_of("inspect.py")
    ('train', 'search', 'test')
    """
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 94 else "search" if bucket < 97 else "test"


def stdlib_documents(split: str, root: Path | None = None) -> tuple[Document, ...]:
    """Read the modules of one split, in the order of their paths.

    Args:
        split: `train`, `search` or `test`.
        root: the library's folder; by default that of the running Python.

    Raises:
        UserError: the split is unknown, or the library has no readable source in it.
    """
    if split not in SPLITS:
        raise UserError(f"No split is called {split!r}. Choose one of: {', '.join(SPLITS)}.")
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents = tuple(d for d in _library(root) if split_of(d.path) == split)
    if not documents:
        raise UserError(
            f"The Python library at {root} has no source files for the {split!r} split. Use a Python that "
            "is installed with its .py files, or give your own text."
        )
    return documents


def stdlib_text(split: str, root: Path | None = None) -> str:
    """Return the modules of one split as one string, end to end."""
    return "".join(document.text for document in stdlib_documents(split, root))


def token_blocks(
    tokenizer: Any, documents: Iterable[Document | str], length: int, *, limit: int | None = None
) -> Blocks:
    """Cut documents into blocks of `length` tokens, each opened by the start token, and count the bytes of each.

    Documents follow one another with the tokenizer's end token (0 bytes) after each, where it has one. Each block is
    scored on its own, so `model(input_ids=tokens, labels=tokens).loss` is the mean over exactly the tokens counted.
    A last block that is not full is dropped.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        documents: texts, in order.
        length: tokens a block, the start token included.
        limit: at most so many blocks, from the first; None for all.

    Raises:
        UserError: the tokenizer has no start token or no offsets, or the text does not fill one block.
    """
    import torch

    start = start_token(tokenizer)
    tokens: list[int] = []
    sizes: list[int] = []
    wanted = None if limit is None else limit * (length - 1)
    for document in documents:
        ids, covered = tokenize_bytes(tokenizer, document if isinstance(document, str) else document.text)
        tokens += ids
        sizes += covered
        if wanted is not None and len(tokens) >= wanted:
            break
    n = len(tokens) // (length - 1)
    n = n if limit is None else min(n, limit)
    if n == 0:
        raise UserError(
            f"The text holds {len(tokens)} tokens, less than one block of {length}. Give more text or a shorter block."
        )
    body = torch.tensor(tokens[: n * (length - 1)]).view(n, length - 1)
    counts = torch.tensor(sizes[: n * (length - 1)]).view(n, length - 1).sum(1)
    return Blocks(torch.cat([torch.full((n, 1), start), body], 1), counts)


def tokenize_bytes(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Tokenise one document and give each token the UTF-8 bytes that it adds; the bytes sum to the document's.

    The end token, where the tokenizer has one, is appended with 0 bytes. A character spread over several tokens is
    counted with its first.

    Raises:
        UserError: the tokenizer cannot say which characters a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} does not tell which characters a token covers, so bits per byte "
            "cannot be counted. Load the model's fast tokenizer."
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoding["input_ids"])
    ends = [end for _, end in encoding["offset_mapping"]]
    if ends:
        ends[-1] = len(text)
    byte_at: Sequence[int] = range(len(text) + 1)
    if not text.isascii():
        byte_at = [0, *accumulate(len(character.encode()) for character in text)]
    sizes: list[int] = []
    reached = 0
    for end in ends:
        sizes.append(max(0, byte_at[end] - reached))
        reached = max(reached, byte_at[end])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        sizes.append(0)
    return ids, sizes


def start_token(tokenizer: Any) -> int:
    """Return the token that opens a block: the tokenizer's start token or, where it has none, its end token."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "The tokenizer has neither a start nor an end token, so a block has nothing to begin with. "
        "Set tokenizer.bos_token."
    )


@functools.cache
def _library(root: Path) -> tuple[Document, ...]:
    documents: list[Document] = []
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS.intersection(relative.parts) or name.startswith(SKIPPED_PREFIXES + SKIPPED_NAMES):
            continue
        text = _source(path)
        # A copy under a second path could put the same text on both sides of the split.
        digest = hashlib.sha256((text or "").encode()).digest()
        if text is None or len(text.encode()) < SMALLEST or digest in seen:
            continue
        seen.add(digest)
        documents.append(Document(name, text))
    return tuple(documents)


def _source(path: Path) -> str | None:
    """Read a module that is, and says that it is, UTF-8; None for any other."""
    try:
        raw = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode() if encoding in ("utf-8", "ascii") else None
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None
