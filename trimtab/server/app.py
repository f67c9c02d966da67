"""The routes of `trimtab serve`."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from trimtab import __version__
from trimtab.server.answers import Choice, Piece, Shape, merged, pieces
from trimtab.server.chat import Template, template_of
from trimtab.server.guard import Guard, fault, fault_body
from trimtab.server.link import Event, Link, Refused
from trimtab.server.meter import Meter
from trimtab.server.schema import (
    Chat,
    Completion,
    Detokenize,
    Fault,
    Generation,
    LoadAdapter,
    Tokenize,
    UnloadAdapter,
)
from trimtab.server.settings import Settings
from trimtab.server.text import Vocabulary
from trimtab.server.wire import Ready

PAGE = Path(__file__).with_name("page.html")
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": Fault} for status in (400, 401, 403, 404, 405, 413, 422, 429, 431, 500, 503)
}
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


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

    async def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text, counted on another thread: a long one would hold up everybody's tokens."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: self.vocabulary.encode(text, special=special))

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


def build(settings: Settings, told: Callable[[Ready], None] = lambda ready: None) -> FastAPI:
    """The application; `told` hears of each engine that is ready."""
    service = Service(settings, told)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        held = asyncio.create_task(service.link.run())
        held.add_done_callback(_failed)
        yield
        held.cancel()
        await service.close()

    app = FastAPI(
        title="trimtab serve",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=FAULTS,
    )
    app.state.service = service
    app.add_middleware(Guard, settings=settings)
    _faults(app)
    _look(app, service)
    _write(app, service)
    _manage(app, service)
    return app


def _faults(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = _said(list(error.errors()))
        return fault(400, message, param=param)

    @app.exception_handler(HTTPException)
    async def refused_by_http(request: Request, error: HTTPException) -> Response:
        return fault(error.status_code, error.detail, headers=dict(error.headers or {}))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        wait = None if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
        code = {404: "model_not_found", 429: "rate_limit_exceeded"}.get(error.status)
        return fault(error.status, error.message, code=code, headers=wait)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return fault(500, "a bug of the server; it is in its log")


def _look(app: FastAPI, service: Service) -> None:
    link = service.link

    @app.get("/health")
    async def health() -> Response:
        link.engine()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.meter.text(link), media_type="text/plain; version=0.0.4")

    @app.get("/", responses={200: {"content": {"text/html": {}}}})
    async def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; img-src data:; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        headers = {"Content-Security-Policy": f"{policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return Response(PAGE.read_text("utf-8").replace("NONCE", nonce), media_type="text/html", headers=headers)

    @app.get("/v1/models")
    async def models() -> Response:
        ready = link.engine()
        common = {"object": "model", "created": service.begun, "owned_by": "trimtab"}
        rows = [{"id": ready.model, **common, "root": ready.model, "parent": None, "max_model_len": ready.context}]
        rows += [{"id": name, **common, "root": name, "parent": ready.model} for name in link.adapters]
        return JSONResponse({"object": "list", "data": rows})

    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> Response:
        ready = link.engine()
        service.adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "say either prompt or messages")
        if body.messages is not None:
            text = await service.template.render(
                [message.plain() for message in body.messages], generation=body.add_generation_prompt
            )
            tokens = await service.encode(text, special=False)
        else:
            tokens = await service.encode(body.prompt or "", special=body.add_special_tokens)
        names = [service.vocabulary.name(token) for token in tokens] if body.return_token_strs else None
        said = {"count": len(tokens), "max_model_len": ready.context, "tokens": tokens, "token_strs": names}
        return JSONResponse(said)

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> Response:
        ready = link.engine()
        service.adapter(body.model)
        _check_ids(body.tokens, ready)
        return JSONResponse({"prompt": service.vocabulary.text(body.tokens, special=True)})


def _write(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=STREAMED)
    async def completions(body: Completion, request: Request) -> Response:
        service.link.engine()
        service.adapter(body.model)
        limit = 16 if body.max_tokens is None else body.max_tokens
        if limit == 0 and not body.echo:
            raise Refused(400, "max_tokens: 0 is for echo alone; ask for 1 at least")
        asked = body.prompts()
        prompts = [p if isinstance(p, list) else await service.encode(p, special=True) for p in asked]
        told = [p if isinstance(p, str) else service.vocabulary.text(p) for p in asked] if body.echo else None
        exchange = Exchange(
            service,
            request,
            body,
            prompts,
            limit=limit,
            alternatives=body.logprobs,
            echo=[*told] if told else [None] * len(prompts),
            scored=bool(body.echo) and body.logprobs is not None,
        )
        return await exchange.answer()

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(body: Chat, request: Request) -> Response:
        ready = service.link.engine()
        service.adapter(body.model)
        if body.top_logprobs and not body.logprobs:
            raise Refused(400, "top_logprobs: needs logprobs to be true")
        text = await service.template.render([message.plain() for message in body.messages])
        tokens = await service.encode(text, special=False)
        limit = body.max_completion_tokens or body.max_tokens
        exchange = Exchange(
            service,
            request,
            body,
            [tokens],
            limit=max(1, ready.context - len(tokens)) if limit is None else limit,
            alternatives=(body.top_logprobs or 0) if body.logprobs else None,
            echo=[None],
        )
        return await exchange.answer()


def _manage(app: FastAPI, service: Service) -> None:
    @app.post("/v1/load_lora_adapter", responses={200: {"content": {"text/plain": {}}}})
    async def load(body: LoadAdapter) -> Response:
        ready = service.link.engine()
        if body.lora_name == ready.model or body.lora_name in service.link.adapters:
            raise Refused(400, f"lora_name: {body.lora_name} is taken; unload it first, or choose another name")
        entry = body.lora_path or body.lora_name
        if (path := await asyncio.to_thread(_entries, service.settings.adapters)).get(entry) is None:
            raise Refused(404, f"lora_path: no adapter {entry} lies in the server's folder; {_few(path)}")
        await service.link.change(body.lora_name, path[entry])
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @app.post("/v1/unload_lora_adapter", responses={200: {"content": {"text/plain": {}}}})
    async def unload(body: UnloadAdapter) -> Response:
        if body.lora_name not in service.link.adapters:
            raise Refused(404, f"lora_name: no adapter {body.lora_name} is loaded")
        await service.link.change(body.lora_name, None)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")


def _entries(folder: str | None) -> dict[str, str]:
    """Name -> path of what lies in the folder of adapters: the only paths that an engine is ever told."""
    if folder is None:
        return {}
    return {entry.name: str(entry) for entry in Path(folder).iterdir() if (entry / "adapter_config.json").is_file()}


def _few(entries: dict[str, str]) -> str:
    names = sorted(entries)
    return f"there is {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}" if names else "it holds none"


def _check_tokens(tokens: list[int], limit: int, ready: Ready) -> None:
    if not tokens:
        raise Refused(400, "prompt: it has no tokens; say at least one character")
    _check_ids(tokens, ready)
    if len(tokens) + limit > ready.context:
        raise Refused(
            400,
            f"prompt and max_tokens: {len(tokens):,} and {limit:,} tokens are more than the context of "
            f"{ready.context:,}; shorten the prompt or ask for fewer",
        )


def _check_ids(tokens: list[int], ready: Ready) -> None:
    if tokens and max(tokens) >= ready.vocabulary:
        raise Refused(400, f"token {max(tokens)} is not among the {ready.vocabulary:,} that there are, 0 the first")


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _failed(held: asyncio.Task[None]) -> None:
    """A link that ended by itself has nothing to serve: what it failed of is for the server's log."""
    if not held.cancelled() and (error := held.exception()) is not None:
        held.get_loop().call_exception_handler({"message": "the link to the engine failed", "exception": error})


def _said(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """What is wrong with a body, field by field, and the first field's name."""
    by_field: dict[str, dict[str, Any]] = {}
    for error in errors:
        where = [str(part) for part in error["loc"] if part != "body"]
        name = _printable(where[0]) if where and error["type"] != "json_invalid" else ""
        if name not in by_field or by_field[name]["type"].endswith("_type"):
            by_field[name] = error
    parts = [f"{name}: {_reason(error)}" if name else _reason(error) for name, error in list(by_field.items())[:5]]
    return "; ".join(parts), next(iter(by_field)) or None


def _reason(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "this server does not know the field, or supports it only at its neutral value; leave it out"
    if error["type"] == "json_invalid":
        return f"the body is no JSON: {error['ctx']['error']}"
    if error["type"] == "model_attributes_type" and not any(part != "body" for part in error["loc"]):
        return "the body must be a JSON object, sent as Content-Type: application/json"
    return _printable(error["msg"])


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:200]
