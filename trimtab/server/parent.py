"""The process that a user starts: it holds the address, and keeps the engine and the HTTP process there."""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from trimtab.core.budget import say_bytes
from trimtab.core.errors import UserError
from trimtab.server.pulse import Ear, beat_of
from trimtab.server.settings import Settings

PACKAGES = ("fastapi", "uvicorn", "jinja2", "pydantic")
KEYS = ("TRIMTAB_API_KEY", "TRIMTAB_ADMIN_KEY")  # of the environment, which no child is to have
POLL = 0.1  # seconds between looks at the children
STEADY = 5.0  # seconds after which a child that dies is started at once again
LONGEST_WAIT = 30.0
TRIES = 5  # of a child that was never ready
GRACE = 6.0  # seconds beyond the drain before a child is killed
PATH = 100  # bytes that a socket's path may have, everywhere


class Child:
    """A process that is to be there; the end of its standard input tells it that this process is gone.

    Args:
        what: how it is called when it dies.
        line: its command.
        given: a line for its standard input.
        handed: number of a socket that it inherits, or None.
        heard: what is done with each line of its standard output; None: it goes to this process' own.
        ear: hears whether it lives; None: a process that is there counts as one that works.
        silenced: told why, before it is killed because it gave no sign.
    """

    def __init__(
        self,
        what: str,
        line: Sequence[str],
        *,
        given: str = "",
        handed: int | None = None,
        heard: Callable[[str], None] | None = None,
        ear: Ear | None = None,
        silenced: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.what, self._line, self._given, self._handed, self._heard = what, line, given, handed, heard
        self._ear, self._silenced = ear, silenced
        self.process: subprocess.Popen[str] | None = None
        self.deaths = 0  # in a row
        self._began = self._again = 0.0

    def tend(self) -> int | None:
        """Start it if it is time to; its exit code if it has ended."""
        now = time.monotonic()
        if self.process is None:
            if now >= self._again:
                self._start()
            return None
        if (code := self.process.poll()) is None:
            if self._ear is None or not self._ear.hung():
                return None
            self._silenced(f"the {self.what} gave no sign of life for {self._ear.silence:g} seconds and was killed")
            self.process.kill()  # a process that is stopped, too
            code = self.process.wait()
        self._forget()
        self.deaths = 1 if now - self._began > STEADY else self.deaths + 1
        self._again = now + min(POLL * 2 ** (self.deaths - 1), LONGEST_WAIT)
        return code

    def stop(self, seconds: float, hurried: Callable[[], bool]) -> None:
        """Ask it to end, and end it if it does not."""
        if self.process is None:
            return
        self.process.terminate()
        late = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > late or hurried():
                self.process.kill()
                self.process.wait()
            time.sleep(POLL / 4)
        self._forget()

    def tell(self, line: str) -> None:
        """Write a line to its standard input, if it is there."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(line + "\n")
                self.process.stdin.flush()

    def _start(self) -> None:
        self._began = time.monotonic()
        if self._ear is not None:
            self._ear.forget()
        handed = () if self._handed is None else (self._handed,)
        out = subprocess.PIPE if self._heard else None
        self.process = subprocess.Popen(
            self._line,
            stdin=subprocess.PIPE,
            stdout=out,
            pass_fds=handed,
            start_new_session=True,  # a terminal's signals come to this process alone
            text=True,
            env={name: value for name, value in os.environ.items() if name not in KEYS},
        )
        if self._given:
            self.tell(self._given)
        if self.process.stdout is not None:
            threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()

    def _listen(self, out: Any) -> None:
        for line in out:
            assert self._heard is not None
            self._heard(line)
        out.close()

    def _forget(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None


@dataclass
class Server:
    """What is watched, and what was said of it so far."""

    address: str
    model: str
    json: bool
    stops: int = 0
    ready: bool = False

    def heard(self, line: str) -> None:
        """The HTTP process passes on what an engine says when it is ready."""
        ready = jsonlib.loads(line)["ready"]
        if self.ready:
            print("the engine is back", file=sys.stderr, flush=True)
        elif self.json:
            print(jsonlib.dumps({"address": self.address, "pid": os.getpid(), **ready}, indent=1), flush=True)
        else:
            print(f"{self.address} serves {described(ready)}", flush=True)
        self.ready = True

    def signalled(self, number: int, frame: Any) -> None:
        self.stops += 1

    def died(self, child: Child, code: int) -> None:
        """Says that a child ended; raises where starting it again would be no use."""
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if code == UserError.exit_code and not (self.ready and child.what == "engine"):
            raise SystemExit(code)  # it said why
        if not self.ready and child.deaths >= TRIES:
            raise UserError(
                f"the {child.what} of {self.model} ended {TRIES} times before it was ready, last with {how}; "
                "what it says of that stands above"
            )
        print(f"the {child.what} ended with {how}, and is started again", file=sys.stderr, flush=True)


def serve(
    settings: Settings, engine: Sequence[str], *, host: str, port: int, model: str = "", json: bool = False
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: of the HTTP process; `socket`, `listener` and `local` are filled in here.
        engine: command of the engine's process; `--socket PATH` is added to it.
        host, port: where clients come; 0 takes a free port.
        model: what is served, for messages.
        json: one JSON object at the start, in place of a sentence.
    """
    check_packages()
    listener = bound(host, port, settings.key)
    folder = Path(tempfile.mkdtemp(prefix="trimtab-"))  # for this user alone
    try:
        if len(os.fsencode(path := folder / "engine")) > PATH:
            raise UserError(f"the path {path} is too long for a socket; set TMPDIR to a shorter folder")
        where, listens = listener.getsockname()[:2]
        settings = replace(settings, socket=str(path), listener=listener.fileno(), local=ip_address(where).is_loopback)
        address = f"http://[{where}]:{listens}" if ":" in where else f"http://{where}:{listens}"
        server = Server(address, model, json)
        front = Child(
            "HTTP process",
            [sys.executable, "-m", "trimtab.server.front"],
            given=jsonlib.dumps(asdict(settings)),
            handed=listener.fileno(),
            heard=server.heard,
        )

        def silenced(why: str) -> None:
            print(why, file=sys.stderr, flush=True)
            front.tell(why)

        ear = Ear(beat_of(path), settings.silence)
        child = Child("engine", [*engine, "--socket", str(path)], ear=ear, silenced=silenced)
        _watch(server, (child, front), listener, settings.drain + GRACE)
    finally:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)


