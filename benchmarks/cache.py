"""How fast text is written after a long context, by how keys and values are stored.

A Llama of the shape that decode.py measures, with four of its sixteen blocks so that context counts, of random weights
packed at 4b/g32, reads contexts of random tokens and writes on: with a cache in fp16, kivi4 and kivi2, one step of each
in turns in one process. Figures are medians over single steps. A JSON line is printed and appended to
records/benchmarks/cache.jsonl.

    python benchmarks/cache.py             # five minutes, 3 GB of memory, 2 GB of disk
    python benchmarks/cache.py --small     # one block and short contexts, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import LARGE, bandwidth, kernels_on, rounded, write_model, write_packed

SIZES: dict[str, Any] = LARGE | {"num_hidden_layers": 4, "max_position_embeddings": 32768}
CACHES = ("fp16", "kivi4", "kivi2")
CONTEXTS, SMALL_CONTEXTS = (1024, 4096, 16384), (256, 512)
STEPS = 24


def measure(runtime: Any, contexts: tuple[int, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """For each context and cache: tokens a second, and seconds of attention and of the rest in a token."""
    writers = {name: runtime.open(max(contexts) + STEPS + 2, cache=name) for name in CACHES}
    tokens = torch.randint(1000, (max(contexts),), generator=torch.Generator().manual_seed(1)).tolist()
    found: dict[str, dict[str, dict[str, float]]] = {}
    done = 0
    for context in contexts:
        for writer in writers.values():
            writer.forget(0, done)
            writer.extend(0, tokens[done:context])
        done = context
        spent: dict[str, list[float]] = {name: [] for name in CACHES}
        attending: dict[str, list[float]] = {name: [] for name in CACHES}
        for step in range(STEPS):
            for name, writer in writers.items():
                program = writer.program
                before, program.timed = dict(program.profile())["attention"], True
                start = time.perf_counter()
                writer.step({0: tokens[step]})
                seconds = time.perf_counter() - start
                program.timed = False
                if step > 1:  # the first warm up
                    spent[name].append(seconds)
                    attending[name].append(dict(program.profile())["attention"] - before)
        found[str(context)] = {
            name: {
                "tokens_a_second": rounded(1 / statistics.median(spent[name])),
                "attention_seconds": rounded(statistics.median(attending[name])),
                "cache_bytes": runtime.form.cache_bytes(context + 1, 1, writers[name].cache),
            }
            for name in CACHES
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one block and short contexts; nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where the model lies and stays; a temporary folder otherwise")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark
    from trimtab.engine.session import Runtime
    from trimtab.loading import load

    kernels = kernels_on(asked.threads)
    load_at_start = os.getloadavg()[0]
    sizes = SIZES | {"num_hidden_layers": 1} if asked.small else SIZES
    with tempfile.TemporaryDirectory() as temporary:
        root = (asked.folder or Path(temporary)) / ("small" if asked.small else "large")
        if not (root / "packed").is_dir():
            (root / "plain").mkdir(parents=True)
            write_model(root / "plain", sizes)
            write_packed(root / "plain", root / "packed", "4b/g32")
        loaded = load(root / "packed", packed=True)
        runtime = Runtime(loaded.model, loaded.packed, share=True)
        reads = bandwidth(kernels)
        found = measure(runtime, SMALL_CONTEXTS if asked.small else CONTEXTS)
    row = {
        **{"benchmark": "cache", "sizes": sizes, "level": "4b/g32", "threads": asked.threads},
        **{"variant": kernels.__name__.rpartition("._")[2], "read_bytes_a_second": rounded(reads)},
        **{"contexts": found, "load_at_start": round(load_at_start, 1)},
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
