"""Who can be admitted, in order of arrival, and which adapters have to come and go for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from trimtab.core.traffic import Decision, View, Waiting


@dataclass
class Door:
    """What is left of the memory and the places of a tick, as requests are let in.

    Fields:
        admit, evict, load: see `core.traffic.Decision`.
        free: bytes that nobody needs.
        places: requests that can still begin.
    """

    view: View
    free: int = 0
    places: int = 0
    admit: list[Waiting] = field(default_factory=list)
    evict: list[str] = field(default_factory=list)
    load: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free, self.places = self.view.free, self.view.places - len(self.view.running)

    def let_in(self, waiting: Iterable[Waiting]) -> None:
        """Admit in this order, each with the memory of its full length, and stop at the first that does not fit: no one
        who comes later takes what it waits for. One whose adapter is on its way keeps its memory, and others may pass.
        """
        wanted = [request for request in waiting][: max(0, self.places)]
        named = {request.adapter for request in wanted}
        for request in wanted:
            need = self.view.pages.of(request.limit)
            if not self._bring(request.adapter, need, named):
                return
            self.free -= need
            if request.adapter is None or (request.adapter in self.view.resident and request.adapter not in self.evict):
                self.admit.append(request)
                self.places -= 1

    def fetch(self, waiting: Iterable[Waiting]) -> None:
        """Load adapters of requests that cannot begin yet, as far as there is memory that nobody needs."""
        for request in waiting:
            name = request.adapter
            if name is not None and self._missing(name) and self.view.known[name] <= self.free:
                self.load.append(name)
                self.free -= self.view.known[name]

    def decision(self, most: int | None = None) -> Decision:
        """The tick: who was let in, and the rows of the step shared out to prompts end to end, those that began first
        before the others; the last one may get a part.

        Args:
            most: prompts of a step, at most.

        >>> from trimtab.core.traffic import Pages
        >>> door = Door(View(0, 100, 4, 1 << 20, Pages(64, 1000)))
        >>> door.let_in([Waiting(0, 30, 40, None, 0), Waiting(1, 90, 95, None, 0)])
        >>> door.decision().rows
        {0: 30, 1: 70}
        """
        unread = [(r.id, r.unread) for r in self.view.running if r.unread] + [(w.id, w.prompt) for w in self.admit]
        left = self.view.rows - sum(not r.unread for r in self.view.running)
        rows: dict[int, int] = {}
        for number, count in unread[:most]:
            if left <= 0:
                break
            rows[number] = min(count, left)
            left -= rows[number]
        return Decision(tuple(w.id for w in self.admit), tuple(self.evict), tuple(self.load), rows)

    def _missing(self, name: str) -> bool:
        there = name in self.view.resident and name not in self.evict
        return not (there or name in self.view.loading or name in self.load)

    def _bring(self, name: str | None, need: int, named: set[str | None]) -> bool:
        """Make room for an adapter and a text; of adapters that nobody uses or waits for, the one used longest ago goes
        first. Whether there is room.
        """
        size = self.view.known[name] if name is not None and self._missing(name) else 0
        idle = [
            (held.used, other, held.nbytes)
            for other, held in self.view.resident.items()
            if not held.users and other not in named and other not in self.evict
        ]
        gone = []
        for _, other, nbytes in sorted(idle):
            if self.free >= need + size:
                break
            gone.append(other)
            self.free += nbytes
        if self.free < need + size:
            self.free -= sum(self.view.resident[other].nbytes for other in gone)
            return False
        self.evict += gone
        if size and name is not None:
            self.load.append(name)
            self.free -= size
        return True
