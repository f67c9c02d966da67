"""Vocabularies of several models united: every token that any of them has, and where its row is in each."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.formats.checkpoint import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER = "tokenizer.json"
OTHERS = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "added_tokens.json")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    Fields:
        content: of its `tokenizer.json`.
        rows: of its embedding, which may be more than there are tokens.
    """

    content: dict[str, Any]
    rows: int

    @property
    def added(self) -> dict[str, dict[str, Any]]:
        """Tokens that are matched before all others, with their entries."""
        return {entry["content"]: entry for entry in self.content.get("added_tokens") or ()}

    @property
    def tokens(self) -> dict[str, int]:
        """Place of each token."""
        own = self.content["model"]["vocab"]
        found = dict(own) if isinstance(own, dict) else {token: i for i, (token, _) in enumerate(own)}
        return found | {token: entry["id"] for token, entry in self.added.items()}


def read_vocabulary(folder: Path, rows: int | None) -> Vocabulary:
    """The vocabulary of a model's folder.

    Raises:
        UserError: it has no `tokenizer.json`, a damaged one, or no number of rows.
    """
    path = folder / TOKENIZER
    try:
        found = Vocabulary(json.loads(path.read_text("utf-8")), rows or 0)
        most = max(found.tokens.values(), default=-1)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {TOKENIZER}, without which vocabularies cannot be united") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or of a kind that is unknown here: {error!r:.100}") from None
    if most >= found.rows:
        raise UserError(f"{path} has a token {most}, and the model's embedding {found.rows} rows; they are no pair")
    return found


@dataclass(frozen=True)
class Union:
    """The tokens of several models together; the first one's stay where they are, others follow behind.

    Fields:
        tokens: those that are new, by place.
        rows: of the united embedding.
        sources: for each model the row of every place, -1 where it has none.
    """

    tokens: dict[str, int]
    rows: int
    sources: tuple[tuple[int, ...], ...]


def united(vocabularies: Sequence[Vocabulary]) -> Union:
    """The union, the first model leading.

    >>> one, two = ({"model": {"vocab": v}} for v in ({"a": 0, "b": 1}, {"b": 0, "c": 1}))
    >>> united([Vocabulary(one, 2), Vocabulary(two, 2)])
    Union(tokens={'c': 2}, rows=3, sources=((0, 1, -1), (-1, 0, 1)))
    """
    lead, new = vocabularies[0], dict[str, int]()
    have = [v.tokens for v in vocabularies]
    first = max(have[0].values(), default=-1) + 1
    for tokens in have[1:]:
        for token in sorted(tokens, key=tokens.__getitem__):
            if token not in have[0] and token not in new:
                new[token] = first + len(new)
    rows, texts = max(lead.rows, first + len(new)), {place: token for token, place in (have[0] | new).items()}
    sources = [[tokens.get(texts.get(place, ""), -1) for place in range(rows)] for tokens in have]
    spare = range(first + len(new), lead.rows)
    sources[0][first + len(new) : lead.rows] = spare
    return Union(new, rows, tuple(map(tuple, sources)))


def spread(weights: Sequence[Tensor], union: Union) -> list[Tensor]:
    """Every model's rows at the places of the union, fp32; a token that a model lacks has the first one's row, or the
    mean of those that have it.
    """
    import torch

    places = torch.tensor(union.sources)
    laid = [w.float()[p.clamp_min(0)] for w, p in zip(weights, places, strict=True)]
    there = (places >= 0).float()
    mean = sum(part * t[:, None] for part, t in zip(laid, there, strict=True)) / there.sum(0)[:, None]
    stand_in = torch.where(there[0][:, None] > 0, laid[0], mean)
    return [torch.where(t[:, None] > 0, part, stand_in) for part, t in zip(laid, there, strict=True)]


def write_union(vocabularies: Sequence[Vocabulary], union: Union, folder: Path) -> None:
    """The first model's `tokenizer.json` with the new tokens; forms of it that would say otherwise are left out.

    Raises:
        UserError: its kind of tokenizer does not take them at their places.
    """
    from tokenizers import Tokenizer

    content = copy.deepcopy(vocabularies[0].content)
    own = content["model"]["vocab"]
    for token, place in union.tokens.items():
        origin = next(v for v in vocabularies if token in v.tokens)
        if token in origin.added:
            content.setdefault("added_tokens", []).append({**origin.added[token], "id": place})
        if isinstance(own, dict):
            own[token] = place
        elif token not in origin.added:
            own.append(origin.content["model"]["vocab"][origin.tokens[token]])
    text = json.dumps(content, ensure_ascii=False)
    known = Tokenizer.from_str(text)
    for token, place in (vocabularies[0].tokens | union.tokens).items():
        if known.token_to_id(token) != place:
            raise UserError(
                f"the first model's tokenizer would have {token!r} at {known.token_to_id(token)}, and its row is "
                f"{place}; merge with --vocabulary force"
            )
    for name in OTHERS:
        (folder / name).unlink(missing_ok=True)
    write_bytes(folder / TOKENIZER, [text.encode()])
