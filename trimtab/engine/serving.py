"""The loop that serves: each tick a policy decides, the model takes one step, and every request gets its token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.traffic import Decision
from trimtab.engine.books import Books
from trimtab.engine.drawing import draw, log_probability
from trimtab.engine.session import Writer
from trimtab.engine.speculation import Speculation, Tally, Text


class Refused(UserError):
    """A request that cannot be taken, with the status that HTTP has for it.

    Attributes:
        retry_after: seconds after which it may be asked again; None: it will not be taken later either.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Order:
    """What is asked for.

    Fields:
        tokens: the prompt.
        limit: new tokens, at most; 0: none, for the prompt's own log-probabilities.
        adapter: the one to write through, or None.
        stop: tokens that end the text.
        temperature, top_p, seed: see `engine.drawing.draw`.
        logprobs: of how many of the likeliest tokens, besides the one taken; None: of none.
        echo: those of the prompt's tokens as well.
    """

    tokens: Sequence[int]
    limit: int
    adapter: str | None = None
    stop: frozenset[int] = frozenset()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False


Top = list[tuple[int, float]]


@dataclass(frozen=True)
class Token:
    """A request got a token, with its log-probability and the likeliest others where these are asked for."""

    request: int
    token: int
    logprob: float | None = None
    top: Top | None = None


@dataclass(frozen=True)
class Prompt:
    """Log-probabilities of a prompt's tokens, of which the first has none."""

    request: int
    logprobs: list[float | None]
    top: list[Top | None]


@dataclass(frozen=True)
class End:
    """A request has ended: by a `stop` token, at its `length`, or because something went wrong, then with what."""

    request: int
    reason: str
    refused: Refused | None = None


Event = Token | Prompt | End


class Fetcher(Protocol):
    """Brings adapters into the bank and takes them out, beside the loop."""

    def start(self, name: str) -> None:
        """Begin to bring one in."""

    def finished(self) -> list[tuple[str, UserError | None]]:
        """Those brought in since the last call, and why one could not be."""

    def drop(self, name: str) -> None:
        """Take one out that no one uses."""


@dataclass
class Book:
    """A request that is being answered.

    Fields:
        place: its sequence of the writer, once it runs.
        next: the token that its next step takes, once its prompt is read.
        text: all its tokens so far, prompt and written.
        written: tokens that it got.
        drafts: what a draft came to in it.
        heard: log-probabilities of its prompt so far, where it asks for them.
    """

    order: Order
    rng: np.random.Generator
    place: int = -1
    next: int = -1
    text: list[int] = field(default_factory=list)
    written: int = 0
    drafts: Tally = field(default_factory=Tally)
    heard: list[tuple[float | None, Top | None]] = field(default_factory=list)


