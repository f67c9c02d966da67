"""The process that speaks HTTP: `python -m trimtab.server.front`; its settings are a line on standard input.

It ends when that input does, so that none is left behind by a parent that was killed; a later line on it says why the
engine is about to be killed. Each `ready` of the engine goes to standard output as a line.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab.core.errors import UserError
from trimtab.server.app import build
from trimtab.server.guard import fault_body, too_long
from trimtab.server.settings import Settings
from trimtab.server.wire import Ready

BACKLOG = 256  # connections that are taken at once, before one of them is looked at
FILES = 64  # that this process needs besides connections
GRACE = 3.0  # seconds after the drain for what was failed to be told


def protocol(settings: Settings) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, with a clock for those who send their headers or body drop by drop."""

    class Timed(H11Protocol):
        """One connection."""

        timer: asyncio.TimerHandle | None = None
        part: Any = None  # of the request that the clock runs for

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.clients:
                self._give_up(503, f"{settings.clients:,} connections are open, and more are not held; try again later")
            else:
                self._watch(started=True)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch(started=bool(data))

        def handle_events(self) -> None:
            super().handle_events()
            if self.scope is not None:
                scope = cast(dict[str, Any], self.scope)
                scope.setdefault("extensions", {})["trimtab.abort"] = self.transport.abort

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch(started=False)

        def _watch(self, *, started: bool) -> None:
            """The clock runs while headers or a body have begun and are not all there."""
            part = self.conn.their_state
            if part is self.part and self.timer is not None:
                return
            self._stop()
            self.part = part
            waits = {h11.IDLE: settings.header_seconds, h11.SEND_BODY: settings.body_seconds}
            if part in waits and (started or part is h11.SEND_BODY) and not self.transport.is_closing():
                self.timer = self.loop.call_later(waits[part], self._late)

        def _stop(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def _late(self) -> None:
            self._give_up(408, "the request did not come in time")

        def send_400_response(self, msg: str) -> None:
            if getattr(sys.exception(), "error_status_hint", 400) == 431:
                self._give_up(431, too_long(settings))
            else:
                self._give_up(400, "this is no HTTP request that can be understood")

        def _give_up(self, status: int, message: str) -> None:
            """Whatever the application would still say goes nowhere."""
            under_way = self.cycle is not None and not self.cycle.response_complete
            if not (under_way and self.cycle.response_started):
                body = json.dumps({"error": fault_body(status, message)}).encode()
                head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
                self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            if under_way:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            self.transport.close()

    return Timed


class Server(uvicorn.Server):
    """Uvicorn, which gives what is under way its time when it is asked to stop, and then tells it why it ends."""

    def __init__(self, config: uvicorn.Config, settings: Settings, app: Any) -> None:
        super().__init__(config)
        self._settings, self._service = settings, app.state.service
        self.failed: BaseException | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._heard)
        loop.add_reader(sys.stdin.fileno(), self._input)
        await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        link = self._service.link
        link.closing = link.closing or "the server is stopping"
        wait = 0 if self.failed else self._settings.drain
        late = asyncio.get_running_loop().call_later(
            wait, link.fail, "the server is stopping, and its time for this is over"
        )
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()

    def _input(self) -> None:
        if said := os.read(sys.stdin.fileno(), 4096):
            self._service.link.why = said.decode().strip()
        else:  # the parent is gone
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self.should_exit = True

    def _heard(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, UserError):  # a model whose text cannot be served
            self.failed, self.should_exit = error, True
        else:
            loop.default_exception_handler(context)


def files() -> int:
    """Files that this process may have open, from now on as many as the system lets it have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return sys.maxsize if most == resource.RLIM_INFINITY else most


def main() -> None:
    """Serve until told to stop."""
    settings = Settings(**json.loads(os.fdopen(os.dup(0), "rb", buffering=0).readline()))
    settings = replace(settings, clients=min(settings.clients, max(1, files() - BACKLOG - FILES)))
    listener = socket.socket(fileno=settings.listener)

    def told(ready: Ready) -> None:
        print(json.dumps({"ready": asdict(ready)}), flush=True)

    app = build(settings, told)
    config = uvicorn.Config(
        app,
        http=protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(1, round(settings.drain + GRACE)),
        h11_max_incomplete_event_size=settings.header,
        backlog=BACKLOG,
    )
    server = Server(config, settings, app)
    server.run([listener])
    if server.failed is not None:
        print(f"trimtab: {server.failed}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
