"""A server for tests: real processes on a free port, with the engine of server_engine.py."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from trimtab.models.pocket import POCKET

ENGINE = Path(__file__).with_name("server_engine.py")
PATIENCE = 60.0  # seconds: machines that run tests may be busy
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'developer' %}{{ raise_exception('no developers') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def model_folder(folder: Path) -> Path:
    """Pocket's tokenizer with a chat template."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((POCKET["pocket"] / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def adapter_folder(folder: Path) -> Path:
    """Two adapters by name, with nothing in them."""
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}")
    return folder


def until(done: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What a function says once it is true; fails after a while."""
    late = time.monotonic() + seconds
    while not (said := done()):
        assert time.monotonic() < late, f"not within {seconds} seconds"
        time.sleep(0.02)
    return said


class Running:
    """A server under test."""

    def __init__(self, folder: Path, line: list[str], key: str | None = None) -> None:
        self.log, self.out, self.err = (folder / name for name in ("log.jsonl", "out", "err"))
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(line, stdout=out, stderr=err, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.port = 0
        self.key = key

    def ready(self, seconds: float = PATIENCE) -> dict[str, Any]:
        """What it said at its start."""

        def said() -> Any:
            assert self.process.poll() is None, self.err.read_text()
            return "\n}" in self.out.read_text()

        until(said, seconds)
        found: dict[str, Any] = json.loads(self.out.read_text())
        self.port = int(found["address"].rpartition(":")[2])
        return found

    def child(self, what: str) -> psutil.Process:
        """One of the two processes: `server.front` or `engine`."""

        def found() -> list[psutil.Process]:
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if any(what in word for word in child.cmdline()[1:4])]

        process: psutil.Process = until(found)[0]
        return process

    def orders(self, do: str = "") -> list[dict[str, Any]]:
        """What the engine was told."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        told = [json.loads(line) for line in lines]
        return [order for order in told if order["do"] == (do or order["do"])]

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "",
        key: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, body (read as JSON where it is some) and headers; `body` may be bytes."""
        shown = {"Authorization": f"Bearer {key or self.key}"} if key or self.key else {}
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            sent = {"Content-Type": "application/json", **shown, **(headers or {})}
            connection.request(method or ("GET" if raw is None else "POST"), path, raw, sent)
            answer = connection.getresponse()
            text = answer.read().decode()
            kind = answer.headers.get("content-type", "")
            return answer.status, json.loads(text) if kind == "application/json" else text, dict(answer.headers.items())
        finally:
            connection.close()

    def events(self, path: str, **body: Any) -> list[Any]:
        """Data of a stream's events, read as JSON but for `[DONE]`."""
        status, text, headers = self.ask(path, {**body, "stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
        assert text.endswith("\n\n")
        lines = text.split("\n\n")[:-1]
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [line[6:] if line[6:] == "[DONE]" else json.loads(line[6:]) for line in lines]

    def raw(self, data: bytes = b"") -> socket.socket:
        """A bare connection, with something sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        connection.sendall(data)
        return connection

    def post(self, path: str, **body: Any) -> bytes:
        """A request as bytes."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data

    def healthy(self) -> bool:
        try:
            return self.ask("/health")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics")[1].splitlines()
        return float(next(line for line in lines if line.startswith(name)).rpartition(" ")[2])


@contextmanager
def running(folder: Path, *engine: str, wait: bool = True, **settings: Any) -> Iterator[Running]:
    """A server, ended when the test is."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"engine": ["--log", str(folder / "log.jsonl"), *engine], "settings": settings}
    server = Running(folder, [sys.executable, str(ENGINE), "serve", json.dumps(given)], settings.get("key"))
    try:
        if wait:
            server.ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                server.process.send_signal(signal.SIGTERM)  # asked twice: at once
                server.process.wait(PATIENCE)
