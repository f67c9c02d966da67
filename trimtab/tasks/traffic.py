"""Traffic of requests for adapters, and what serving it gave."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from trimtab.engine.measure import held_bytes
from trimtab.engine.serving import End, Order, Service, Token


@dataclass(frozen=True)
class Call:
    """A request that comes `at` seconds after the first."""

    at: float
    order: Order


def calls(
    count: int,
    *,
    adapters: Sequence[str] = (),
    rate: float = float("inf"),
    cv: float = 1.0,
    alpha: float = 1.0,
    prompt: tuple[int, int] = (8, 128),
    text: tuple[int, int] = (8, 64),
    vocabulary: int = 4096,
    seed: int = 0,
) -> list[Call]:
    """Requests as Sheng et al. 2023 (arXiv:2311.03285, section 7.1) draw them: gaps from a Gamma distribution, the i-th
    adapter asked for in proportion to i^-alpha, lengths uniform.

    Args:
        rate: requests a second; without an end they all come at once.
        cv: standard deviation of the gaps over their mean; above 1 they come in bursts.
        prompt, text: least and most tokens.

    >>> [round(call.at, 2) for call in calls(3, rate=2.0, seed=1)]
    [0.0, 0.15, 2.84]
    """
    rng = np.random.default_rng(seed)
    gaps = np.zeros(count) if rate == float("inf") else rng.gamma(1 / cv**2, cv**2 / rate, count)
    gaps[:1] = 0
    shares = np.arange(1, len(adapters) + 1, dtype=float) ** -alpha
    made = []
    for at in gaps.cumsum():
        tokens = rng.integers(vocabulary, size=rng.integers(prompt[0], prompt[1] + 1)).tolist()
        adapter = adapters[rng.choice(len(adapters), p=shares / shares.sum())] if len(adapters) else None
        made.append(Call(float(at), Order(tuple(tokens), int(rng.integers(text[0], text[1] + 1)), adapter)))
    return made


@dataclass
class Outcome:
    """What serving gave.

    Fields:
        seconds: from the first request to the last token.
        tokens: number of a call -> what was written for it.
        first, whole: number of a call -> seconds from its arrival to its first and its last token.
        steps: ticks that did a step.
        held: most bytes of the process, as far as was seen.
        taken: most bytes of the pool.
        refused: why calls were refused.
    """

    seconds: float = 0.0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)
    whole: dict[int, float] = field(default_factory=dict)
    steps: int = 0
    held: int = 0
    taken: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens written a second."""
        return sum(map(len, self.tokens.values())) / self.seconds


def serve(service: Service, asked: Sequence[Call], watch: int = 50) -> Outcome:
    """Let a service answer these calls, each at its time.

    Args:
        watch: ticks from one look at the process's memory to the next.
    """
    found, numbers, todo = Outcome(), dict[int, int](), list(enumerate(asked))
    start = time.perf_counter()
    while todo or not service.idle:
        now = time.perf_counter() - start
        while todo and todo[0][1].at <= now and len(service.books.waiting) < service.queue:
            i, call = todo.pop(0)
            numbers[service.submit(call.order)] = i
        before = service.books.tick
        events = service.tick()
        now = time.perf_counter() - start
        for event in events:
            i = numbers[event.request]
            if isinstance(event, Token):
                found.tokens.setdefault(i, []).append(event.token)
                found.first.setdefault(i, now - asked[i].at)
            elif isinstance(event, End):
                found.whole[i] = now - asked[i].at
                if event.refused is not None:
                    found.refused.append(str(event.refused))
        found.taken = max(found.taken, service.taken)
        found.steps += service.books.tick > before
        if service.books.tick % watch == 0:
            found.held = max(found.held, held_bytes())
        if not service.books.running:
            time.sleep(0.0005)
    found.seconds = time.perf_counter() - start
    return found
