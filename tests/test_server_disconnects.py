"""Clients that go away at any moment leave nothing behind in the loop that serves."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_serving import PLACES, Bench, Order, written
from test_session import compiled

MANY = 100


@compiled
@pytest.mark.parametrize("cache", ["fp32", "kivi4"])
def test_those_who_go_away_leave_no_page_and_no_work(cache: str) -> None:
    bench, rng = Bench(cache=cache), random.Random(0)
    service = bench.service("s-lora")
    steps: list[Any] = []
    for name in ("advance", "outputs"):
        given = getattr(service.writer, name)
        setattr(service.writer, name, lambda *args, given=given: (steps.append(args), given(*args))[1])
    books, gone, when = service.books, 0, {"waiting": 0, "reading": 0, "writing": 0}
    steady = Order([5, 6, 7], 12)
    alone = bench.alone(steady)
    while gone < MANY:
        events = []
        staying = service.submit(steady)
        leaving = [
            service.submit(Order([rng.randrange(99) for _ in range(rng.randrange(1, 60))], 30, adapter, echo=i == 0))
            for i, adapter in enumerate(rng.choices([None, *bench.held], k=2 * PLACES))
        ]
        while leaving:
            for _ in range(rng.randrange(3)):
                events += service.tick()
            number = leaving.pop(rng.randrange(len(leaving)))
            if number in service.open:
                book = service.open[number]
                when["waiting" if book.place < 0 else "reading" if book.next < 0 else "writing"] += 1
                service.cancel(number)
                gone += 1
                assert service.taken == sum(books.pages.of(r.done) for r in books.running.values()) + sum(
                    held.nbytes for held in books.resident.values()
                )
        while staying in service.open:
            events += service.tick()
        assert written(events)[staying] == alone
        steps.clear()
        assert service.tick() == [] == service.tick() and not steps  # nobody is there: no step is done for anybody
        assert not books.running and not books.waiting and sorted(service.places) == list(range(PLACES))
        assert not any(held.users for held in books.resident.values())
        assert books.view.free == books.pool - sum(held.nbytes for held in books.resident.values())
    assert min(when.values()) > MANY // 20, when
