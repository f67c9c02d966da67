"""Requests served together, beside each of them alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapters import random_adapter
from test_session import BASE, compiled, make

from trimtab.core.method import Drafter, Policy, Resident, Selector, discover, method
from trimtab.core.traffic import Decision, Pages, View
from trimtab.engine.books import Books, Broken, replay
from trimtab.engine.drawing import draw
from trimtab.engine.measure import held_bytes
from trimtab.engine.serving import End, Event, Order, Prompt, Refused, Service, Token
from trimtab.engine.session import Runtime, generate
from trimtab.formats.peft import Adapter

POLICIES = sorted(
    name
    for name, cls in discover().items()
    if cls.__module__.startswith("trimtab.serve.") and not issubclass(cls, Drafter | Resident | Selector)
)
CONTEXT, ROWS, PLACES = 96, 16, 5


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Shelf:
    """Adapters that arrive a few ticks after they were asked for."""

    def __init__(self, bank: Any, held: dict[str, Adapter], ticks: int = 3) -> None:
        self.bank, self.held, self.ticks = bank, held, ticks
        self.coming: dict[str, int] = {}

    def start(self, name: str) -> None:
        self.coming[name] = self.ticks

    def finished(self) -> list[tuple[str, Any]]:
        self.coming = {name: left - 1 for name, left in self.coming.items()}
        done = [name for name, left in self.coming.items() if left <= 0]
        for name in done:
            del self.coming[name]
            self.bank.add(name, self.held[name])
        return [(name, None) for name in done]

    def drop(self, name: str) -> None:
        self.bank.remove(name)


class Bench:
    """A model, its adapters, and what each request gives alone."""

    def __init__(self, plain: bool = False, cache: str = "fp32") -> None:
        model = make("LlamaForCausalLM", BASE)
        self.runtime, self.cache = Runtime(model, plain=plain), cache
        self.held = {f"a{i}": random_adapter(model, 1 + 3 * i, i) for i in range(4)}
        self.pages = Pages(64, 1000)

    def alone(self, order: Order) -> list[int]:
        bank = self.runtime.bank()
        for name, adapter in self.held.items():
            bank.add(name, adapter)
        writer = self.runtime.open(CONTEXT, cache=self.cache, bank=bank)
        writer.use(0, order.adapter)
        return list(generate(writer, order.tokens, order.limit, temperature=order.temperature, seed=order.seed or 0))

    def service(self, policy: str, pool: int = 20_000, trace: list[Any] | None = None) -> Service:
        bank = self.runtime.bank()
        writer = self.runtime.open(CONTEXT, sequences=PLACES, chunk=ROWS, cache=self.cache, bank=bank, paged=True)
        books = Books(method(policy), ROWS, PLACES, pool, self.pages, trace=trace)
        made = Service(writer, books, Shelf(bank, self.held), context=CONTEXT, vocabulary=99, queue=50)
        for name in self.held:
            made.know(name, 3000)
        return made


def orders(count: int, seed: int = 0) -> list[Order]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        tokens = rng.integers(99, size=rng.integers(1, 40)).tolist()
        adapter = None if i % 3 == 0 else f"a{i % 4}"
        made.append(Order(tokens, int(rng.integers(1, 30)), adapter, temperature=float(i % 2), seed=i))
    return made


def written(events: list[Event]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event, Token):
            found.setdefault(event.request, []).append(event.token)
    return found


def run(service: Service, most: int = 5000) -> list[Event]:
    events: list[Event] = []
    for _ in range(most):
        if service.idle:
            return events
        events += service.tick()
    raise AssertionError(f"{len(service.open)} requests are not done after {most} ticks")


@compiled
@pytest.mark.parametrize("policy", POLICIES)
def test_together_each_gets_what_it_gets_alone(policy: str) -> None:
    bench, trace = Bench(), []
    service, asked = bench.service(policy, trace=trace), orders(14)
    numbers = [service.submit(order) for order in asked[:9]]
    events = [event for _ in range(7) for event in service.tick()]
    numbers += [service.submit(order) for order in asked[9:]]
    events += run(service)
    found = written(events)
    assert [found[number] for number in numbers] == [bench.alone(order) for order in asked]
    assert sorted(event.request for event in events if isinstance(event, End)) == sorted(numbers)
    assert sorted(service.places) == list(range(PLACES)) and not service.books.running
    books = service.books
    again = Books(method(policy), ROWS, PLACES, books.pool, books.pages)
    assert replay(trace, again) == [happened.decision for happened in trace]
    other = Books(
        method("static-batching" if policy != "static-batching" else "s-lora"), ROWS, PLACES, 20_000, books.pages
    )
    assert replay(trace, other) != [happened.decision for happened in trace]


def test_without_kernels_it_serves_the_same_way() -> None:
    bench = Bench(plain=True)
    service, asked = bench.service("s-lora"), orders(5)
    numbers = [service.submit(order) for order in asked]
    found = written(run(service))
    assert [found[number] for number in numbers] == [bench.alone(order) for order in asked]


@compiled
def test_packed_caches_are_cut_at_their_windows() -> None:
    bench = Bench(cache="kivi4/r64")
    service, asked = bench.service("s-lora"), orders(6, seed=4)
    service.books.window = 64
    asked = [Order([*order.tokens, *range(40)], 16) for order in asked]
    numbers = [service.submit(order) for order in asked]
    found = written(run(service))
    assert [found[number] for number in numbers] == [bench.alone(order) for order in asked]


@compiled
def test_who_is_given_up_leaves_the_others_as_they_were() -> None:
    bench, rng = Bench(), np.random.default_rng(3)
    service, asked = bench.service("s-lora"), orders(16, seed=1)
    numbers = [service.submit(order) for order in asked]
    events, gone = [], set()
    while not service.idle:
        events += service.tick()
        if rng.random() < 0.2 and (still := [n for n in numbers[::2] if n in service.open]):
            gone.add(still[0])
            service.cancel(still[0])
    found = written(events)
    kept = [(n, order) for n, order in zip(numbers, asked, strict=True) if n not in gone]
    assert len(gone) > 2 and all(found[n] == bench.alone(order) for n, order in kept)
    assert sorted(service.places) == list(range(PLACES)) and service.finished["cancelled"] == len(gone)
    assert all(held.users == 0 for held in service.books.resident.values())


@compiled
def test_an_adapter_comes_and_goes_under_load() -> None:
    bench = Bench()
    service, asked = bench.service("s-lora", pool=60_000), orders(8, seed=2)
    numbers = [service.submit(order) for order in asked]
    events = [event for _ in range(6) for event in service.tick()]
    running = {n for n, r in service.books.running.items() if r.adapter == "a1"}
    events += service.retire("a1")
    refused = {event.request for event in events if isinstance(event, End) and event.refused}
    with pytest.raises(Refused, match="no model 'a1'"):
        service.submit(Order([1], 1, "a1"))
    events += run(service)
    service.tick()
    assert "a1" not in service.books.known and "a1" not in service.books.resident
    found = written(events)
    for number, order in zip(numbers, asked, strict=True):
        if number not in refused:
            assert found[number] == bench.alone(order)
    assert running and not refused & running
    service.know("a1", 3000)
    number = service.submit(asked[1])
    assert written(run(service))[number] == bench.alone(asked[1])


@compiled
def test_a_prompts_own_log_probabilities() -> None:
    bench = Bench()
    service = bench.service("s-lora")
    tokens = list(range(40))
    number = service.submit(Order(tokens, 0, "a2", logprobs=3, echo=True))
    other = service.submit(Order([5, 6], 4))
    events = run(service)
    (heard,) = (event for event in events if isinstance(event, Prompt))
    bank = bench.runtime.bank()
    bank.add("a2", bench.held["a2"])
    writer = bench.runtime.open(CONTEXT, cache="fp32", bank=bank)
    writer.use(0, "a2")
    expected = torch.log_softmax(writer.outputs(tokens[:16]).double(), -1)
    assert heard.request == number and len(heard.logprobs) == 40 and heard.logprobs[0] is None
    assert np.allclose(np.array(heard.logprobs[1:17], float), [expected[i, i + 1] for i in range(16)], atol=1e-5)
    assert [token for token, _ in heard.top[4] or []] == expected[3].topk(3).indices.tolist()
    assert written(events) == {other: bench.alone(Order([5, 6], 4))}


@pytest.mark.parametrize(
    ("order", "status", "said"),
    [
        (Order([], 5), 400, "no tokens"),
        (Order([1] * 90, 10), 400, "the context is 96"),
        (Order([99], 5), 400, "vocabulary"),
        (Order([1], 5, "nobody"), 404, "'nobody'"),
        (Order([1] * 65, 5), 400, "the pool"),
    ],
)
def test_what_cannot_be_served_is_refused(order: Order, status: int, said: str) -> None:
    service = Bench(plain=True).service("s-lora", pool=1500)
    with pytest.raises(Refused, match=said) as caught:
        service.submit(order)
    assert caught.value.status == status


def test_a_full_queue_says_when_to_come_again() -> None:
    service = Bench(plain=True).service("s-lora")
    for _ in range(50):
        service.submit(Order([1], 1))
    with pytest.raises(Refused) as caught:
        service.submit(Order([1], 1), 7.0)
    assert (caught.value.status, caught.value.retry_after) == (429, 7.0)


class Greedy(Policy):
    """Lets everyone in, fit or not."""

    def decide(self, view: View, **extra: Any) -> Decision:
        return Decision(tuple(request.id for request in view.waiting))


def test_books_hold_a_policy_to_the_memory() -> None:
    books = Books(Greedy(), 8, 8, 2000, Pages(64, 1000))
    for _ in range(3):
        books.arrive(1, 10)
    with pytest.raises(Broken, match="1000 bytes more"):
        books.decide()


requests = st.tuples(st.integers(0, 30), st.integers(1, 60), st.integers(1, 30), st.sampled_from([None, "x", "y", "z"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, max_size=25), st.sampled_from(POLICIES), st.integers(1, 4), st.integers(5, 12))
def test_no_policy_starves_or_oversteps(trace: list[Any], policy: str, places: int, pool: int) -> None:
    told: list[Any] = []
    books = Books(method(policy), 8, places, pool * 1000, Pages(32, 1000), trace=told)
    books.known = {"x": 2000, "y": 1500, "z": 1000}
    trace = sorted(trace, key=lambda request: request[0])
    coming: dict[str, int] = {}
    for _ in range(4000):
        while trace and trace[0][0] <= books.tick:
            _, prompt, new, adapter = trace.pop(0)
            books.arrive(prompt, prompt + new, adapter)
        for name in [name for name, tick in coming.items() if tick <= books.tick]:
            books.brought(name, True)
            del coming[name]
        for number in [n for n, r in books.running.items() if r.done >= r.limit - 1 and not r.unread]:
            books.leave(number)
        if not (trace or books.waiting or books.running):
            break
        decision = books.decide()
        coming |= {name: books.tick + 2 for name in decision.load}
        books.advance(books.step(decision))
    assert not (trace or books.waiting or books.running)
    again = Books(method(policy), 8, places, pool * 1000, Pages(32, 1000))
    assert replay(told, again) == [happened.decision for happened in told]


@compiled
def test_memory_is_taken_token_by_token_and_given_back() -> None:
    model = make("LlamaForCausalLM", BASE | {"max_position_embeddings": 4096, "head_dim": 64, "num_key_value_heads": 4})
    writer: Any = Runtime(model).open(4096, sequences=64, chunk=128, cache="fp32", paged=True)
    whole = writer.program.cache_bytes
    assert whole >= 1 << 30
    writer.advance({0: [1] * 128})
    start, each = held_bytes(), whole // 64
    for sequence in range(4):
        writer.extend(sequence, [1] * (4096 - writer.lengths[sequence]))
    full = held_bytes() - start
    assert 3.9 * each < full < 4.3 * each
    for sequence in range(1, 4):
        writer.forget(sequence)
    writer.forget(0, 2048)
    assert 0.45 * each < held_bytes() - start < 0.8 * each
    last = writer.step({0: 7})[0].clone()
    writer.extend(1, [1] * 2048)
    assert torch.equal(writer.step({1: 7})[0], last)


def test_drawn_tokens_have_the_distribution_that_they_should() -> None:
    rng, logits = np.random.default_rng(0), np.log(np.array([0.5, 0.2, 0.2, 0.1]))
    for top_p, expected in ((1.0, [0.5, 0.2, 0.2, 0.1]), (0.6, [5 / 7, 2 / 7, 0, 0]), (0.3, [1, 0, 0, 0])):
        drawn = np.bincount([draw(logits, rng, 1.0, top_p) for _ in range(4000)], minlength=4)
        wanted = 4000 * np.array(expected)
        assert not drawn[wanted == 0].any()
        chi = ((drawn - wanted)[wanted > 0] ** 2 / wanted[wanted > 0]).sum()
        assert chi < 16.3  # 0.1 % of the time by chance, with three degrees of freedom
