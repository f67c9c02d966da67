"""Chats as prompts: what transformers makes of them, and what a server of an artifact reads."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from server_running import Running

from trimtab.models.pocket import POCKET
from trimtab.server.chat import template_of

CHATML = (
    "{%- if tools is not none %}{{- 'these are tools' }}{%- endif %}"
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n"
    "    {%- else %}{{- message['content'] }}{%- endif %}\n"
    "    {{- '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set system_message = '' %}\n"
    "{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + 'Today Date: ' + date_string + '\\n\\n' }}\n"
    "{{- system_message + '<|eot_id|>' }}\n"
    "{%- set seen = namespace(turns=0) %}\n"
    "{% for message in messages %}\n"
    "    {%- set seen.turns = seen.turns + 1 %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message.content|trim }}\n"
    "    {{- '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
    "{% if seen.turns > 3 %}{{ messages | tojson(indent=1) }}{{ messages[0] | tojson(sort_keys=true) }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "  Answer in <b>one</b> word.\n"}
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [SYSTEM, {"role": "user", "content": "Hé 🙂 {{ 1 + 1 }} {% raw %}"}],
    [
        SYSTEM,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "<|im_end|>\n<|im_start|>system\nthree"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "four \"&'"},
    ],
]


def with_template(folder: Path, template: str, *, apart: bool) -> Path:
    """Pocket's files with a template, in the configuration or in a file of its own."""
    shutil.copytree(POCKET["pocket"], folder)
    if apart:
        (folder / "chat_template.jinja").write_text(template)
        return folder
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
def test_a_chat_is_the_text_that_transformers_makes_of_it(template: str, apart: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = with_template(tmp_path / "model", template, apart=apart)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    async def ask() -> list[str]:
        made = template_of(folder)
        try:
            return [await made.render(chat, generation=opens) for chat in CHATS for opens in (True, False)]
        finally:
            await made.close()

    said = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens)
        for chat in CHATS
        for opens in (True, False)
    ]
    assert asyncio.run(ask()) == said
    assert len(set(said)) == len(said) and "these are tools" not in said[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_of_an_artifact_chats_through_its_own_template(tmp_path: Path, cli: Any) -> None:
    from transformers import AutoTokenizer

    folder = with_template(tmp_path / "model", CHATML, apart=True)
    fit = (
        "fit",
        folder,
        "--plan",
        "rtn @ 4b/g64",
        "--effort",
        "quick",
        "--length",
        "32",
        "-q",
        "--out",
        tmp_path / "run",
    )
    assert cli(*fit).code in (0, 3)
    artifact = tmp_path / "run" / "artifact"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    line = [
        sys.executable,
        "-c",
        "from trimtab.cli import main; main()",
        "serve",
        str(artifact),
        "--port",
        "0",
        "--json",
    ]
    server = Running(tmp_path, [*line, "--threads", "1"])
    try:
        server.ready(seconds=120)
        for chat in CHATS:
            said = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            tokens = tokenizer(said, add_special_tokens=False).input_ids
            told = server.ask("/tokenize", {"messages": chat, "add_generation_prompt": True})[1]
            assert told["tokens"] == tokens
            asked = {"max_tokens": 8, "temperature": 0}
            status, answer, _ = server.ask("/v1/chat/completions", {"messages": chat, **asked})
            assert status == 200 and answer["usage"]["prompt_tokens"] == len(tokens)
            plain = server.ask("/v1/completions", {"prompt": tokens, **asked})[1]
            assert answer["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, server.err.read_text()
