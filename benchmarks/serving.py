"""Thousands of adapters on one compressed base: throughput beside one adapter, beside one at a time, and beside batches
that begin and end together.

A Llama of 1.1 billion random weights is packed at 4b/g32 and served within `--memory`, with 2,000 adapters of rank 8 on
the attention's linears registered, 200 of them asked for by a power law with Gamma arrivals (Sheng et al. 2023,
arXiv:2311.03285, section 7.1), faster than the machine can answer. The same arrivals, prompts and lengths go to one
adapter; to the 200 with one adapter in a batch at a time, which is what merging into the base amounts to, with and
without the time that adding one to the base's weights in bf16 and taking it off takes here; to none, and to none in
batches that begin and end together. The process's memory is looked at every 20 steps. Then adapters that nobody has
asked for yet get a request each, and so do adapters in the pool: `first_cold` and `first_warm` are medians of the
seconds to the first token, `read` of reading such an adapter's file. A JSON line is printed and appended to
records/benchmarks/serving.jsonl.

    python benchmarks/serving.py                       # ten minutes, 5 GB of memory, 5 GB of disk
    python benchmarks/serving.py --small               # two blocks, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import LARGE, SMALL, kernels_on, rounded, write_model, write_packed

REGISTERED, ACTIVE, RANK, ROLES = 2000, 200, 8, ("q_proj", "k_proj", "v_proj", "o_proj")


def write_adapters(folder: Path, sizes: dict[str, Any], registered: int = REGISTERED, active: int = ACTIVE) -> None:
    """The active adapters, and as many names for them as are registered."""
    from trimtab.formats.checkpoint import write_safetensors
    from trimtab.formats.peft import CONFIG, PREFIX, WEIGHTS

    width, head = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    narrow = head * sizes["num_key_value_heads"]
    outputs = dict(zip(ROLES, (width, narrow, narrow, width), strict=True))
    for i in range(registered):
        made = folder / f"adapter-{i:04}"
        made.mkdir(parents=True)
        (made / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
        if i >= active:
            os.link(folder / f"adapter-{i % active:04}" / WEIGHTS, made / WEIGHTS)
            continue
        rng, tensors = torch.Generator().manual_seed(i), {}
        for block in range(sizes["num_hidden_layers"]):
            for role, out in outputs.items():
                path = f"{PREFIX}model.layers.{block}.self_attn.{role}"
                tensors[f"{path}.lora_A.weight"] = (torch.randn(RANK, width, generator=rng) / width**0.5).half()
                tensors[f"{path}.lora_B.weight"] = (torch.randn(out, RANK, generator=rng) / 50).half()
        write_safetensors(tensors, made / WEIGHTS)


def merge_seconds(sizes: dict[str, Any]) -> float:
    """Median seconds to add an adapter to the weights in bf16."""
    width = sizes["hidden_size"]
    weights = [torch.zeros(width, width, dtype=torch.bfloat16) for _ in range(4 * sizes["num_hidden_layers"])]
    down, up = torch.randn(RANK, width).bfloat16(), torch.randn(width, RANK).bfloat16()
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        for weight in weights:
            weight.addmm_(up, down)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two blocks; nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where models and adapters lie and stay; a temporary one otherwise")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=int, default=2_500_000_000, help="bytes of the process")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark
    from trimtab.core.method import Scheduler, method
    from trimtab.engine.serving import Order, Service
    from trimtab.formats.peft import read_adapter
    from trimtab.models.pocket import POCKET
    from trimtab.server.worker import Worker, arguments
    from trimtab.tasks.traffic import Call, Outcome, calls, serve

    kernels = kernels_on(asked.threads)
    load, sizes = os.getloadavg()[0], SMALL if asked.small else LARGE
    with tempfile.TemporaryDirectory() as temporary:
        root = (asked.folder or Path(temporary)) / ("small" if asked.small else "large")
        plain, packed, adapters = root / "plain", root / "4b-g32", root / "adapters"
        if not packed.is_dir():
            plain.mkdir(parents=True, exist_ok=True)
            write_model(plain, sizes)
            write_packed(plain, packed, "4b/g32")
            shutil.copy(POCKET["pocket"] / "tokenizer.json", packed)  # a server needs one; no text is read here
        if not adapters.is_dir():
            write_adapters(adapters, sizes)
        names = [f"adapter-{i:04}" for i in range(ACTIVE)]
        common = {"rate": asked.rate, "seed": asked.seed, "vocabulary": 32000}

        def tried(policy: Scheduler, known: list[str], memory: int = asked.memory) -> tuple[Outcome, Service]:
            service.books.policy = policy
            for name in list(service.books.resident):
                service.fetcher.drop(name)  # type: ignore[union-attr]
                del service.books.resident[name]
            service.finished.clear()
            service.loads = service.evictions = 0
            trace = calls(asked.requests, adapters=names, **common)  # the same draws for all
            if not known:
                trace = [replace(call, order=replace(call.order, adapter=None)) for call in trace]
            elif len(known) == 1:
                trace = [replace(call, order=replace(call.order, adapter=known[0])) for call in trace]
            return serve(service, trace, watch=20), service

        line = [
            str(packed),
            "--socket",
            str(root / "unused"),
            "--adapters",
            str(adapters),
            "--memory",
            str(asked.memory),
        ]
        worker = Worker(arguments().parse_args([*line, "--users", "16", "--queue", "100000", "--context", "512"]))
        service = worker.service
        s_lora, in_turn, static = method("s-lora"), method("s-lora", cluster=1), method("static-batching")
        assert isinstance(s_lora, Scheduler) and isinstance(in_turn, Scheduler) and isinstance(static, Scheduler)
        found: dict[str, Any] = {"registered": len(service.books.known), "pool": service.books.pool}
        cases = {"many": (s_lora, names), "one": (s_lora, names[:1]), "none": (s_lora, []), "static": (static, [])}
        cases["in_turn"] = (in_turn, names)
        for name, (policy, known) in cases.items():
            outcome, _ = tried(policy, known)
            found[name] = {
                **{"tokens_a_second": rounded(outcome.rate), "seconds": rounded(outcome.seconds)},
                **{"first_median": rounded(statistics.median(outcome.first.values()))},
                **{"whole_median": rounded(statistics.median(outcome.whole.values()))},
                **{"loads": service.loads, "evictions": service.evictions, "memory": outcome.held},
                **{"refused": len(outcome.refused), "adapters": len({c for c in known})},
            }
            print(name, found[name], file=sys.stderr, flush=True)
        merging = merge_seconds(sizes)
        used = len({c.order.adapter for c in calls(asked.requests, adapters=names, **common)})
        tokens = found["in_turn"]["tokens_a_second"] * found["in_turn"]["seconds"]
        naive = tokens / (found["in_turn"]["seconds"] + 2 * merging * found["in_turn"]["loads"])

        def first(adapter: str) -> float:
            return serve(service, [Call(0.0, Order(tuple(range(64)), 1, adapter))]).first[0]

        cold = [first(f"adapter-{i:04}") for i in range(1000, 1012)]
        warm = [first(f"adapter-{i:04}") for i in range(1000, 1012)]
        reads = []
        for i in range(1000, 1012):
            start = time.perf_counter()
            read_adapter(adapters / f"adapter-{i:04}")
            reads.append(time.perf_counter() - start)
    row = {
        **{"benchmark": "serving", "sizes": sizes, "threads": asked.threads, "requests": asked.requests},
        **{"rate": asked.rate, "seed": asked.seed, "memory": asked.memory, "rank": RANK, "adapters_asked_for": used},
        **{"variant": kernels.__name__.rpartition("._")[2], **found, "merge_seconds": rounded(merging)},
        "many_over_one": rounded(found["many"]["tokens_a_second"] / found["one"]["tokens_a_second"]),
        "many_over_in_turn": rounded(found["many"]["tokens_a_second"] / found["in_turn"]["tokens_a_second"]),
        "many_over_naive": rounded(found["many"]["tokens_a_second"] / naive),
        "continuous_over_static": rounded(found["none"]["tokens_a_second"] / found["static"]["tokens_a_second"]),
        "within_memory": max(found[name]["memory"] for name in cases) <= asked.memory,
        **{"first_cold": rounded(statistics.median(cold)), "first_warm": rounded(statistics.median(warm))},
        **{"read": rounded(statistics.median(reads)), "load_at_start": round(load, 1)},
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
