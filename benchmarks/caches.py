"""What each method of caches keeps of a text, and how well the model reads on with it.

Quality, by default: the shipped language model reads texts of 448 tokens, within what it was trained on, in windows of
64. 32 tokens of another text are planted at token 64 and read again at the end; their first 4 say which they are.
Bytes are counted exactly; perplexity is of the text outside the two places, recall of the passage read again. The model
cannot answer a question, but it copies: the passage is the longest-range thing that it knows how to look up.
RetrievalAttention is read at several efforts, with windows of 64 and of 192 tokens; `equal` names the one that looks at
the fewest keys of those whose perplexity is at most 1 % above fp16's, and whose recall at most 0.1 nats, by the upper
ends of the intervals.

Speed, with --speed: a Llama of random weights reads 4,096 tokens on torch, in windows of 512, and writes on, one
step of each cache in turns; then the same after 16,384 tokens. RetrievalAttention has the paper's numbers and an index
every 2,048 tokens, and reads all keys while the context is read, as the paper does.

A JSON line is printed and appended to records/benchmarks/caches.jsonl.

    python benchmarks/caches.py             # quality: four minutes on one thread
    python benchmarks/caches.py --speed     # five minutes; wants a machine that does nothing else
    python benchmarks/caches.py --small     # with either: to see that it runs; nothing is recorded
    python benchmarks/caches.py --table     # the last records as tables into docs/cache.md; measures nothing
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
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import rounded

WINDOW, LENGTH, SEEDS, TEXTS, SPAN, AT, SAMPLE = 64, 448, 5, 2, 32, 64, 16
SPEED = {"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 64}
SPEED |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 32768}
CONTEXTS, SMALL_CONTEXTS, STEPS, WIDE, INDEXED = (4096, 16384), (512, 1024), 10, 512, 2048
TIMED = ("fp16", "kivi, 4 bits", "kivi, 2 bits", "think, 40 %", "xquant, 3 bits", "xquant-cl, 3 bits", "cskv, half")
TIMED += ("cskv, a fifth, 4 bits", "sirllm, 64 tokens")
WORSE = {"perplexity": 0.01, "recall": 0.1}  # what still counts as equal: a share of the perplexity, and nats
PAGE, BEGIN, END = "docs/cache.md", "<!-- {} of benchmarks/caches.py -->", "<!-- end -->"


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
    }


def searches() -> dict[str, str]:
    """Name -> RetrievalAttention at an effort."""
    found = {}
    for window, tops in ((WINDOW, (4, 8, 16)), (3 * WINDOW, (8, 16, 32, 64))):
        for top in tops:
            effort = f"top={top}, beam={2 * top}, near=8, links=8, entries=4, sinks=4, residual={window}"
            found[f"retrievalattention, {top} of {window}"] = f"retrievalattention({effort})"
    return found


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
        for name, text in (caches(WINDOW) | searches()).items():
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
    for name in made:
        for what in ("perplexity", "recall"):
            judged = judge(Check("", f"{name} {what}", "<", f"fp16 {what}"), rows)
            made[name] |= {what: rounded(judged.left), f"{what}_rise": rounded(judged.difference)}
            made[name][f"{what}_half_width"] = rounded(judged.half_width)
    made["the passage when first read"] = {"recall": rounded(statistics.mean(row["first recall"] for row in rows))}
    return made


def equal(made: dict[str, dict[str, float]]) -> dict[str, Any] | None:
    """Of RetrievalAttention's efforts that are as good as all keys, the one that looks at the fewest; None: none is."""

    def good(found: dict[str, float]) -> bool:
        most = {"perplexity": WORSE["perplexity"] * made["fp16"]["perplexity"], "recall": WORSE["recall"]}
        return all(found[f"{what}_rise"] + found[f"{what}_half_width"] <= most[what] for what in most)

    looked = {name: made[name]["looked_at"] for name in searches() if good(made[name])}
    return min(
        ({"cache": n, "looked_at": share} for n, share in looked.items()), key=lambda f: f["looked_at"], default=None
    )


def packed_bytes(held: Any) -> float:
    """Bytes a token of all layers: of packed windows, or of what is held where tokens are dropped or all are kept."""
    windows = [stored for layer in held.layers for stored in getattr(layer, "stored", ())]
    tokens = len(windows) // len(held.layers) * held.caching.window if windows else held.get_seq_length()
    return (sum(stored.nbytes for stored in windows) if windows else held.nbytes) / tokens


