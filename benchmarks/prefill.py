"""What packing saves when prompts of mixed lengths are read: beside batches that are padded to their longest prompt.

A Llama of random weights, half the blocks of a model of 1.1 billion at 4b/g32, is served by the engine's own loop. All
prompts are there at once, and each writes one token. *Packed* is how the engine serves: a step is filled with parts of
whatever prompts there are. Padded batches of `--batch` prompts are read one after the other, each prompt as long as its
batch's longest: `padded` in the order of arrival, `sorted` by length, which is the best that padding can do. They go
through the same kernels and the same full steps, so that only what is read differs. `alone` reads one prompt at a time.
Lengths are log-normal around a median of 64 with a sigma of 1, cut at 1,024; the row says what was drawn.

The ways run in turns, the order turned round each time; ratios are medians over turns of seconds of the same turn. Some
texts are compared with those of prompts read alone. A JSON line is printed and appended to
records/benchmarks/prefill.jsonl.

    python benchmarks/prefill.py             # four minutes, 2 GB of memory, 2 GB of disk
    python benchmarks/prefill.py --small     # a narrow model, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import LARGE, kernels_on, rounded, write_model, write_packed

MEDIAN, SIGMA, LONGEST = 64, 1.0, 1024
NARROW: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 1000}
Prompts = list[list[int]]


def prompts_of(count: int, seed: int, vocabulary: int) -> Prompts:
    """Random tokens of log-normal lengths."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(np.log(MEDIAN), SIGMA, count)).round(), 1, LONGEST).astype(int)
    return [rng.integers(vocabulary, size=n).tolist() for n in lengths]


def padded(prompts: Prompts, batch: int) -> list[Prompts]:
    """Batches of prompts in this order, each as long as its batch's longest."""
    batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    return [[p + [0] * (max(map(len, some)) - len(p)) for p in some] for some in batches]


def ways(prompts: Prompts, batch: int) -> dict[str, list[Prompts]]:
    """How the prompts may be read: batches, of which each waits for the one before."""
    return {
        "packed": [prompts],
        "sorted": padded(sorted(prompts, key=len), batch),
        "padded": padded(prompts, batch),
        "alone": [[p] for p in prompts],
    }


def run(service: Any, batches: Sequence[Prompts]) -> tuple[float, list[int]]:
    """Seconds of the batches one after the other, and each prompt's token."""
    from trimtab.engine.serving import Order, Token

    found: dict[int, int] = {}
    start = time.perf_counter()
    for batch in batches:
        for prompt in batch:
            service.submit(Order(prompt, 1))
        while not service.idle:
            found.update({event.request: event.token for event in service.tick() if isinstance(event, Token)})
    return time.perf_counter() - start, [found[number] for number in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a narrow model and few prompts; nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where the model lies and stays; a temporary folder otherwise")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--blocks", type=int, default=8, help="of the model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="prompts that are padded together")
    parser.add_argument("--rows", type=int, default=256, help="tokens that a step takes")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark
    from trimtab.core.method import Scheduler, method
    from trimtab.core.traffic import Pages
    from trimtab.engine.books import Books
    from trimtab.engine.serving import Service
    from trimtab.engine.session import Runtime
    from trimtab.loading import load

    kernels = kernels_on(asked.threads)
    load_at_start = os.getloadavg()[0]
    sizes = LARGE | {"num_hidden_layers": asked.blocks} | (NARROW if asked.small else {})
    prompts = prompts_of(16 if asked.small else asked.requests, asked.seed, sizes["vocab_size"])
    lengths = [len(p) for p in prompts]
    with tempfile.TemporaryDirectory() as temporary:
        root = (asked.folder or Path(temporary)) / f"{sizes['hidden_size']}x{asked.blocks}"
        if not (root / "packed").is_dir():
            (root / "plain").mkdir(parents=True)
            write_model(root / "plain", sizes)
            write_packed(root / "plain", root / "packed", "4b/g32")
        loaded = load(root / "packed", packed=True)
        context, policy = LONGEST + 64, method("s-lora")
        assert isinstance(policy, Scheduler)
        runtime = Runtime(loaded.model, loaded.packed, share=True)
        writer = runtime.open(context, sequences=asked.batch, chunk=asked.rows, paged=True)
        books = Books(policy, asked.rows, asked.batch, context * asked.batch, Pages(64, 64))
        queue, vocabulary = len(prompts), sizes["vocab_size"]
        service = Service(writer, books, context=context, vocabulary=vocabulary, queue=queue)
        batches = ways(prompts, asked.batch)
        _, texts = run(service, batches["packed"])  # warms up
        alone = run(service, batches["alone"])[1]
        spent: dict[str, list[float]] = {name: [] for name in batches}
        for turn in range(asked.turns):
            for name in list(batches)[:: 1 if turn % 2 else -1]:
                spent[name].append(run(service, batches[name])[0])
                print(f"turn {turn}, {name}: {spent[name][-1]:.2f} s", file=sys.stderr, flush=True)
    tokens = {name: sum(len(p) for batch in some for p in batch) for name, some in batches.items()}
    row: dict[str, Any] = {
        **{"benchmark": "prefill", "sizes": sizes, "level": "4b/g32", "threads": asked.threads},
        **{"variant": kernels.__name__.rpartition("._")[2], "rows": asked.rows, "batch": asked.batch},
        **{"requests": len(prompts), "seed": asked.seed, "turns": asked.turns},
        "lengths": {
            **{"median": statistics.median(lengths), "mean": rounded(statistics.mean(lengths)), "max": max(lengths)},
            "p90": float(np.percentile(lengths, 90)),
        },
        "ways": {
            name: {
                **{"tokens": tokens[name], "seconds": rounded(statistics.median(spent[name]))},
                "tokens_over_packed": rounded(tokens[name] / tokens["packed"]),
                "seconds_over_packed": rounded(
                    statistics.median(a / b for a, b in zip(spent[name], spent["packed"], strict=True))
                ),
            }
            for name in batches
        },
        "texts_as_alone": sum(a == b for a, b in zip(texts, alone, strict=True)) / len(texts),
        "load_at_start": round(load_at_start, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
