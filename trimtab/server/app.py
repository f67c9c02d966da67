"""The routes of `trimtab serve`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from trimtab import __version__
from trimtab.server.exchange import Exchange, Service, check_ids
from trimtab.server.faults import answer_faults
from trimtab.server.guard import Guard
from trimtab.server.link import Refused
from trimtab.server.schema import (
    Chat,
    Completion,
    Detokenize,
    Fault,
    LoadAdapter,
    Tokenize,
    UnloadAdapter,
)
from trimtab.server.settings import Settings
from trimtab.server.wire import Ready

PAGE = Path(__file__).with_name("page.html")
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": Fault} for status in (400, 401, 403, 404, 405, 413, 422, 429, 431, 500, 503)
}
TOKENIZED = 16  # contexts that are counted for who asks for tokens alone
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


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
    answer_faults(app)
    _look(app, service)
    _write(app, service)
    _manage(app, service)
    return app


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
        policy = f"default-src 'none'; img-src data:; connect-src 'self'; style-src 'nonce-{nonce}'"
        policy += f"; script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": policy}
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
            tokens = await service.encode(text, special=False, most=TOKENIZED * ready.context)
        else:
            tokens = await service.encode(
                body.prompt or "", special=body.add_special_tokens, most=TOKENIZED * ready.context
            )
        names = [service.vocabulary.name(token) for token in tokens] if body.return_token_strs else None
        said = {"count": len(tokens), "max_model_len": ready.context, "tokens": tokens, "token_strs": names}
        return JSONResponse(said)

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> Response:
        ready = link.engine()
        service.adapter(body.model)
        check_ids(body.tokens, ready)
        return JSONResponse({"prompt": service.vocabulary.text(body.tokens, special=True)})


def _write(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=STREAMED)
    async def completions(body: Completion, request: Request) -> Response:
        ready = service.link.engine()
        service.adapter(body.model)
        limit = 16 if body.max_tokens is None else body.max_tokens
        if limit == 0 and not body.echo:
            raise Refused(400, "max_tokens: 0 is for echo alone; ask for 1 at least")
        asked = body.prompts()
        prompts = [
            p if isinstance(p, list) else await service.encode(p, special=True, most=ready.context) for p in asked
        ]
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
        tokens = await service.encode(text, special=False, most=ready.context)
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
            raise Refused(400, f"lora_name: {body.lora_name} is there already; unload it first")
        if body.lora_path not in (None, body.lora_name):
            raise Refused(400, "lora_path: an adapter is called as its folder is; leave it out")
        entries = await asyncio.to_thread(_entries, service.settings.adapters)
        if (path := entries.get(body.lora_name)) is None:
            raise Refused(404, f"lora_name: {body.lora_name} is not in the server's folder; {_few(entries)}")
        await service.link.change(body.lora_name, path)
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


def _failed(held: asyncio.Task[None]) -> None:
    """A link that ended by itself has nothing to serve: what it failed of is for the server's log."""
    if not held.cancelled() and (error := held.exception()) is not None:
        held.get_loop().call_exception_handler({"message": "the link to the engine failed", "exception": error})
