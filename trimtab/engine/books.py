"""The books of a server: who waits, who runs, which adapters are in the pool. A policy decides, and the books hold it
to the memory that there is. They know no model, so that a trace can be gone through again without one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from trimtab.core.method import Scheduler
from trimtab.core.traffic import Decision, Pages, Resident, Running, View, Waiting


class Broken(Exception):
    """A policy decided what cannot be done."""


@dataclass(frozen=True)
class Happened:
    """What came from outside before a tick, and what the policy then decided.

    Fields:
        arrived: requests, as they were when they came.
        left: numbers of requests that ended or were given up.
        brought: adapters that are in the pool from now on, and those that could not be read.
        removed: adapters that are there no more.
        known: adapter -> bytes, of all that could be there.
        drafted: tokens that requests got in the tick before besides their next one, for a draft had them right.
    """

    tick: int
    arrived: tuple[Waiting, ...]
    left: tuple[int, ...]
    brought: tuple[tuple[str, bool], ...]
    removed: tuple[str, ...]
    known: Mapping[str, int]
    decision: Decision
    drafted: Mapping[int, int] = field(default_factory=dict)


@dataclass
class Books:
    """What a policy sees, kept up to date.

    Fields:
        policy: decides each tick.
        rows, places, pool, pages: see `core.traffic.View`.
        window: tokens that the cache packs together, across which no step goes; 0: none.
        trace: is told what happened at each tick; None: nobody is.
    """

    policy: Scheduler
    rows: int
    places: int
    pool: int
    pages: Pages
    window: int = 0
    trace: list[Happened] | None = None
    tick: int = 0
    waiting: dict[int, Waiting] = field(default_factory=dict)
    running: dict[int, Running] = field(default_factory=dict)
    resident: dict[str, Resident] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    _arrived: list[Waiting] = field(default_factory=list)
    _left: list[int] = field(default_factory=list)
    _brought: list[tuple[str, bool]] = field(default_factory=list)
    _removed: list[str] = field(default_factory=list)
    _drafted: dict[int, int] = field(default_factory=dict)
    _next: int = 0

    def arrive(self, prompt: int, limit: int, adapter: str | None = None) -> int:
        """A request comes; its number."""
        request = Waiting(self._next, prompt, limit, adapter, self.tick)
        self.waiting[request.id] = request
        self._arrived.append(request)
        self._next += 1
        return request.id

    def leave(self, number: int) -> None:
        """A request has ended, or is given up."""
        if self.waiting.pop(number, None) is None:
            gone = self.running.pop(number)
            if gone.adapter is not None:
                held = self.resident[gone.adapter]
                self.resident[gone.adapter] = replace(held, users=held.users - 1, used=self.tick)
        self._left.append(number)

    def brought(self, name: str, sound: bool) -> None:
        """An adapter that was loading is in the pool, or could not be read."""
        self.loading.discard(name)
        if sound:
            self.resident[name] = Resident(self.known[name], 0, self.tick)
        self._brought.append((name, sound))

    def remove(self, name: str) -> None:
        """An adapter that no one uses or waits for is there no more."""
        self.resident.pop(name, None)
        self.known.pop(name, None)
        self._removed.append(name)

    @property
    def view(self) -> View:
        """What the policy sees now."""
        return View(
            self.tick,
            self.rows,
            self.places,
            self.pool,
            self.pages,
            tuple(self.waiting.values()),
            tuple(self.running.values()),
            dict(self.resident),
            dict(self.known),
            frozenset(self.loading),
        )

    def decide(self) -> Decision:
        """Ask the policy, and enter what it decided.

        Raises:
            Broken: the decision needs more memory, places or rows than there are, or names what is not there.
        """
        view = self.view
        decision = self.policy.decide(view)
        self._enter(decision)
        if self.trace is not None:
            arrived, left, brought = tuple(self._arrived), tuple(self._left), tuple(self._brought)
            outside = (arrived, left, brought, tuple(self._removed), view.known)
            self.trace.append(Happened(self.tick, *outside, decision, self._drafted))
        self._drafted = {}
        self._arrived, self._left, self._brought, self._removed = [], [], [], []
        return decision

    def accept(self, drafted: Mapping[int, int]) -> None:
        """A draft had so many tokens right that requests wrote, besides those that every step takes."""
        self._drafted = {number: count for number, count in drafted.items() if count}
        for number, count in self._drafted.items():
            request = self.running[number]
            self.running[number] = replace(request, done=request.done + count)

    def advance(self, taken: Mapping[int, int]) -> None:
        """A step has taken so many tokens of each of these requests."""
        for number, count in taken.items():
            request = self.running[number]
            self.running[number] = replace(request, done=request.done + count)
            if request.adapter is not None:
                self.resident[request.adapter] = replace(self.resident[request.adapter], used=self.tick)
        self.tick += 1

    def step(self, decision: Decision) -> dict[int, int]:
        """Tokens of each request that the step takes: of prompts as decided, up to the end of a window, and the next
        one of all whose prompt is read.
        """
        counts = {}
        for number, request in self.running.items():
            if not request.unread:
                counts[number] = 1
            elif number in decision.rows:
                left = self.window - request.done % self.window if self.window else request.unread
                counts[number] = min(left, decision.rows[number])
        return counts

    def _enter(self, decision: Decision) -> None:
        for name in decision.evict:
            if name not in self.resident or self.resident[name].users:
                raise Broken(f"the policy evicts the adapter {name}, which is in use or not there")
            del self.resident[name]
        for name in decision.load:
            if name in self.resident or name in self.loading or name not in self.known:
                raise Broken(f"the policy loads the adapter {name}, which is there or unknown")
            self.loading.add(name)
        for number in decision.admit:
            request = self.waiting.pop(number, None)
            if request is None:
                raise Broken(f"the policy admits the request {number}, which does not wait")
            if request.adapter is not None:
                held = self.resident.get(request.adapter)
                if held is None:
                    raise Broken(f"the policy admits the request {number}, whose adapter is not in the pool")
                self.resident[request.adapter] = replace(held, users=held.users + 1, used=self.tick)
            plain = (request.id, request.prompt, request.limit, request.adapter)
            self.running[number] = Running(*plain, done=0, since=self.tick)
        for number, count in decision.rows.items():
            if number not in self.running or not 0 < count <= self.running[number].unread:
                raise Broken(f"the policy reads {count} tokens of the prompt of the request {number}")
        taken = sum(decision.rows.values()) + sum(not request.unread for request in self.running.values())
        free = self.view.free
        if len(self.running) > self.places or taken > self.rows or free < 0:
            raise Broken(
                f"the policy needs {len(self.running)} places of {self.places}, {taken} rows of {self.rows}, "
                f"and {max(0, -free)} bytes more than there are"
            )


def replay(trace: Iterable[Happened], books: Books) -> list[Decision]:
    """Go through a trace with other books: what their policy decides where the same things happen at the same ticks.

    Where it decides otherwise than the trace has it, what ends or is brought before it began is left out.
    """
    decisions = []
    for happened in trace:
        books.known = dict(happened.known)
        books.accept({number: n for number, n in happened.drafted.items() if number in books.running})
        for name, sound in happened.brought:
            if name in books.loading:
                books.brought(name, sound)
        for request in happened.arrived:
            books.waiting[request.id] = request
        for number in happened.left:
            if number in books.waiting or number in books.running:
                books.leave(number)
        for name in happened.removed:
            books.resident.pop(name, None)
        books.tick = happened.tick
        decision = books.decide()
        decisions.append(decision)
        books.advance(books.step(decision))
    return decisions
