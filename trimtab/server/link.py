"""The connection to the engine: it comes back by itself, and what was under way when it broke is told so."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any, NamedTuple

from trimtab.core.errors import UserError
from trimtab.server.wire import LONGEST, Ready, State, order

PATIENCE = 30.0  # seconds that a load or an unload may take


class Refused(Exception):
    """What cannot be done, with the status that HTTP has for it."""

    def __init__(self, status: int, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Event(NamedTuple):
    """One message about one choice of a job: `prompt`, `token` or `end`."""

    kind: str
    choice: int
    token: int = -1
    logprob: Any = None  # of a prompt: a list, one for each of its tokens
    top: Any = None
    reason: str = ""


class Job:
    """The choices of one request. Its events wait here for the client; a client that lets too many wait is cut off."""

    def __init__(self, link: Link, patience: int, cut: Callable[[], None]) -> None:
        self._link, self._patience, self._cut = link, patience, cut
        self._events: asyncio.Queue[Event | Refused | None] = asyncio.Queue()
        self.ids: dict[str, int] = {}
        self.closed = False

    def put(self, event: Event | Refused) -> None:
        if self.closed:
            return
        if self._events.qsize() >= self._patience:
            self.close()
            self._cut()
        else:
            self._events.put_nowait(event)

    def cancel(self, choice: int) -> None:
        """One choice needs no more."""
        for name in [name for name, place in self.ids.items() if place == choice]:
            self._link.cancel(name)

    def close(self) -> None:
        """Nobody waits any more: what is under way is cancelled, and whoever reads the events finds their end."""
        if not self.closed:
            self.closed = True
            for name in list(self.ids):
                self._link.cancel(name)
            self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[Event]:
        """Events until every choice has ended or the job is closed; raises `Refused`."""
        while self.ids or not self._events.empty():
            event = await self._events.get()
            if event is None:
                return
            if isinstance(event, Refused):
                self.close()
                raise event
            yield event


class Link:
    """The engine as the HTTP process sees it.

    Args:
        path: the engine's socket.
        told: called with each `Ready`, before anything is asked of that engine.
    """

    def __init__(self, path: str, told: Callable[[Ready], None] = lambda ready: None) -> None:
        self._path, self._told = path, told
        self._names = count(1)
        self._jobs: dict[str, tuple[Job, int]] = {}
        self._calls: dict[str, asyncio.Future[None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._changes: dict[str, str | None] = {}
        self.ready: Ready | None = None
        self.state: State | None = None
        self.adapters: tuple[str, ...] = ()
        self.closing: str | None = None
        self.why = ""  # the engine's connection is about to break

    @property
    def under_way(self) -> int:
        return len(self._jobs)

    def engine(self) -> Ready:
        """What is served; refuses while there is no engine, or no more."""
        if self.closing:
            raise Refused(503, self.closing, retry_after=5)
        if self.ready is None:
            raise Refused(503, "the engine is not ready: it is starting, or coming back; try again", retry_after=2)
        return self.ready

    def submit(self, orders: list[dict[str, Any]], *, patience: int, cut: Callable[[], None]) -> Job:
        """Ask for the choices of one request."""
        self.engine()
        job = Job(self, patience, cut)
        for choice, fields in enumerate(orders):
            name = f"{next(self._names):x}"
            job.ids[name] = choice
            self._jobs[name] = (job, choice)
            self._send("submit", id=name, **fields)
        return job

    def cancel(self, name: str) -> None:
        """The engine forgets a request, and so does this."""
        if (found := self._jobs.pop(name, None)) is not None:
            found[0].ids.pop(name, None)
            self._send("cancel", id=name)

    async def change(self, name: str, path: str | None) -> None:
        """Have the engine load an adapter, or unload it (`path` is None); an engine that comes back is told again."""
        self.engine()
        await self._call(name, path)
        self._changes[name] = path
        self.adapters = self._named(self.adapters, {name: path})

    def fail(self, message: str) -> None:
        """Nothing more is taken, and what is under way ends with this error."""
        self.closing = message
        self._drop(Refused(503, message))

    async def run(self) -> None:
        """Hold the connection, again and again, until cancelled."""
        wait = 0.05
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path, limit=LONGEST)
            except OSError:
                await asyncio.sleep(wait)
                wait = min(wait * 1.5, 1.0)
                continue
            wait = 0.05
            try:
                while line := await reader.readline():
                    self._hear(json.loads(line))
                    await asyncio.sleep(0)  # whoever waits for this may have something to say before the next
            except UserError:  # what is served cannot be: nothing to try again
                raise
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"trimtab: the engine's connection broke: {type(error).__name__}: {error}", file=sys.stderr)
            finally:
                self.ready, self.state = None, None
                self._writer.close()
                self._writer = None
                why = self.why or "the engine ended while this was under way"
                self._drop(Refused(503, f"{why}; try again", retry_after=2))

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["is"]
        if kind == "tokens":
            for name, token, logprob, top in message["of"]:
                if (found := self._jobs.get(name)) is not None:
                    found[0].put(Event("token", found[1], token, logprob, top))
        elif kind == "state":
            self.state = _made(State, message)
        elif kind == "ready":
            self._begin(_made(Ready, message))
        elif kind in ("done", "refused") and message["id"] in self._calls:
            call = self._calls.pop(message["id"])
            if not call.done():
                call.set_result(None) if kind == "done" else call.set_exception(_refusal(message))
        elif (found := self._jobs.get(message.get("id", ""))) is not None:
            job, choice = found
            if kind == "prompt":
                job.put(Event("prompt", choice, logprob=message["logprobs"], top=message["top"]))
            elif kind in ("end", "refused"):
                del self._jobs[message["id"]], job.ids[message["id"]]
                job.put(Event("end", choice, reason=message["reason"]) if kind == "end" else _refusal(message))

    def _begin(self, ready: Ready) -> None:
        self.why = ""
        self._told(ready)
        again = {name: path for name, path in self._changes.items() if (name in ready.adapters) == (path is None)}
        for name, path in again.items():
            self._order(f"again-{name}", name, path)
        self.ready, self.adapters = ready, self._named(ready.adapters, again)

    @staticmethod
    def _named(adapters: tuple[str, ...], changes: dict[str, str | None]) -> tuple[str, ...]:
        kept = [name for name in adapters if name not in changes]
        return (*kept, *(name for name, path in changes.items() if path is not None))

    async def _call(self, name: str, path: str | None) -> None:
        call = self._calls[key := f"c{next(self._names):x}"] = asyncio.get_running_loop().create_future()
        self._order(key, name, path)
        try:
            await asyncio.wait_for(call, PATIENCE)
        except TimeoutError:
            raise Refused(503, f"the engine did not answer within {PATIENCE:.0f} seconds") from None
        finally:
            self._calls.pop(key, None)

    def _order(self, key: str, name: str, path: str | None) -> None:
        if path is None:
            self._send("unload", id=key, name=name)
        else:
            self._send("load", id=key, name=name, path=path)

    def _drop(self, why: Refused) -> None:
        for name, (job, _) in list(self._jobs.items()):
            if self._writer is not None:
                self._send("cancel", id=name)
            job.ids.pop(name, None)
            job.put(why)
        self._jobs.clear()
        for call in self._calls.values():
            if not call.done():
                call.set_exception(why)
        self._calls.clear()

    def _send(self, what: str, **fields: Any) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(order(what, **fields))


def _refusal(message: dict[str, Any]) -> Refused:
    return Refused(message["status"], message["message"], retry_after=message.get("retry_after"))


def _made(kind: type[Any], message: dict[str, Any]) -> Any:
    """A `Ready` or `State` of a message, its lists as tuples."""
    pairs = ((name, message[name]) for name in kind.__dataclass_fields__)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in pairs})
