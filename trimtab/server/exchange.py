"""One request for text: prompts go to the engine, what comes back goes to the client, as long as that is there."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from trimtab.server.answers import Choice, Piece, Shape, merged, pieces
from trimtab.server.chat import Template, template_of
from trimtab.server.guard import fault_body
from trimtab.server.link import Event, Link, Refused
from trimtab.server.meter import Meter
from trimtab.server.schema import Chat, Generation
from trimtab.server.settings import Settings
from trimtab.server.text import Vocabulary
from trimtab.server.wire import Ready

FIRST = 1 << 15  # characters of a long text that are read first, to see whether it can fit at all
SLACK = 16  # tokens that may be fewer where a text is not cut


class Service:
    """What the routes share: the engine, and the text side of the model that it serves."""

    def __init__(self, settings: Settings, told: Callable[[Ready], None]) -> None:
        self.settings = settings
        self.meter = Meter()
        self.link = Link(settings.socket, self._ready)
        self._told = told
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="text")
        self._folder: str | None = None
        self.vocabulary: Vocabulary
        self.template: Template
        self.begun = int(time.time())

    def _ready(self, ready: Ready) -> None:
        if ready.folder != self._folder:
            self.vocabulary, self.template = Vocabulary(Path(ready.folder)), template_of(Path(ready.folder))
            self._folder = ready.folder
        self._told(ready)

    async def encode(self, text: str, *, special: bool, most: int) -> list[int]:
        """Tokens of a text, counted on another thread; of one that has more than `most`, only the beginning is read."""
        loop = asyncio.get_running_loop()
        part = FIRST
        while part < len(text):
            if len(await loop.run_in_executor(self._threads, self.vocabulary.encode, text[:part])) > most + SLACK:
                raise Refused(400, f"prompt: it has more than {most:,} tokens, which is all that is read; shorten it")
            part *= 2
        return await loop.run_in_executor(self._threads, partial(self.vocabulary.encode, text, special=special))

    def adapter(self, model: str | None) -> str | None:
        """Which adapter a model's name means; None for the model itself."""
        ready = self.link.engine()
        if model is None or model == ready.model:
            return None
        if model in self.link.adapters:
            return model
        raise Refused(404, f"there is no model {model!r:.80}; GET /v1/models lists what there is")

    async def close(self) -> None:
        if self._folder is not None:
            await self.template.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


class Exchange:
    """One request for text: from its prompts to the pieces of its choices.

    Args:
        service: of the server.
        request: the client's, watched until all is told: one that goes away is cancelled at the engine.
        body: what is asked.
        prompts: tokens of each prompt.
        limit: new tokens of each choice, at most.
        alternatives: log-probabilities to tell beside each token's own; None: none at all.
        echo: each prompt's text where it is to come first, else None.
        scored: the log-probabilities of the prompts are asked for, too.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        body: Generation,
        prompts: list[list[int]],
        *,
        limit: int,
        alternatives: int | None,
        echo: list[str | None],
        scored: bool = False,
    ) -> None:
        ready, self.service, self.body = service.link.engine(), service, body
        adapter = service.adapter(body.model)
        self.shape = Shape(
            service.vocabulary, body.model or ready.model, chat=isinstance(body, Chat), alternatives=alternatives
        )
        each = body.n or 1
        ends = frozenset(() if body.ignore_eos else ready.eos)
        self.choices: list[Choice] = []
        orders: list[dict[str, Any]] = []
        for tokens, text in zip(prompts, echo, strict=True):
            _check_tokens(tokens, limit, ready)
            for turn in range(each):
                self.choices.append(Choice(len(self.choices), service.vocabulary, tokens, body.stops(), ends, text))
                orders.append(
                    {
                        **{"tokens": tokens, "limit": limit, "adapter": adapter, "stop": list(ends)},
                        **{"temperature": 1.0 if body.temperature is None else body.temperature},
                        **{"top_p": 1.0 if body.top_p is None else body.top_p, "ignore_eos": body.ignore_eos},
                        **{"seed": None if body.seed is None else (body.seed + turn) % (1 << 63)},
                        **{"logprobs": alternatives, "echo": scored},
                    }
                )
        self._prompt_tokens = sum(map(len, prompts))
        service.meter.prompt(self._prompt_tokens)
        self.clocks = [service.meter.clock() for _ in self.choices]
        cut = request.scope.get("extensions", {}).get("trimtab.abort", lambda: None)
        self.job = service.link.submit(orders, patience=service.settings.patience, cut=cut)
        self._gone = asyncio.create_task(_gone(request.receive))
        self._gone.add_done_callback(lambda _: self.job.close())

    async def pieces(self) -> AsyncIterator[Piece]:
        """What becomes known, until all choices have ended or the client is gone; raises `Refused`."""
        try:
            async for piece in pieces(self._timed(), self.job, self.choices):
                if piece.reason:
                    self.clocks[piece.choice].end(piece.reason)
                yield piece
        except Refused:
            for clock in self.clocks:
                clock.end(None)
            raise
        finally:
            self.close()

    async def _timed(self) -> AsyncIterator[Event]:
        async for event in self.job.events():
            if event.kind == "token":
                self.clocks[event.choice].token()
            yield event

    def close(self) -> None:
        self._gone.cancel()
        self.job.close()
        for clock in self.clocks:
            clock.end("abort")

    def usage(self) -> dict[str, int]:
        written = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self._prompt_tokens + written,
        }

    async def answer(self) -> Response:
        """In one, or as a stream once the engine has begun: until then an error still has its own status."""
        parts = self.pieces()
        if not self.body.stream:
            found = [piece async for piece in parts]
            return JSONResponse(self.shape.whole(merged(found, len(self.choices)), self.usage()))
        first = await anext(parts, None)
        return EventStream(self._stream(first, parts))

    async def _stream(self, first: Piece | None, parts: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any] | None]:
        """Chunks, and None at the end of a stream that is whole."""
        more: dict[str, Any] = {"usage": None} if self.body.usage_in_stream() else {}
        try:
            if isinstance(self.body, Chat):
                for choice in self.choices:
                    yield self.shape.chunk([self.shape.opening(choice.place)], **more)
            if first is not None:
                yield self.shape.chunk([self.shape.part(first)], **more)
            async for piece in parts:
                yield self.shape.chunk([self.shape.part(piece)], **more)
            if more:
                yield self.shape.chunk([], usage=self.usage())
            yield None
        except Refused as refused:
            yield {"error": fault_body(refused.status, refused.message)}
        finally:
            self.close()


class EventStream(Response):
    """Chunks as server-sent events, `[DONE]` last."""

    def __init__(self, chunks: AsyncIterator[dict[str, Any] | None]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in self._chunks:
            data = "[DONE]" if chunk is None else json.dumps(chunk, separators=(",", ":"))
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _check_tokens(tokens: list[int], limit: int, ready: Ready) -> None:
    if not tokens:
        raise Refused(400, "prompt: it has no tokens; say at least one character")
    check_ids(tokens, ready)
    if len(tokens) + limit > ready.context:
        raise Refused(
            400,
            f"prompt and max_tokens: {len(tokens):,} and {limit:,} tokens are more than the context of "
            f"{ready.context:,}; shorten the prompt or ask for fewer",
        )


def check_ids(tokens: list[int], ready: Ready) -> None:
    if tokens and max(tokens) >= ready.vocabulary:
        raise Refused(400, f"token {max(tokens)} is not among the {ready.vocabulary:,} that there are, 0 the first")


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
