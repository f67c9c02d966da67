"""The process that runs the model: takes orders from a local socket, and says what came of them.

    python -m trimtab.server.worker MODEL --socket PATH [--adapters FOLDER] [--memory BYTES] ...

It exits with 2 and one sentence where it cannot begin, and with 0 once it was told to drain and is done.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.traffic import Pages
from trimtab.server import wire

STATE = 0.25  # seconds from one `state` to the next
BEHIND = 1 << 16  # messages that may wait for a reader before its connection is closed
SPARE = 0.03  # of the memory, for what a process of Python needs as it runs
LEAST = 256  # tokens that the pool must have room for
USUAL = 4096  # of context, where the model can do more and nobody says


def main(args: list[str] | None = None) -> None:
    """Serve until told to drain."""
    try:
        options = arguments().parse_args(args)
        Worker(options).run()
    except UserError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def arguments() -> argparse.ArgumentParser:
    """What it takes."""
    parser = argparse.ArgumentParser(prog="trimtab.server.worker")
    parser.add_argument("model")
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--adapters", type=Path)
    parser.add_argument("--memory", type=int, help="bytes of this process")
    parser.add_argument("--context", type=int)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--queue", type=int, default=256)
    parser.add_argument("--cache", default="fp16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--policy", default="s-lora")
    parser.add_argument("--draft", help="a smaller model with the same tokenizer, which writes ahead")
    parser.add_argument("--draft-tokens", type=int, help="so many at a time; as the acceptance rate has it by default")
    parser.add_argument("--force", action="store_true")
    return parser


class Line:
    """A connection, written to by a thread of its own, so that a slow reader stops nobody."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.ids: dict[str, int] = {}
        self.requests: dict[int, str] = {}
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()

    def say(self, kind: str, **fields: Any) -> None:
        """Send a message, at some time."""
        if self._out.qsize() > BEHIND:
            self.close()
        self._out.put(wire.line(kind, **fields))

    def finish(self) -> None:
        """Close it once all is written."""
        self._out.put(None)

    def close(self) -> None:
        """Close it now."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _write(self) -> None:
        while (message := self._out.get()) is not None:
            try:
                self.connection.sendall(message)
            except OSError:
                return
        self.close()


class Worker:
    """The model, the service over it, and who is connected."""

    def __init__(self, options: argparse.Namespace) -> None:
        from trimtab.core.method import Drafter, Policy, Resident, Selector, method
        from trimtab.engine import memory
        from trimtab.engine.books import Books
        from trimtab.engine.serving import Service
        from trimtab.formats.cache import CacheFormat
        from trimtab.kernels.native import native
        from trimtab.loading import load
        from trimtab.models.adapter import check_base
        from trimtab.server.registry import Registry

        memory.keep_freed_memory(memory.FRUGAL)
        if options.threads is not None and (kernels := native()) is not None:
            kernels.set_threads(options.threads)
        policy = method(options.policy)
        if not isinstance(policy, Policy) or isinstance(policy, Drafter | Resident | Selector):
            raise UserError(f"{options.policy} is no policy of serving; `trimtab methods --family serve` lists those")
        if options.adapters is not None and not options.adapters.is_dir():
            raise UserError(f"{options.adapters} is no folder; name one that holds a folder for each adapter")
        loaded = load(options.model, packed=True, cache=options.cache)
        for note in loaded.notes:
            print(note, file=sys.stderr)
        if loaded.task != "causal-lm" or loaded.folder is None or not (loaded.folder / "tokenizer.json").is_file():
            raise UserError(
                f"{options.model} is for {loaded.task} or has no tokenizer.json; a server needs a causal language "
                "model with one"
            )
        runtime = loaded.opened()
        self.bank = runtime.bank()
        known = loaded.limit(options.context or USUAL)
        if options.context is not None and options.context > known:
            raise UserError(
                f"a context of {options.context} was asked for, and the model's is {known}; ask for no more"
            )
        self.context = min(known, options.context or USUAL)
        rows = max(128, 2 * options.users)
        sizes = {"sequences": options.users, "chunk": rows, "cache": options.cache, "bank": self.bank, "paged": True}
        if options.draft is not None:
            sizes["most"] = rows
        writer = runtime.open(self.context, **sizes)  # type: ignore[arg-type]
        form = CacheFormat.parse(options.cache)
        fits = (lambda folder: None) if options.force else (lambda folder: check_base(folder, loaded.hashes))
        self.registry = Registry(options.adapters, self.bank, fits)
        adapters = self.registry.sizes()
        for name, why in self.registry.broken.items():
            print(f"the adapter {name} cannot be used: {why}", file=sys.stderr)
        pages, self.vocabulary = _pages(runtime, loaded, form)
        ahead = None
        if options.draft is not None:
            ahead, pages = _ahead(options, loaded, pages, self.context, rows, self.vocabulary)
        elif options.draft_tokens is not None:
            raise UserError("--draft-tokens was given without --draft; name the model that writes them with --draft")
        _warm(writer, min(rows, self.context, form.window or rows))
        pool = _pool(options.memory, max(adapters.values(), default=0))
        least = pages.of(min(LEAST, self.context)) + max(adapters.values(), default=0)
        if pool < least:
            raise UserError(
                f"{_said(options.memory)} were given, and the model with {min(LEAST, self.context)} tokens and one "
                f"adapter needs {_said((options.memory or 0) - pool + least)}; give as much, or take a smaller artifact"
            )
        books = Books(policy, rows, options.users, pool, pages, form.window)
        self.service = Service(
            writer,
            books,
            self.registry,
            context=self.context,
            vocabulary=self.vocabulary,
            queue=options.queue,
            ahead=ahead,
        )
        for name, nbytes in adapters.items():
            self.service.know(name, nbytes)
        self.eos = _eos(loaded)
        self.line: Line | None = None
        self.inbox: queue.SimpleQueue[tuple[Line, dict[str, Any] | None]] = queue.SimpleQueue()
        self.draining, self.told, self.rate = False, 0.0, 0.0
        self.memory, self.model, self.folder = options.memory, str(options.model), loaded.folder
        self.engine = runtime.engine
        self.socket = options.socket

    def run(self) -> None:
        """Take orders and do steps."""
        early = self.socket.with_suffix(".early")
        early.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(early))
        listening.listen(1)
        os.chmod(early, 0o600)
        early.rename(self.socket)  # who sees it can connect
        threading.Thread(target=self._accept, args=(listening,), daemon=True).start()
        parent = os.getppid()
        while not (self.draining and self.service.idle):
            self._orders()
            if os.getppid() != parent:
                return  # whoever kept watch is gone
            self._tick()
        if self.line is not None:
            self._state()
            self.line.finish()
            time.sleep(0.2)

    def _tick(self) -> None:
        began, before = time.perf_counter(), self.service.tokens
        self._tell(self.service.tick())
        if (written := self.service.tokens - before) > 0:
            self.rate = 0.9 * self.rate + 0.1 * written / (time.perf_counter() - began)
        if time.monotonic() - self.told > STATE:
            self._state()

    def _orders(self) -> None:
        """Take what has come; where there is nothing to do, wait for it."""
        wait = 1.0 if self.service.idle else 0.0 if self.service.books.running else 0.002
        if wait == 1.0 and self.line is not None and self.told:
            self._state()
        try:
            item = self.inbox.get(timeout=wait) if wait else self.inbox.get_nowait()
            while True:
                line, message = item
                try:
                    self._order(line, message)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    print(f"an order that cannot be read: {type(error).__name__}: {error}", file=sys.stderr)
                    line.close()
                item = self.inbox.get_nowait()
        except queue.Empty:
            return

    def _order(self, line: Line, message: dict[str, Any] | None) -> None:
        if message is None:
            for number in list(line.requests):
                self.service.cancel(number)
            if self.line is line:
                self.line = None
            return
        what = message.get("do")
        if what == "hello":
            self.line = line
            line.say("ready", **wire.described(self._ready()))
        elif what == "submit":
            self._submit(line, message)
        elif what == "cancel":
            name = str(message.get("id"))
            if name in line.ids:
                number = line.ids.pop(name)
                self.service.cancel(number)
                del line.requests[number]
                line.say("end", id=name, reason="cancelled")
        elif what in ("load", "unload"):
            self._adapter(line, str(message.get("id")), what, str(message.get("name")))
        elif what == "drain":
            self.draining = True

    def _submit(self, line: Line, message: dict[str, Any]) -> None:
        from trimtab.engine.serving import Order, Refused

        name = str(message["id"])
        try:
            if self.draining:
                raise Refused(503, "the server is shutting down; ask another one")
            adapter = message.get("adapter")
            if adapter in self.registry.broken:
                raise Refused(422, f"the adapter {adapter} cannot be used: {self.registry.broken[adapter]}")
            stop = set(message.get("stop") or ()) | (set() if message.get("ignore_eos") else set(self.eos))
            order = Order(
                tuple(message["tokens"]),
                int(message["limit"]),
                adapter,
                frozenset(stop),
                float(message.get("temperature", 0.0)),
                float(message.get("top_p", 1.0)),
                message.get("seed"),
                message.get("logprobs"),
                bool(message.get("echo")),
            )
            number = self.service.submit(order, self._retry())
        except Refused as refused:
            line.say("refused", id=name, status=refused.status, message=str(refused), retry_after=refused.retry_after)
            return
        line.ids[name], line.requests[number] = number, name

    def _adapter(self, line: Line, name: str, what: str, adapter: str) -> None:
        known = adapter in self.service.books.known and adapter not in self.service.retired
        status, message = 0, ""
        if what == "unload" and known:
            self._tell(self.service.retire(adapter))
        elif what == "unload":
            status, message = 404, f"there is no adapter {adapter!r}"
        elif known:
            status, message = 400, f"the adapter {adapter} is there already; unload it first"
        elif adapter not in self.registry.scan():
            status, message = 404, f"there is no adapter {adapter!r} in the folder of adapters"
        elif (nbytes := self.registry.size(adapter)) is None:
            status, message = 422, f"the adapter {adapter} cannot be used: {self.registry.broken[adapter]}"
        else:
            self.service.know(adapter, nbytes)
        if status:
            line.say("refused", id=name, status=status, message=message, retry_after=None)
        else:
            line.say("done", id=name)

    def _tell(self, events: list[Any]) -> None:
        from trimtab.engine.serving import End, Prompt, Token

        line, tokens = self.line, []
        if line is None:
            return
        ends: list[tuple[str, End]] = []
        for event in events:
            name = line.requests.get(event.request)
            if name is None:
                continue
            if isinstance(event, Token):
                tokens.append([name, event.token, event.logprob, event.top])
            elif isinstance(event, Prompt):
                line.say("prompt", id=name, logprobs=event.logprobs, top=event.top)
            elif isinstance(event, End):
                del line.requests[event.request], line.ids[name]
                ends.append((name, event))
        if tokens:
            line.say("tokens", of=tokens)
        for name, end in ends:
            if end.refused is None:
                line.say("end", id=name, reason=end.reason)
            else:
                line.say("refused", id=name, status=end.refused.status, message=str(end.refused), retry_after=None)

    def _retry(self) -> float:
        """Seconds until about half of what is asked for is written."""
        books = self.service.books
        left = sum(r.limit - r.prompt for r in books.waiting.values())
        left += sum(r.limit - max(r.prompt, r.done) for r in books.running.values())
        return round(min(60.0, max(1.0, left / 2 / max(self.rate, 1.0))), 1)

    def _ready(self) -> wire.Ready:
        books = self.service.books
        known = tuple(name for name in books.known if name not in self.service.retired)
        return wire.Ready(
            model=self.model,
            folder=str(self.folder),
            context=self.context,
            vocabulary=self.vocabulary,
            eos=self.eos,
            places=books.places,
            cache_tokens=books.pool // books.pages.nbytes * books.pages.tokens,
            token_bytes=books.pages.nbytes / books.pages.tokens,
            adapter_bytes=max(books.known.values(), default=0),
            pool=books.pool,
            memory=self.memory,
            adapters=known,
            engine=self.engine,
        )

    def _state(self) -> None:
        from trimtab.engine.measure import held_bytes

        if self.line is None:
            return
        service, books = self.service, self.service.books
        state = wire.State(
            tick=books.tick,
            running=len(books.running),
            waiting=len(books.waiting),
            pool=books.pool,
            taken=service.taken,
            pages=sum(-(-request.done // books.pages.tokens) for request in books.running.values()),
            resident=tuple(books.resident),
            known=len(books.known),
            prompt_tokens=service.prompt_tokens,
            tokens=service.tokens,
            finished=dict(service.finished),
            loads=service.loads,
            evictions=service.evictions,
            rss=held_bytes(),
            drafted=service.ahead.tally.drafted if service.ahead else 0,
            accepted=service.ahead.tally.accepted if service.ahead else 0,
        )
        self.line.say("state", **wire.described(state))
        self.told = 0.0 if service.idle else time.monotonic()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            connection, _ = listening.accept()
            line = Line(connection)
            self.inbox.put((line, {"do": "hello"}))
            try:
                with connection.makefile("rb") as file:
                    while (raw := file.readline(wire.LONGEST)).endswith(b"\n"):
                        self.inbox.put((line, json.loads(raw)))
            except (OSError, ValueError):
                line.close()
            line.finish()
            self.inbox.put((line, None))


def _pages(runtime: Any, loaded: Any, form: Any) -> tuple[Pages, int]:
    """What a text takes, and how many tokens there are."""
    from trimtab.formats.cache import BLOCK, PADDING, CacheFormat

    if runtime.form is not None:
        vocabulary = runtime.form.vocabulary
        if not form.window:
            return Pages(BLOCK, runtime.form.cache_bytes(BLOCK, 1, form)), vocabulary
        fixed = runtime.form.cache_bytes(form.window, 1, form)
        more = runtime.form.cache_bytes(2 * form.window, 1, form) - fixed
        return Pages(form.window, more, fixed), vocabulary
    config = loaded.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = CacheFormat("fp32").bytes(heads, -(-size // PADDING) * PADDING, BLOCK)
    return Pages(BLOCK, config.num_hidden_layers * layer), config.vocab_size


def _ahead(
    options: argparse.Namespace, loaded: Any, pages: Pages, context: int, rows: int, vocabulary: int
) -> tuple[Any, Pages]:
    """The draft, and pages that hold its cache as well."""
    from trimtab.engine.speculation import Speculation, check_vocabulary, relative_cost
    from trimtab.formats.cache import CacheFormat
    from trimtab.loading import drafter, load

    draft = load(options.draft, packed=True)
    if draft.task != "causal-lm" or draft.tokenizer is None:
        raise UserError(f"{options.draft} is for {draft.task} or has no tokenizer; a draft is a causal language model")
    check_vocabulary(draft.tokenizer.get_vocab(), loaded.tokenizer.get_vocab(), options.draft)
    count = options.draft_tokens
    if count is not None and count < 1:
        raise UserError(f"--draft-tokens {count} was given; give 1 or more")
    runtime = draft.opened()
    writer = runtime.open(min(context, draft.limit(context)), sequences=options.users, chunk=rows, paged=True)
    _warm(writer, min(rows, writer.context))
    theirs, _ = _pages(runtime, draft, CacheFormat())
    more = -(-pages.tokens // theirs.tokens) * theirs.nbytes
    cost = relative_cost(runtime, loaded.opened())
    return Speculation(writer, drafter(count), vocabulary=vocabulary, cost=cost), Pages(
        pages.tokens, pages.nbytes + more, pages.fixed + (more if pages.fixed else 0)
    )


def _warm(writer: Any, rows: int) -> None:
    """One step as large as there are: what it needs is then taken, and counted."""
    writer.advance({0: [0] * rows})
    writer.forget(0)


def _pool(memory: int | None, largest: int) -> int:
    """Bytes for texts and adapters: what the process does not hold already, less what it needs as it runs and as it
    brings an adapter in, whose factors are then there as they are stored and as they will be held.
    """
    from trimtab.engine.measure import held_bytes
    from trimtab.engine.memory import free_bytes, give_back_freed_memory

    give_back_freed_memory()
    held = held_bytes()
    whole = memory if memory is not None else held + int(0.8 * (free_bytes() or 1 << 30))
    return whole - held - int(SPARE * whole) - 4 * largest


def _eos(loaded: Any) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        file = loaded.folder / name
        try:
            found = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}; write it again") from error
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def _said(count: int | None) -> str:
    from trimtab.engine.session import said_bytes

    return "all free memory" if count is None else said_bytes(count)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; whoever keeps watch says when to end
    main()
    sys.stderr.flush()
    os._exit(0)  # threads that wait for connections are not waited for
