"""Flover: admission at every token, beside batches that begin and end together."""

from __future__ import annotations

import statistics
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Scheduler
from trimtab.serve.flover import Flover
from trimtab.serve.static_batching import StaticBatching
from trimtab.tasks.counter import Counter
from trimtab.tasks.traffic import Outcome, calls, serve

REQUESTS = 60

CLAIM = Claim(
    method="flover",
    statement="Requests that join the others at the next token wait less and are answered faster together than in "
    "batches that begin and end together, with the same tokens.",
    source="Yao et al. 2023, arXiv:2305.13484, abstract and section 6",
    figure="on GPT-J up to 3.5 times the speed of FasterTransformer with constant gaps between requests, and 2 and "
    "more with random ones",
    setting="A Llama of 27 million random weights at 4b/g32; 60 requests, prompts of 8 to 128 tokens, texts of 8 to "
    "64, 8 at once; all at the start for the throughput, and for the latency with gaps from a Gamma distribution of "
    "twice the mean's deviation, at 0.7 of the requests a second that the throughput allows. One thread.",
    metric="tokens a second; seconds from a request to its last token, mean; share of requests with the same tokens",
    checks=(
        Check("twice the throughput of one at a time", "flover", ">=", "in_turn_2"),
        Check("a higher throughput than batches", "flover", ">", "static"),
        Check("a lower latency", "flover_latency", "<", "static_latency"),
        Check("half the time to the first token", "flover_first", "<=", "half_static_first"),
        Check("the same tokens", "same", ">=", 1.0),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of requests."""
    counter = Counter(seed=seed, threads=1)
    pool = 8 * counter.pages.of(192)

    def tried(policy: Scheduler, rate: float = float("inf"), places: int = 8) -> Outcome:
        asked = calls(REQUESTS, seed=seed, rate=rate, cv=2.0)
        return serve(counter.service(policy, pool, places=places), asked)

    tried(Flover())
    ours, theirs, turn = tried(Flover()), tried(StaticBatching()), tried(StaticBatching(), places=1)
    rate = 0.7 * REQUESTS / ours.seconds
    slow, late = tried(Flover(), rate), tried(StaticBatching(), rate)
    return {
        "flover": ours.rate,
        "static": theirs.rate,
        "in_turn_2": 2 * turn.rate,
        "flover_latency": statistics.mean(slow.whole.values()),
        "static_latency": statistics.mean(late.whole.values()),
        "flover_first": statistics.mean(slow.first.values()),
        "half_static_first": statistics.mean(late.first.values()) / 2,
        "same": float(ours.tokens == theirs.tokens == turn.tokens and slow.tokens == late.tokens),
    }
