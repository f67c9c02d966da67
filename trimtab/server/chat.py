"""Chat templates, carried out in a process of their own.

Jinja's sandbox forbids attributes and calls that lead out of a template, and bounds neither time nor memory. So a
helper renders: its address space is limited, it gives up on a text that grows too long, and one that does not answer in
time is killed and started anew.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE
from datetime import datetime
from pathlib import Path
from typing import Any

from trimtab.server.link import Refused

SECONDS = 2.0  # a text may take
CHARACTERS = 4_000_000  # a text may have
MEMORY = 1 << 30  # bytes of address space of the helper
LINE = 64 << 20
NONE = {"tools": None, "documents": None}  # templates ask whether these are none, and not whether they are there
TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


class Template:
    """A model's chat template.

    Args:
        source: the template; None if the model has none.
        variables: what it may name beside the messages: `bos_token`, `eos_token` and the like.
        seconds: how long a text may take.
    """

    def __init__(self, source: str | None, variables: dict[str, str], *, seconds: float = SECONDS) -> None:
        self._source, self._variables, self._seconds = source, variables, seconds
        self._helper: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def render(self, messages: list[dict[str, str]], *, generation: bool = True) -> str:
        """The prompt that a chat is; `generation` opens the assistant's turn."""
        if self._source is None:
            raise Refused(400, "this model has no chat template: ask /v1/completions with a prompt instead")
        async with self._turn:
            await self.start()
            try:
                said = await asyncio.wait_for(self._ask(messages, generation), self._seconds)
            except (TimeoutError, OSError, ValueError):  # ended by its limits, or about to be
                await self.close()
                raise Refused(
                    400,
                    f"the chat template made no text of these messages in {self._seconds:g} seconds and its memory",
                ) from None
            except asyncio.CancelledError:  # half a question is with the helper
                await self.close()
                raise
        if "error" in said:
            raise Refused(400, f"the chat template refuses these messages: {said['error'][:500]}")
        return str(said["text"])

    async def start(self) -> None:
        """The helper, ahead of the first question."""
        if self._source is not None and self._helper is None:
            line = (sys.executable, "-m", "trimtab.server.chat")
            self._helper = await asyncio.create_subprocess_exec(*line, stdin=PIPE, stdout=PIPE, limit=LINE)
            self._write({"template": self._source, "variables": self._variables})
            assert self._helper.stdout is not None
            await self._helper.stdout.readline()  # it has imported what it needs; from now on its time counts

    async def close(self) -> None:
        """End the helper; the next question starts another."""
        helper, self._helper = self._helper, None
        if helper is None:
            return
        if helper.returncode is None:
            helper.kill()
        if helper.stdin is not None:
            helper.stdin.close()
        await helper.communicate()

    async def _ask(self, messages: list[dict[str, str]], generation: bool) -> dict[str, Any]:
        assert self._helper is not None and self._helper.stdout is not None
        self._write({"messages": messages, "add_generation_prompt": generation})
        said = json.loads(await self._helper.stdout.readline())
        assert isinstance(said, dict)
        return said

    def _write(self, value: dict[str, Any]) -> None:
        assert self._helper is not None and self._helper.stdin is not None
        self._helper.stdin.write(json.dumps(value).encode() + b"\n")


def template_of(folder: Path) -> Template:
    """The template in a model's folder: chat_template.jinja, or tokenizer_config.json's own."""
    said: dict[str, Any] = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        said |= json.loads(path.read_text("utf-8")) if path.is_file() else {}
    source = said.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {row["name"]: row["template"] for row in source}
        source = named.get("default", next(iter(named.values()), None))
    if (own := folder / "chat_template.jinja").is_file():
        source = own.read_text("utf-8")
    tokens = {name: said[name] for name in TOKENS if said.get(name)}
    variables = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return Template(source, variables)


def rendered(template: str, variables: dict[str, Any], *, most: int = CHARACTERS) -> str:
    """A template's text, at most so many characters of it; raises what jinja2 raises, or ValueError.

    >>> rendered("{% for m in messages %}[{{ m.content }}]{% endfor %}", {"messages": [{"content": "a"}]})
    '[a]'

    It is what `apply_chat_template` of transformers gives, where no tools and no documents are given.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what training counts; here it is its contents."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return [nodes.Scope(body, lineno=line)]

    def refuse(message: str) -> None:
        raise ValueError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    world.filters["tojson"] = as_json
    world.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    parts: list[str] = []
    for part in world.from_string(template).generate(**NONE | variables):
        if (most := most - len(part)) < 0:
            raise ValueError("the text is too long")
        parts.append(part)
    return "".join(parts)


def main() -> None:
    """The helper: a line with the template, then a line for each chat, answered with a line each."""
    import resource

    import jinja2.sandbox  # noqa: F401  before the memory is bounded

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    given = json.loads(sys.stdin.readline())
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            said = {"text": rendered(given["template"], given["variables"] | json.loads(line))}
        except Exception as error:  # a template may raise anything
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
