"""Vocabularies united: every token keeps its meaning, and the tokenizer knows all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge import WIDE, save, weights
from tokenizers import Tokenizer
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.formats.checkpoint import Checkpoint
from trimtab.formats.vocabulary import read_vocabulary, united
from trimtab.merging import merge

TALL = ("model.embed_tokens.weight", "lm_head.weight")
ONE, TWO = {"a": 0, "b": 1, "c": 2, "[UNK]": 3}, {"[UNK]": 0, "c": 1, "d": 2, "a": 3, "<|tool|>": 4}


def model(folder: Path, tokens: dict[str, int], seed: int, rows: int, added: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """A checkpoint with a tokenizer of whole words; its embeddings have so many rows."""
    rng = torch.Generator().manual_seed(100 + seed)
    tensors = weights(seed) | {name: torch.randn(rows, WIDE, generator=rng).bfloat16() for name in TALL}
    save(folder, tensors, vocab_size=rows)
    content: dict[str, Any] = {
        **{"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None},
        **{"pre_tokenizer": {"type": "Whitespace"}, "decoder": None},
        "added_tokens": [
            {"id": tokens[t], "content": t, "special": True, "normalized": False, "single_word": False}
            | {"lstrip": False, "rstrip": False}
            for t in added
        ],
        "model": {
            "type": "WordLevel",
            "vocab": tokens,
            "unk_token": "[UNK]",
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return tensors


def test_tokens_of_all_models_have_the_rows_of_those_that_know_them(tmp_path: Path) -> None:
    one = model(tmp_path / "one", ONE, 1, 7)  # three rows more than tokens
    two = model(tmp_path / "two", TWO, 2, 5, added=("<|tool|>",))
    parents = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(UserError, match="--vocabulary union"):
        merge(parents, out=tmp_path / "out")
    merge(parents, out=tmp_path / "out", vocabulary="union")
    made, config = Checkpoint(tmp_path / "out"), json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 7 and not list(tmp_path.glob(".*"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("a d <|tool|>c").tokens == ["a", "d", "<|tool|>", "c"]
    places = tokenizer.get_vocab()
    assert {t: places[t] for t in ONE} == ONE and sorted(places.values()) == [*range(6)]
    for name in TALL:
        rows = made.read(name)
        assert rows.shape == (7, WIDE) and rows.dtype == torch.bfloat16
        for token, place in places.items():
            own = [t[name][ids[token]].float() for t, ids in ((one, ONE), (two, TWO)) if token in ids]
            torch.testing.assert_close(rows[place], (sum(own) / len(own)).bfloat16())  # type: ignore[arg-type]
        assert torch.equal(rows[6], one[name][6])
    middle = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(made.read(middle), ((one[middle].float() + two[middle].float()) / 2).bfloat16())


def test_equal_vocabularies_are_left_alone(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        model(tmp_path / name, ONE, seed, 4)
    parents = [tmp_path / "one", tmp_path / "two"]
    merge(parents, out=tmp_path / "same")
    merge(parents, out=tmp_path / "union", vocabulary="union")
    same, union = (Checkpoint(tmp_path / name) for name in ("same", "union"))
    assert all(torch.equal(same.read(name), union.read(name)) for name in same.names())
    assert (tmp_path / "union" / "tokenizer.json").read_bytes() == (tmp_path / "one" / "tokenizer.json").read_bytes()


def test_vocabularies_that_cannot_be_united_are_refused(tmp_path: Path) -> None:
    model(tmp_path / "one", ONE, 1, 4)
    model(tmp_path / "two", TWO, 2, 5)
    (tmp_path / "two" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"two has no tokenizer\.json"):
        merge([tmp_path / "one", tmp_path / "two"], out=tmp_path / "out", vocabulary="union")
    with pytest.raises(UserError, match="has a token 3, and the model's embedding 3 rows"):
        read_vocabulary(tmp_path / "one", 3)
    (tmp_path / "one" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged, or of a kind that is unknown"):
        read_vocabulary(tmp_path / "one", 4)


def test_the_base_leads_where_there_is_one(tmp_path: Path) -> None:
    base = model(tmp_path / "base", ONE, 0, 4)
    two = model(tmp_path / "two", TWO, 2, 5, added=("<|tool|>",))
    merge(
        [tmp_path / "two"], base=tmp_path / "base", method="task-arithmetic", out=tmp_path / "out", vocabulary="union"
    )
    rows = Checkpoint(tmp_path / "out").read(TALL[0])
    torch.testing.assert_close(rows[1], base[TALL[0]][1])  # the tuned model lacks b, and so changes nothing of it
    torch.testing.assert_close(rows[5], two[TALL[0]][4])
    union = united([read_vocabulary(tmp_path / n, r) for n, r in (("base", 4), ("two", 5))])
    assert union.tokens == {"d": 4, "<|tool|>": 5}