class Service:
    """Requests, answered token by token.

    Args:
        writer: with a sequence for each of the books' places.
        books: with the policy.
        fetcher: of adapters; None: there are none.
        context: tokens of prompt and text together, at most.
        vocabulary: tokens that there are.
        queue: requests that may wait.
        ahead: a draft that writes ahead in ticks that read no prompt, through no adapter; None: there is none. The
            pages of the books are then those of both caches.
    """

    def __init__(
        self,
        writer: Writer,
        books: Books,
        fetcher: Fetcher | None = None,
        *,
        context: int,
        vocabulary: int,
        queue: int,
        ahead: Speculation | None = None,
    ) -> None:
        self.writer, self.books, self.fetcher = writer, books, fetcher
        self.context, self.vocabulary, self.queue, self.ahead = context, vocabulary, queue, ahead
        self.open: dict[int, Book] = {}
        self.places = list(range(books.places))
        self.retired: set[str] = set()
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = self.tokens = self.loads = self.evictions = 0

    def submit(self, order: Order, retry_after: float = 1.0) -> int:
        """Take a request in; its number.

        Raises:
            Refused: it is too long, names no adapter that there is, or too many wait.
        """
        self._check(order, retry_after)
        prompt = len(order.tokens)
        number = self.books.arrive(prompt, prompt + order.limit, order.adapter)
        self.open[number] = Book(order, np.random.default_rng(order.seed), text=list(order.tokens))
        return number

    def cancel(self, number: int) -> None:
        """Give a request up; its memory is free before the next tick."""
        if number in self.open:
            self._close(number, "cancelled")

    def know(self, name: str, nbytes: int) -> None:
        """From now on an adapter may be asked for."""
        self.retired.discard(name)
        self.books.known[name] = nbytes

    def retire(self, name: str) -> list[Event]:
        """From now on an adapter may not be asked for; who runs with it ends with it, who waits for it is refused."""
        self.retired.add(name)
        return self._refuse(name, Refused(404, f"the adapter {name} was unloaded"))

    def tick(self) -> list[Event]:
        """Do one step, if there is anything to do."""
        events: list[Event] = []
        self._bring(events)
        if not self.open:
            return events
        decision = self.books.decide()
        self._act(decision)
        counts = self.books.step(decision)
        if self.ahead is not None and counts and all(self.open[number].next >= 0 for number in counts):
            self._speculate(self.ahead, counts, events)
            return events
        pieces, aloud = {}, []
        for number, count in counts.items():
            book, done = self.open[number], self.books.running[number].done
            piece = [book.next] if book.next >= 0 else list(book.order.tokens[done : done + count])
            if book.order.echo and book.next < 0:
                aloud.append((number, done, piece))
            else:
                pieces[number] = piece
        last: dict[int, np.ndarray] = {}
        if pieces:
            logits = self.writer.advance({self.open[n].place: piece for n, piece in pieces.items()}).numpy()
            last.update(zip(pieces, logits, strict=True))
        self.books.advance(counts)
        for number in list(last):
            self._go_on(number, last[number], counts[number], events)
        for number, done, piece in aloud:
            self._go_on(number, self._hear(self.open[number], done, piece), len(piece), events)
        return events

    def _speculate(self, ahead: Speculation, counts: dict[int, int], events: list[Event]) -> None:
        texts = {}
        for number in counts:
            book, order = self.open[number], self.open[number].order
            left = order.limit - book.written
            texts[book.place] = Text(book.text, left, book.rng, order.temperature, order.top_p)
        went = ahead.step(self.writer, texts, self.books.rows - len(texts))
        self.books.advance(counts)
        self.books.accept({number: went[self.open[number].place].accepted for number in counts})
        for number in counts:
            book = self.open[number]
            mine = went[book.place]
            book.drafts.add(mine)
            for token, logits in zip(mine.tokens, mine.logits, strict=True):
                if number in self.open:
                    self._write(number, token, logits, events)

    @property
    def idle(self) -> bool:
        """Nothing is asked for."""
        return not self.open

    @property
    def taken(self) -> int:
        """Bytes of the pool that texts at their present length and adapters hold."""
        books = self.books
        texts = sum(books.pages.of(request.done) for request in books.running.values())
        return texts + sum(held.nbytes for held in books.resident.values())

    def _check(self, order: Order, retry_after: float) -> None:
        prompt, books = len(order.tokens), self.books
        if not prompt:
            raise Refused(400, "the prompt has no tokens; give at least one")
        if prompt + order.limit > self.context:
            raise Refused(
                400,
                f"the prompt has {prompt} tokens and {order.limit} more were asked for, and the context is "
                f"{self.context}; shorten either",
            )
        if not all(0 <= token < self.vocabulary for token in order.tokens):
            raise Refused(400, f"a token of the prompt is not among the {self.vocabulary} of the vocabulary")
        if order.adapter is not None and (order.adapter not in books.known or order.adapter in self.retired):
            raise Refused(404, f"there is no model {order.adapter!r}; /v1/models lists those that there are")
        adapter = 0 if order.adapter is None else books.known[order.adapter]
        if books.pages.of(prompt + order.limit) + adapter > books.pool:
            raise Refused(
                400,
                f"{prompt + order.limit} tokens and the adapter need more than the {books.pool} bytes of the pool; ask "
                "for fewer tokens",
            )
        if len(books.waiting) >= self.queue:
            raise Refused(429, f"{len(books.waiting)} requests wait already; try again later", retry_after)

    def _bring(self, events: list[Event]) -> None:
        for name, error in self.fetcher.finished() if self.fetcher else ():
            self.books.brought(name, error is None)
            self.loads += error is None
            if error is not None:
                events += self._refuse(name, Refused(422, f"the adapter {name} cannot be used: {error}"))
        for name in sorted(self.retired - self.books.loading):
            held = self.books.resident.get(name)
            if held is not None and held.users:
                continue
            if held is not None and self.fetcher is not None:
                self.fetcher.drop(name)
            self.books.remove(name)
            self.retired.discard(name)

    def _refuse(self, name: str, refused: Refused) -> list[Event]:
        waiting = [number for number, request in self.books.waiting.items() if request.adapter == name]
        for number in waiting:
            self._close(number, "error")
        return [End(number, "error", refused) for number in waiting]

    def _act(self, decision: Decision) -> None:
        for name in decision.evict:
            assert self.fetcher is not None
            self.fetcher.drop(name)
            self.evictions += 1
        for name in decision.load:
            assert self.fetcher is not None
            self.fetcher.start(name)
        for number in decision.admit:
            book = self.open[number]
            book.place = self.places.pop()
            self.writer.use(book.place, book.order.adapter)

    def _hear(self, book: Book, done: int, piece: list[int]) -> np.ndarray:
        """Read a part of a prompt, and keep what each of its tokens was worth; the logits after it."""
        order = book.order
        if not book.heard:
            book.heard.append((None, None))
        logits = self.writer.outputs(piece, book.place).numpy()
        for i, row in enumerate(logits):
            at = done + i + 1
            if at < len(order.tokens):
                book.heard.append(log_probability(row, order.tokens[at], order.logprobs or 0))
        return logits[-1]

    def _go_on(self, number: int, logits: np.ndarray, count: int, events: list[Event]) -> None:
        book, request = self.open[number], self.books.running[number]
        order = book.order
        if book.next < 0:
            self.prompt_tokens += count
            if request.unread:
                return
            if order.echo:
                events.append(Prompt(number, [value for value, _ in book.heard], [top for _, top in book.heard]))
            if not order.limit:
                self._close(number, "length")
                events.append(End(number, "length"))
                return
        self._write(number, draw(logits, book.rng, order.temperature, order.top_p), logits, events)

    def _write(self, number: int, token: int, logits: np.ndarray, events: list[Event]) -> None:
        book, order = self.open[number], self.open[number].order
        if order.logprobs is None:
            events.append(Token(number, token))
        else:
            events.append(Token(number, token, *log_probability(logits, token, order.logprobs)))
        book.next, book.written, self.tokens = token, book.written + 1, self.tokens + 1
        book.text.append(token)
        reason = "stop" if token in order.stop else "length" if book.written >= order.limit else ""
        if reason:
            self._close(number, reason)
            events.append(End(number, reason))

    def _close(self, number: int, reason: str) -> None:
        book = self.open.pop(number)
        if book.place >= 0:
            self.writer.forget(book.place)
            self.writer.use(book.place, None)
            if self.ahead is not None:
                self.ahead.forget(book.place, book.text)
            self.places.append(book.place)
        self.books.leave(number)
        self.finished[reason] += 1
