"""What each method of caches keeps of a text, and how well the model reads on with it.

Quality, by default: the shipped language model reads texts of 448 tokens, within what it was trained on, in windows of
64. 32 tokens of another text are planted at token 64 and read again at the end; their first 4 say which they are.
Bytes are counted exactly; perplexity is of the text outside the two places, recall of the passage read again. The model
cannot answer a question, but it copies: the passage is the longest-range thing that it knows how to look up.

Speed, with --speed: a Llama of random weights reads 4,096 tokens on torch, in windows of 512, and writes on, one
step of each cache in turns.

A JSON line is printed and appended to records/benchmarks/caches.jsonl.

    python benchmarks/caches.py             # quality: five minutes on one thread
    python benchmarks/caches.py --speed     # five minutes; wants a machine that does nothing else
    python benchmarks/caches.py --small     # with either: to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import rounded

WINDOW, LENGTH, TEXTS, SPAN, AT, SAMPLE = 64, 448, 3, 32, 64, 16
SPEED = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
SPEED |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192}
CONTEXT, STEPS, WIDE = 4096, 12, 512
SEARCH = "top=4, beam=8, near=8, links=8, entries=4, sinks=4"


def caches(window: int) -> dict[str, str]:
    """Name -> cache, with windows of so many tokens."""
    return {
        "fp16": "fp16",
        "kivi, 4 bits": f"kivi(bits=4, residual={window})",
        "kivi, 2 bits": f"kivi(bits=2, residual={window})",
        "think, 40 %": f"think(prune=0.4, residual={window})",
        "xquant, 4 bits": f"xquant(bits=4, group=64, residual={window})",
        "xquant, 3 bits": f"xquant(bits=3, group=64, residual={window})",
        "xquant, 2 bits": f"xquant(bits=2, group=64, residual={window})",
        "xquant-cl, 3 bits": f"xquant-cl(bits=3, base=1, group=64, residual={window})",
        "xquant-cl, 2 bits": f"xquant-cl(bits=2, base=1, group=64, residual={window})",
        "cskv, half": f"cskv(keep=0.5, residual={window})",
        "cskv, a fifth": f"cskv(keep=0.2, residual={window})",
        "cskv, a fifth, 4 bits": f"cskv(keep=0.2, bits=4, residual={window})",
        "sirllm, 64 tokens": f"sirllm(memory=60, residual={window})",
        "newest 64 tokens": f"sirllm(memory=0, recent=60, residual={window})",
        "retrievalattention": f"retrievalattention({SEARCH}, residual={window})",
    }


def quality(seeds: tuple[int, ...], texts: int) -> dict[str, dict[str, float]]:
    """For each cache: bytes, perplexity and recall, and their differences to fp16 with 95 % intervals over seeds."""
    from trimtab.core.claim import Check, judge
    from trimtab.engine.session import map_of
    from trimtab.models.source import open_source
    from trimtab.tasks.build import task_for
    from trimtab.tasks.reading import caching, perplexity, read, read_again, recalled

    source = open_source("pocket-lm")
    model, task = source.materialise(), task_for(source, length=LENGTH)
    found, rows = map_of(model), []
    made: dict[str, dict[str, float]] = {}
    for seed in seeds:
        calibration = task.batch("calibration", SAMPLE, seed).inputs["input_ids"]
        tokens, other = (task.batch("test", texts, s).inputs["input_ids"] for s in (seed, seed + 100))
        planted, row = read_again(tokens, other[:, 200 : 200 + SPAN], AT), {}
        for name, text in caches(WINDOW).items():
            nats, held = read(caching(text, model, found, LENGTH, partial(torch.clone, calibration)), planted)
            row[f"{name} perplexity"] = perplexity(nats[:, AT + SPAN : -SPAN])
            row[f"{name} recall"] = recalled(nats, SPAN)
            made.setdefault(name, {})["bytes_a_token"] = rounded(packed_bytes(held) / texts)
            made[name]["held_bytes"] = held.nbytes / texts
            if held.offered:
                made[name]["looked_at"] = rounded(held.visits / held.offered)
        row["first recall"] = recalled(nats[:, : AT + SPAN - 1], SPAN)
        rows.append(row)
        print(f"seed {seed} is done", file=sys.stderr)
    for name in caches(WINDOW):
        for what in ("perplexity", "recall"):
            judged = judge(Check("", f"{name} {what}", "<", f"fp16 {what}"), rows)
            made[name] |= {what: rounded(judged.left), f"{what}_rise": rounded(judged.difference)}
            made[name][f"{what}_half_width"] = rounded(judged.half_width)
    made["the passage when first read"] = {"recall": rounded(statistics.mean(row["first recall"] for row in rows))}
    return made


def packed_bytes(held: Any) -> float:
    """Bytes a token of all layers: of packed windows, or of what is held where tokens are dropped or all are kept."""
    windows = [stored for layer in held.layers for stored in getattr(layer, "stored", ())]
    tokens = len(windows) // len(held.layers) * held.caching.window if windows else held.get_seq_length()
    return (sum(stored.nbytes for stored in windows) if windows else held.nbytes) / tokens


def speed(context: int) -> dict[str, dict[str, float]]:
    """For each cache: seconds of a token after the context, and bytes that are held."""
    import transformers

    from trimtab.engine.session import map_of
    from trimtab.tasks.reading import caching

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SPEED)).eval().requires_grad_(False)
    found, tokens = map_of(model), torch.randint(1000, (1, context + STEPS), generator=torch.Generator().manual_seed(1))
    ready: dict[str, tuple[Any, Any]] = {}
    for name, text in caches(WIDE).items():
        cache = caching(text, model, found, context + STEPS, lambda: tokens[:, :256])
        held = cache.new()
        for first in range(0, context, WINDOW):
            step(cache, held, tokens[:, first : first + WINDOW])
        ready[name] = (cache, held)
        print(f"{name} has read its context", file=sys.stderr)
    spent: dict[str, list[float]] = {name: [] for name in ready}
    for at in range(context, context + STEPS):
        for name, (cache, held) in ready.items():
            start = time.perf_counter()
            step(cache, held, tokens[:, at : at + 1])
            if at > context + 1:  # the first pack a window, and warm up
                spent[name].append(time.perf_counter() - start)
    return {
        name: {"seconds_a_token": rounded(statistics.median(spent[name])), "held_bytes": held.nbytes}
        for name, (_, held) in ready.items()
    }


@torch.no_grad()
def step(cache: Any, held: Any, tokens: Tensor) -> None:
    """Read some tokens."""
    cache.run(held, tokens)


def table(part: str) -> str:
    """The last record of a part, as the table of docs/cache.md."""
    from trimtab.catalogue import record_path

    rows = [json.loads(line) for line in record_path("benchmarks", "caches").read_text("utf-8").splitlines()]
    row = next(r for r in reversed(rows) if r["part"] == part)
    if part == "speed":
        lines = ["| cache | milliseconds a token | bytes held |", "|---|---|---|"]
        for name, f in row["caches"].items():
            lines.append(f"| {name} | {1000 * f['seconds_a_token']:.1f} | {f['held_bytes']:,.0f} |")
        return "\n".join(lines)
    lines = ["| cache | bytes a token | perplexity | its rise | recall, nats | its rise |", "|---|---|---|---|---|---|"]
    for name, f in row["caches"].items():
        if "perplexity" in f:
            first, second = (
                f"{f[f'{what}_rise']:+.2f} ± {f[f'{what}_half_width']:.2f}" for what in ("perplexity", "recall")
            )
            cells = (f"{f['bytes_a_token']:,.0f}", f"{f['perplexity']:.2f}", first, f"{f['recall']:.2f}", second)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        else:
            lines.append(f"| {name} | | | | {f['recall']:.2f} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--speed", action="store_true", help="measure seconds instead of quality")
    parser.add_argument("--small", action="store_true", help="little of it, to see that it runs; nothing is recorded")
    parser.add_argument("--table", action="store_true", help="print the last record as a table; measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark

    if asked.table:
        print(table("speed" if asked.speed else "quality"))
        return
    torch.set_num_threads(asked.threads)
    load = os.getloadavg()[0]
    row: dict[str, Any] = {"benchmark": "caches", "part": "speed" if asked.speed else "quality"}
    row |= {"threads": asked.threads, "texts": caches(WIDE if asked.speed else WINDOW)}
    if asked.speed:
        row |= {"sizes": SPEED, "context": CONTEXT, "load_at_start": round(load, 1)}
        row["caches"] = speed(256 if asked.small else CONTEXT)
    else:
        row |= {"length": LENGTH, "span": SPAN, "at": AT, "texts_a_seed": TEXTS}
        row["caches"] = quality((0,) if asked.small else (0, 1, 2), 1 if asked.small else TEXTS)
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
