"""S-LoRA: two hundred adapters on one base, beside one adapter, and beside one adapter at a time."""

from __future__ import annotations

import statistics
import time
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.serve.s_lora import SLoRA
from trimtab.tasks.counter import Counter
from trimtab.tasks.traffic import Outcome, calls, serve

ADAPTERS, REQUESTS, HELD = 200, 60, 24

CLAIM = Claim(
    method="s-lora",
    statement="Requests for many adapters are answered in one batch at nearly the throughput of requests for one, and "
    "several times as fast as by merging each adapter into the base in turn, with the same tokens.",
    source="Sheng et al. 2023, arXiv:2311.03285, abstract, sections 7.2 and 7.3",
    figure="up to 4 times the throughput of vLLM with naive support of LoRA, and up to 30 times that of PEFT, which "
    "merge and swap; with 2,000 adapters throughput stays nearly that of 5",
    setting="A Llama of 27 million random weights at 4b/g32, adapters of rank 8 on all linears; 60 requests at once "
    "for 200 adapters by a power law, prompts of 8 to 128 tokens, texts of 8 to 64; room for 24 adapters and for the "
    "texts of 8 requests. Naive: one adapter at a time, and for each change the time to add one to fp32 weights and to "
    "take it off, measured here; that its base would be dense, and slower, is not counted. One thread.",
    metric="tokens a second; share of requests that get the tokens that they get alone; bytes of the pool",
    checks=(
        Check("at least 90 % of one adapter's throughput", "many", ">=", "one_90"),
        Check("more than one adapter at a time without merging", "many", ">", "in_turn"),
        Check("4 times the naive way", "many", ">=", "naive_4"),
        Check("the tokens of each alone", "same", ">=", 1.0),
        Check("the pool is never exceeded", "taken", "<=", "pool"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of requests."""
    counter = Counter(seed=seed, threads=1)
    names = [f"adapter-{i}" for i in range(ADAPTERS)]
    pool = HELD * counter.adapter_bytes + 8 * counter.pages.of(192)

    def tried(policy: SLoRA, known: list[str]) -> Outcome:
        asked = calls(REQUESTS, adapters=known, seed=seed)
        return serve(counter.service(policy, pool, known), asked)

    tried(SLoRA(), names[:1])
    many, one, turn = tried(SLoRA(), names), tried(SLoRA(), names[:1]), tried(SLoRA(cluster=1), names)
    asked = calls(REQUESTS, adapters=names, seed=seed)
    switches = len({call.order.adapter for call in asked})
    naive = turn.seconds + 2 * switches * _merge_seconds(counter)
    checked = range(0, REQUESTS, 6)
    return {
        "many": many.rate,
        "one_90": 0.9 * one.rate,
        "in_turn": turn.rate,
        "naive_4": 4 * turn.rate * turn.seconds / naive,
        "same": statistics.mean(many.tokens[i] == counter.alone(asked[i].order) for i in checked),
        "taken": many.taken,
        "pool": pool,
        "adapters_asked_for": switches,
    }


def _merge_seconds(counter: Counter) -> float:
    import torch

    weights = {path: torch.zeros(size) for path, size in counter.sizes.items()}
    factors, spent = counter.adapter("merged").factors, []
    for _ in range(5):
        start = time.perf_counter()
        for path, (down, up) in factors.items():
            weights[path].addmm_(up, down)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)
