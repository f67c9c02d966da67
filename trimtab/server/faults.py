"""Errors of every kind, in OpenAI's form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from trimtab.server.guard import fault
from trimtab.server.link import Refused


def answer_faults(app: FastAPI) -> None:
    """Whatever is raised in a route is answered so."""

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
