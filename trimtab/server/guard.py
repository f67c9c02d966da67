"""What every request passes before any route: who asks, from where, and how much."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import sys
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab.server.settings import Settings

OPEN = "/health"
MANAGEMENT = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
LOCAL = ("localhost", "127.", "[::1]")
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def fault(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An error, in OpenAI's form."""
    body = {"error": fault_body(status, message, param=param, code=code)}
    return Response(json.dumps(body), status, headers, media_type="application/json")


def fault_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """What an error says."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": code}


def too_long(settings: Settings) -> str:
    """What is said of a request whose headers go on and on."""
    return f"headers and address of more than {settings.header:,} bytes are not read"


class Guard:
    """Keys, hosts, sizes, and the line that `--verbose` prints."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, read = time.monotonic(), 0, 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._settings.body:
                raise HTTPException(413, self._too_large())
            return message

        async def seen(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            refused = self._refused(scope)
            await (refused or self._app)(scope, receive if refused else counted, seen)
        finally:
            if self._settings.verbose:
                what = f"{scope['method']} {scope['path']!r:.200}"
                print(f"{what} {status} {1000 * (time.monotonic() - begun):.0f} ms", file=sys.stderr, flush=True)

    def _refused(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        long = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if long + len(scope["raw_path"]) + len(scope["query_string"]) > self._settings.header:
            return fault(431, too_long(self._settings))
        if scope["path"] != OPEN and (refused := self._unknown(scope["path"], headers)) is not None:
            return refused
        try:
            large = int(headers.get(b"content-length", b"0")) > self._settings.body
        except ValueError:  # more digits than Python reads
            large = True
        return fault(413, self._too_large()) if large else None

    def _unknown(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        settings = self._settings
        shown = _shown(headers.get(b"authorization", b""))
        managed = path in MANAGEMENT
        if managed and settings.admin_key is None:
            return fault(404, "adapters cannot be managed here: the server was started without --admin-key")
        if settings.admin_key is not None and _same(shown, settings.admin_key):
            return None
        if managed:
            known = settings.key is None or _same(shown, settings.key)
            return fault(403 if known else 401, "this needs the admin key: Authorization: Bearer KEY")
        if settings.key is None:
            return None if not settings.local or _local(headers.get(b"host", b"")) else _foreign()
        if _same(shown, settings.key):
            return None
        ask = {"WWW-Authenticate": 'Basic realm="trimtab", charset="UTF-8"'} if path == "/" else None
        message = "no key was shown" if shown is None else "the key that was shown is not the server's"
        return fault(401, f"{message}: send Authorization: Bearer KEY", code="invalid_api_key", headers=ask)

    def _too_large(self) -> str:
        return f"a body of more than {self._settings.body:,} bytes is not read"


def _shown(header: bytes) -> bytes | None:
    """The key of a header: a bearer's, or the password that a browser asked its user for."""
    kind, _, rest = header.partition(b" ")
    if kind.lower() == b"bearer":
        return rest.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return None
    return None


def _same(shown: bytes | None, key: str) -> bool:
    return shown is not None and hmac.compare_digest(shown, key.encode())


def _local(host: bytes) -> bool:
    """A page elsewhere whose name was made to lead here still says its own name."""
    name = host.decode("latin-1").lower()
    return not name or name.startswith(LOCAL)


def _foreign() -> Response:
    return fault(
        403, "this server answers to localhost and 127.0.0.1 alone; start it with --key to give it other names"
    )
