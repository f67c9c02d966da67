"""What a policy of serving sees and says: frozen snapshots of the requests, the adapters and the memory of one tick.

A tick is one step of the model. It takes the next token of every running request whose prompt is read, and parts of the
prompts of the others, in at most `rows` rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pages:
    """How the memory of a text grows: in whole pages.

    Fields:
        tokens: of a page.
        nbytes: of a page, over all layers.
        fixed: bytes of a text besides, however long it is.
    """

    tokens: int
    nbytes: int
    fixed: int = 0

    def of(self, tokens: int) -> int:
        """Bytes of a text of so many tokens.

        >>> Pages(64, 1000).of(65)
        2000
        """
        return self.fixed + -(-tokens // self.tokens) * self.nbytes


@dataclass(frozen=True)
class Waiting:
    """A request that is not yet admitted.

    Fields:
        id: its number, in the order of arrival.
        prompt: tokens of its prompt.
        limit: tokens of prompt and text together, at most.
        adapter: the one that it asks for, or None.
        since: tick of its arrival.
    """

    id: int
    prompt: int
    limit: int
    adapter: str | None
    since: int


@dataclass(frozen=True)
class Running:
    """A request that holds a place and memory.

    Fields:
        id, prompt, limit, adapter: as of `Waiting`.
        done: its tokens that the cache holds.
        since: tick of its admission.
    """

    id: int
    prompt: int
    limit: int
    adapter: str | None
    done: int
    since: int

    @property
    def unread(self) -> int:
        """Tokens of the prompt that no step has taken yet."""
        return max(0, self.prompt - self.done)


@dataclass(frozen=True)
class Resident:
    """An adapter in the pool.

    Fields:
        nbytes: what it takes there.
        users: running requests that use it.
        used: tick in which one last did.
    """

    nbytes: int
    users: int
    used: int


@dataclass(frozen=True)
class View:
    """One tick, before it is run.

    Fields:
        tick: its number.
        rows: tokens that a step takes at most.
        places: requests that can run at once.
        pool: bytes for texts and adapters together.
        pages: what a text takes of it.
        waiting, running: in the order of arrival and of admission.
        resident: adapters in the pool, by name.
        known: bytes of every adapter that could be there, by name.
        loading: adapters on their way from the disk into the pool, whose bytes are taken already.
    """

    tick: int
    rows: int
    places: int
    pool: int
    pages: Pages
    waiting: tuple[Waiting, ...] = ()
    running: tuple[Running, ...] = ()
    resident: Mapping[str, Resident] = field(default_factory=dict)
    known: Mapping[str, int] = field(default_factory=dict)
    loading: frozenset[str] = frozenset()

    @property
    def free(self) -> int:
        """Bytes of the pool that neither a running request at its full length nor an adapter may need."""
        texts = sum(self.pages.of(request.limit) for request in self.running)
        adapters = sum(a.nbytes for a in self.resident.values()) + sum(self.known[name] for name in self.loading)
        return self.pool - texts - adapters


@dataclass(frozen=True)
class Decision:
    """What a tick does.

    Fields:
        admit: numbers of waiting requests that run from now on.
        evict: adapters that leave the pool first; none that is used.
        load: adapters to be brought in.
        rows: number of a request -> tokens of its prompt that this step takes. The next tokens of requests that write
            are taken besides.
    """

    admit: tuple[int, ...] = ()
    evict: tuple[str, ...] = ()
    load: tuple[str, ...] = ()
    rows: Mapping[int, int] = field(default_factory=dict)