def speed(contexts: tuple[int, ...]) -> dict[str, dict[str, dict[str, float]]]:
    """For each context and cache: seconds of a token after it, and bytes that are held."""
    import transformers

    from trimtab.engine.session import map_of
    from trimtab.formats.cache import CacheFormat
    from trimtab.kv.retrievalattention import Indexed
    from trimtab.tasks.reading import caching

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SPEED)).eval().requires_grad_(False)
    length = max(contexts) + STEPS
    found, tokens = map_of(model), torch.randint(1000, (1, length), generator=torch.Generator().manual_seed(1))
    texts = {name: text for name, text in caches(WIDE).items() if name in TIMED}
    texts["retrievalattention"] = f"retrievalattention(residual={min(INDEXED, contexts[0])})"
    ready: dict[str, tuple[Any, Any]] = {}
    for name, text in texts.items():
        cache = caching(text, model, found, length, lambda: tokens[:, :256])
        ready[name] = (cache, cache.new())
    done, made = 0, {}
    for context in contexts:
        for name, (cache, held) in ready.items():
            start = time.perf_counter()
            with mock.patch.object(Indexed, "read", all_keys):
                for first, last in CacheFormat(window=cache.window).cuts(done, context - done, WIDE):
                    step(cache, held, tokens[:, done + first : done + last])
            print(f"{name} has read {context} tokens after {time.perf_counter() - start:.1f} s", file=sys.stderr)
        spent: dict[str, list[float]] = {name: [] for name in ready}
        for at in range(context, context + STEPS):
            for name, (cache, held) in ready.items():
                start = time.perf_counter()
                step(cache, held, tokens[:, at : at + 1])
                if at > context + 1:  # the first pack a window, and warm up
                    spent[name].append(time.perf_counter() - start)
        made[str(context)] = {
            name: {"seconds_a_token": rounded(statistics.median(spent[name])), "held_bytes": held.nbytes}
            for name, (_, held) in ready.items()
        }
        done = context + STEPS
    return made


def all_keys(stored: Any, queries: Tensor) -> Any:
    """What a query reads where nothing is searched."""
    from trimtab.formats.cache import Reading

    count = stored.pair.keys.dense().shape[-2]
    lead = queries.shape[:-1]
    return Reading(torch.ones(*lead, count, dtype=torch.bool), torch.full(lead, count))


@torch.no_grad()
def step(cache: Any, held: Any, tokens: Tensor) -> None:
    """Read some tokens."""
    cache.run(held, tokens)


def table(row: dict[str, Any]) -> str:
    """A record as a table."""
    if row["part"] == "speed":
        lines = [f"Seconds on torch, {row['threads']} thread, a step of each cache in turns (`--speed`):", ""]
        lines += ["| context | cache | milliseconds a token | beside fp16 | bytes held |", "|---|---|---|---|---|"]
        for context, found in row["contexts"].items():
            for name, f in found.items():
                ratio = f["seconds_a_token"] / found["fp16"]["seconds_a_token"]
                cells = (f"{1000 * f['seconds_a_token']:.1f}", f"{ratio:.2f}", f"{f['held_bytes']:,.0f}")
                lines.append(f"| {int(context):,} | {name} | {' | '.join(cells)} |")
        return "\n".join(lines)
    heads = (
        "cache",
        "bytes a token",
        "held, of fp16",
        "keys looked at",
        "perplexity",
        "its rise",
        "recall, nats",
        "its rise",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + len(heads) * "---|"]
    whole = row["caches"]["fp16"]["held_bytes"]
    for name, f in row["caches"].items():
        cells = len(heads[1:]) * [""]
        cells[5] = f"{f['recall']:.2f}"
        if "perplexity" in f:
            rises = [f"{f[f'{what}_rise']:+.2f} ± {f[f'{what}_half_width']:.2f}" for what in WORSE]
            cells[0], cells[1] = f"{f['bytes_a_token']:,.0f}", f"{f['held_bytes'] / whole:.0%}"
            cells[2] = f"{f['looked_at']:.0%}" if "looked_at" in f else "all"
            cells[3], cells[4], cells[6] = f"{f['perplexity']:.2f}", *rises
        lines.append(f"| {name} | {' | '.join(cells)} |")
    least, most = row["equal"], f"{WORSE['perplexity']:.0%} more perplexity and {WORSE['recall']} nats more"
    said = f"`{least['cache']}`, at {least['looked_at']:.0%}" if least else "none of RetrievalAttention's efforts"
    lines += ["", f"Fewest keys looked at with at most {most}, by the upper ends of the intervals: {said}."]
    return "\n".join(lines)


def write_tables() -> None:
    """The last record of each part into the page, where its markers are."""
    from trimtab.catalogue import ROOT, record_path

    page = ROOT / PAGE
    text = page.read_text("utf-8")
    last = {
        row["part"]: row for row in map(json.loads, record_path("benchmarks", "caches").read_text("utf-8").splitlines())
    }
    for part, row in last.items():
        before, begin, rest = text.partition(BEGIN.format(part))
        assert begin, f"{PAGE} has no line {BEGIN.format(part)}"
        text = f"{before}{begin}\n{table(row)}\n{END}{rest.partition(END)[2]}"
    page.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--speed", action="store_true", help="measure seconds instead of quality")
    parser.add_argument("--small", action="store_true", help="little of it, to see that it runs; nothing is recorded")
    parser.add_argument(
        "--table", action="store_true", help="write the last records into docs/cache.md; measure nothing"
    )
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark

    if asked.table:
        write_tables()
        return
    torch.set_num_threads(asked.threads)
    load = os.getloadavg()[0]
    row: dict[str, Any] = {"benchmark": "caches", "part": "speed" if asked.speed else "quality"}
    row |= {"threads": asked.threads, "load_at_start": round(load, 1)}
    if asked.speed:
        row |= {"sizes": SPEED, "texts": caches(WIDE), "indexed": INDEXED}
        row["contexts"] = speed(SMALL_CONTEXTS if asked.small else CONTEXTS)
    else:
        row |= {"texts": caches(WINDOW) | searches(), "length": LENGTH, "span": SPAN, "at": AT, "texts_a_seed": TEXTS}
        row["caches"] = quality((0,) if asked.small else tuple(range(SEEDS)), 1 if asked.small else TEXTS)
        row["equal"] = equal(row["caches"])
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