def _watch(server: Server, children: Sequence[Child], listener: socket.socket, patience: float) -> None:
    before = {number: signal.signal(number, server.signalled) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while not server.stops:
            for child in children:
                if (code := child.tend()) is not None:
                    server.died(child, code)
            time.sleep(POLL)
    finally:
        listener.close()  # or clients would wait at it for nobody
        asked = server.stops
        for child in reversed(children):
            child.stop(patience if asked else 1.0, lambda: server.stops > max(asked, 1))
        for number, handler in before.items():
            signal.signal(number, handler)


def check_packages() -> None:
    """What the HTTP process imports is there."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}, which is not installed: pip install 'trimtab[serve]'")


def bound(host: str, port: int, key: str | None) -> socket.socket:
    """A socket that listens at an address; one that others can reach needs a key."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"the host {host!r} is no address of this machine: {error}; the default is 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    if key is None and not ip_address(address[0]).is_loopback:
        raise UserError(
            f"{host} can be reached from other machines, and no key was given: say --key KEY or set TRIMTAB_API_KEY, "
            "or serve at 127.0.0.1"
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose another --port or --host"
        ) from None
    listener.listen(1024)
    return listener


def described(ready: dict[str, Any]) -> str:
    """What fits, in a sentence.

    >>> described({"model": "m", "engine": "vnni kernels", "context": 1024, "cache_tokens": 8192, "places": 6,
    ...            "token_bytes": 96.0, "adapter_bytes": 0, "pool": 786432, "memory": None, "adapters": []})
    'm on vnni kernels: 6 users at once; 8,192 tokens of 96 B in their caches, 8 whole contexts of 1,024; no adapters'
    """
    each, fit = say_bytes(ready["adapter_bytes"]), ready["pool"] // max(ready["adapter_bytes"], 1)
    many = len(ready["adapters"])
    parts = [
        f"{ready['model']} on {ready['engine']}: {ready['places']} users at once",
        f"{ready['cache_tokens']:,} tokens of {say_bytes(ready['token_bytes'])} in their caches, "
        f"{ready['cache_tokens'] // max(ready['context'], 1)} whole contexts of {ready['context']:,}",
        f"{many} adapters of up to {each}, of which {fit} would fill the pool" if many else "no adapters",
    ]
    if ready["memory"] is not None:
        parts.append(f"{say_bytes(ready['memory'])} of memory in all")
    return "; ".join(parts)
