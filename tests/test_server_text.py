"""Text and tokens of the server: characters, strings that end a text, chat templates."""

from __future__ import annotations

import asyncio
import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.models.pocket import POCKET
from trimtab.server.chat import Template, rendered, template_of
from trimtab.server.link import Refused
from trimtab.server.text import Vocabulary, Writer

VOCABULARY = Vocabulary(POCKET["pocket"])


@given(st.text())
@settings(max_examples=60, deadline=None)
def test_tokens_give_the_text_back(text: str) -> None:
    assert VOCABULARY.text(VOCABULARY.encode(text, special=False)) == text
    assert VOCABULARY.encode(text)[0] == 0 and VOCABULARY.text([0]) == ""


@given(st.binary(max_size=60), st.lists(st.integers(1, 5), max_size=60))
@settings(deadline=None)
def test_any_cut_of_any_bytes_gives_the_same_text(raw: bytes, cuts: list[int]) -> None:
    writer, shown, left = Writer(), "", raw
    for cut in cuts:
        shown += writer.add(left[:cut])
        left = left[cut:]
    assert shown + writer.add(left, last=True) == codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


ABC = st.text(alphabet="abc", max_size=30)


@given(ABC, st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_a_stop_string_ends_the_text_wherever_it_is_cut(text: str, stops: list[str], data: Any) -> None:
    writer, shown, left = Writer(stops), "", text
    while left and not writer.stopped:
        cut = data.draw(st.integers(1, len(left)))
        shown += writer.add(left[:cut].encode())
        left = left[cut:]
    shown += writer.add(b"", last=True)
    # The first end of a stop string, letter by letter, is where a reader of single letters would have stopped.
    ends = [text.find(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text and not writer.stopped
    else:
        assert writer.stopped and text.startswith(shown) and not any(stop in shown for stop in stops)


def test_half_characters_wait_for_their_other_half() -> None:
    writer = Writer()
    raw = "é🙂".encode()
    assert [writer.add(raw[i : i + 1]) for i in range(len(raw))] == ["", "é", "", "", "", "🙂"]
    assert writer.add(raw[2:4]) == "" and writer.add(b"", last=True) == ""


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        Vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff{")
    with pytest.raises(UserError, match="no tokenizer"):
        Vocabulary(tmp_path)


def test_a_tokenizer_whose_joints_are_unknown_is_refused(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "A": 1, "##b": 2, "d": 3, "##1": 4}
    said = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            **{"type": "WordPiece", "vocab": vocabulary, "unk_token": "[UNK]"},
            **{"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="joins tokens in a way"):
        Vocabulary(tmp_path)


def test_a_sentencepiece_tokenizer_gives_its_bytes(tmp_path: Path) -> None:
    letters = {letter: place for place, letter in enumerate("▁Abcd1“”日本é")}
    bytes_ = {f"<0x{byte:02X}>": len(letters) + byte for byte in range(256)}
    said = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {"type": "BPE", "vocab": letters | bytes_, "merges": [], "byte_fallback": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(said))
    vocabulary = Vocabulary(tmp_path)
    tokens = vocabulary.encode("A 🙂", special=False)
    assert [vocabulary.bytes_of(token) for token in tokens[:3]] == [b"A", b" ", b"\xf0"]
    assert vocabulary.text(tokens) == "A 🙂" and vocabulary.name(tokens[2]) == "bytes:\\xf0"


def test_a_template_is_found_in_each_of_its_places(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"

    def said(**what: Any) -> str:
        config.write_text(json.dumps(what))

        async def ask() -> str:
            template = template_of(tmp_path)
            try:
                return await template.render([{"role": "user", "content": "x"}])
            finally:
                await template.close()

        return asyncio.run(ask())

    with pytest.raises(Refused, match="no chat template"):
        said(bos_token="<s>")
    assert said(bos_token={"content": "<s>"}, chat_template="{{ bos_token }}{{ messages[0].content }}") == "<s>x"
    assert said(chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]) == "d"
    (tmp_path / "chat_template.jinja").write_text("{% generation %}own{% endgeneration %}{{ add_generation_prompt }}")
    assert said(chat_template="not this") == "ownTrue"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "seconds"),
        ("{{ 'a' * 3000000000 }}", "Memory"),
        ("{% for a in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "too long"),
        ("{{ ''.__class__.__mro__ }}", "Security"),
        ("{{ messages.append(1) }}", "Security"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% include 'x' %}", "loader"),
    ],
)
def test_a_template_can_reach_out_for_nothing_and_never_hangs(template: str, why: str) -> None:
    async def ask() -> None:
        made = Template(template, {}, seconds=1.0 if why == "seconds" else 50.0)
        good = Template("fine", {}, seconds=50.0)
        try:
            await made.start()
            with pytest.raises(Refused, match=why):
                await made.render([])
            assert await good.render([]) == "fine"
        finally:
            await made.close()
            await good.close()

    asyncio.run(ask())


def test_templates_know_what_training_left_in_them() -> None:
    text = "{%- for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    assert rendered(text, {"messages": [{"content": "é<"}, {}]}) == '{"content": "é<"}'
    assert len(rendered("{{ strftime_now('%Y') }}", {})) == 4
