"""What the process of HTTP and the one of the model say to each other: a line of JSON each, over a local socket.

To the engine (`do`):

| message | fields |
|---|---|
| `submit` | `id`, and an order, see below |
| `cancel` | `id` |
| `load` | `id`, `name` of a folder in the folder of adapters: it may be asked for from now on |
| `unload` | `id`, `name` |
| `drain` | take nothing new; the connection is closed when all is written |

From the engine (`is`):

| message | fields |
|---|---|
| `ready` | once a connection, first: see `Ready` |
| `prompt` | `id`, `logprobs` of each token of the prompt, null for the first, `top` of each: pairs (token, logprob) |
| `tokens` | `of`: `[id, token, logprob, top]` of all that got a token in a tick; the last two null unless asked for |
| `end` | `id`, `reason`: `length`, `stop`, or `cancelled` |
| `refused` | `id`, `status` (of HTTP), `message`, `retry_after` (seconds, or null); nothing else comes of that id |
| `done` | `id`: of a `load` or an `unload` |
| `state` | numbers for people to graph, four times a second while there is work and once as it ends: see `State` |

An order has `tokens`, `limit` (new tokens), `adapter` (name or null), `temperature`, `top_p`, `seed` (or null), `stop`
(tokens that end the text, besides the model's own unless `ignore_eos`), `logprobs` (alternatives a token, or null), and
`echo` (those of the prompt as well). A `stop` token itself is sent in `tokens` before `end`. Ids are the sender's, and
are forgotten with the connection: what it asked for ends when it closes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

LONGEST = 16 << 20  # bytes of a line


@dataclass(frozen=True)
class Ready:
    """What the engine serves.

    Fields:
        model: its name.
        folder: where its tokenizer is.
        context: tokens of prompt and text together, at most.
        vocabulary: tokens that there are.
        eos: tokens that end a text.
        places: requests that run at once.
        cache_tokens: tokens that the pool holds if there is no adapter in it.
        token_bytes, adapter_bytes: of a token, and of the largest adapter.
        pool, memory: bytes for texts and adapters, and of the whole process, or None.
        adapters: names of those that may be asked for.
        engine: what runs it.
    """

    model: str
    folder: str
    context: int
    vocabulary: int
    eos: tuple[int, ...]
    places: int
    cache_tokens: int
    token_bytes: float
    adapter_bytes: int
    pool: int
    memory: int | None
    adapters: tuple[str, ...]
    engine: str


@dataclass(frozen=True)
class State:
    """What the engine does.

    Fields:
        tick: steps so far.
        running, waiting: requests.
        pool, taken: bytes of the pool, and those that texts and adapters hold now.
        pages: pages of tokens held.
        resident: adapters in the pool.
        known: adapters that may be asked for.
        prompt_tokens, tokens: read and written so far.
        finished: reason -> requests that ended so far.
        loads, evictions: of adapters so far.
        rss: bytes of the process.
        drafted, accepted: tokens that a draft proposed, and those of them that were written, so far.
        pieces, updates: of texts that the draft is still to learn from, and how often it got better weights.
        learns: whether it learns.
    """

    tick: int
    running: int
    waiting: int
    pool: int
    taken: int
    pages: int
    resident: tuple[str, ...]
    known: int
    prompt_tokens: int
    tokens: int
    finished: dict[str, int]
    loads: int
    evictions: int
    rss: int
    drafted: int = 0
    accepted: int = 0
    pieces: int = 0
    updates: int = 0
    learns: bool = False


def line(kind: str, **fields: Any) -> bytes:
    """A message of the engine.

    >>> line("end", id="a", reason="stop")
    b'{"is":"end","id":"a","reason":"stop"}\\n'
    """
    return _line({"is": kind, **fields})


def order(what: str, **fields: Any) -> bytes:
    """A message to the engine."""
    return _line({"do": what, **fields})


def described(of: Ready | State) -> dict[str, Any]:
    """Its fields, for `line`."""
    return asdict(of)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
