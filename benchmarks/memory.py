"""Peak memory of compressing a model block by block, against the bound that the design states.

A Llama of 1.1 billion random weights is written to a temporary folder, block by block. Then, each in a process of its
own, plans are carried out on it by the one-shot engine, with packed weights on disk. The bound on what such a process
may hold above what it held when all was imported:

    two blocks in fp32 + calibration activations + 500 MB

A plan whose run would take longer than `--minutes`, by the time of its first block, is carried out on the first two
blocks alone, and the record says so. One JSON line a plan is printed and appended to records/benchmarks/memory.jsonl;
the verdict is computed.

    python benchmarks/memory.py             # all plans on the large model: some minutes
    python benchmarks/memory.py --small     # a model of some million weights, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLANS = ("rtn @ 4b/g128", "gptq @ 4b/g128")
WINDOWS, LENGTH = 4, 128
ROOM = 500_000_000
LARGE: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 2048},
}
SMALL: dict[str, Any] = LARGE | {
    **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "vocab_size": 1000},
}


class _Enough(Exception):
    """The first block is done, and only its time was wanted."""


# ---- the model


def write_model(folder: Path, sizes: dict[str, Any]) -> int:
    """A Llama with random weights in bf16, of which one shard at a time is in memory; the number of its weights."""
    from transformers import LlamaConfig

    from trimtab.formats.checkpoint import write_safetensors

    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    count = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal count
        rng = torch.Generator().manual_seed(0)
        for name, shape in _shapes(config):
            count += torch.Size(shape).numel()
            if len(shape) == 1:
                yield name, torch.ones(shape, dtype=torch.bfloat16)
            else:
                yield name, (torch.randn(shape, generator=rng) / shape[1] ** 0.5).bfloat16()

    write_safetensors(tensors(), folder / "model.safetensors", shard_bytes=250_000_000)
    return count


def _shapes(c: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, keys = c.hidden_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    inner = c.intermediate_size
    yield "model.embed_tokens.weight", (c.vocab_size, wide)
    for i in range(c.num_hidden_layers):
        block = f"model.layers.{i}"
        for name, rows in (("q", wide), ("k", keys), ("v", keys), ("o", wide)):
            yield f"{block}.self_attn.{name}_proj.weight", (rows, wide)
        for name, shape in (("gate", (inner, wide)), ("up", (inner, wide)), ("down", (wide, inner))):
            yield f"{block}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", (wide,)
    yield "model.norm.weight", (wide,)
    yield "lm_head.weight", (c.vocab_size, wide)


# ---- memory of this process


def status(key: str) -> int:
    """Bytes under a key of `/proc/self/status`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


class Watch(threading.Thread):
    """Samples the anonymous memory of this process every 10 ms, with the place of the run at the largest sample."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.place, self.peak, self.peaks, self.over = "start", 0, dict[str, int](), threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            held = status("RssAnon")
            self.peak = max(self.peak, held)
            self.peaks[self.place] = max(self.peaks.get(self.place, 0), held)


# ---- one run, in a process of its own


def run(folder: Path, plan: str, first_block_only: bool) -> dict[str, Any]:
    """Carry a plan out and say what memory it took."""
    from trimtab.core.journal import Journal
    from trimtab.core.plan import Plan, check
    from trimtab.engine.apply import apply
    from trimtab.engine.measure import forget_peak, peak_bytes
    from trimtab.engine.shelf import Shelf
    from trimtab.engine.stream import Stream, own_sites, traced
    from trimtab.models.source import open_source
    from trimtab.tasks.base import Batch
    from trimtab.tasks.causal_lm import CausalLM

    _import_the_rest()
    source = open_source(str(folder))
    forget_peak()
    idle, idle_anonymous = status("VmRSS"), status("RssAnon")
    watch = Watch()
    watch.start()
    start = time.perf_counter()

    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(source.config["vocab_size"], (WINDOWS, LENGTH), generator=rng)
    batch = Batch({"input_ids": tokens}, tokens, torch.ones(WINDOWS))
    modelmap = traced(source, batch)
    sites = list(own_sites(modelmap).values())
    steps = Plan.parse(plan).resolve(sites)
    check(steps, sites)
    stream = Stream(source, modelmap, CausalLM.options, resident=False)
    seconds = [time.perf_counter()]

    def progress(done: int, total: int) -> None:
        seconds.append(time.perf_counter())
        names = ["before", *(f"block {i}" for i in range(total - 2)), "behind", "end"]
        watch.place = names[done]
        if first_block_only and done == 2:
            raise _Enough

    watch.place = "before"
    with tempfile.TemporaryDirectory(prefix="trimtab-memory-run-") as place:
        shelf = Shelf(Journal(Path(place) / "run", False, {"plan": plan}), "applied")
        stream.packed = shelf
        try:
            done = apply(stream, steps, batch, CausalLM.chunk, keep=shelf.keep, progress=progress)
        except _Enough:
            return {"block_seconds": seconds[2] - seconds[1], "blocks": len(stream.paths)}
        stored = sum(shelf[path].nbytes for path in shelf)
        touched = len(done.packed)
    watch.over.set()
    watch.join()
    peak = peak_bytes()
    widest = max(s.shape[1] for s in sites if s.kind == "linear")
    block = max(sum(4 * s.weights for s in sites if s.block == i) for i in range(len(stream.paths)))
    activations = 4 * WINDOWS * LENGTH * (2 * source.config["hidden_size"] + widest)
    bound = 2 * block + activations + ROOM
    return {
        **{"plan": plan, "weights": modelmap.parameters, "sites": touched, "stored_bytes": stored},
        **{"seconds": round(time.perf_counter() - start, 1), "idle_bytes": idle, "peak_bytes": peak},
        **{"above_idle_bytes": peak - idle, "anonymous_above_idle_bytes": watch.peak - idle_anonymous},
        "above_idle_by_place": _summary({k: v - idle_anonymous for k, v in watch.peaks.items()}),
        **{"block_bytes": block, "activation_bytes": activations, "room_bytes": ROOM, "bound_bytes": bound},
        **{"ratio": round((peak - idle) / bound, 3), "verdict": "held" if peak - idle <= bound else "failed"},
        "model_bytes": 4 * modelmap.parameters,
    }


def _import_the_rest() -> None:
    """What is imported late, and what the first calls set up, belongs to the idle process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.core.method import discover

    discover()
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    LlamaForCausalLM(LlamaConfig(**tiny, num_key_value_heads=1))(torch.zeros(1, 4, dtype=torch.long))
    torch.linalg.cholesky_ex(torch.eye(512) + torch.ones(512, 512) / 512)


def _summary(peaks: dict[str, int]) -> dict[str, int]:
    blocks = [v for k, v in peaks.items() if k.startswith("block")]
    rest = {k: v for k, v in peaks.items() if not k.startswith("block")}
    return rest | {"first block": blocks[0], "last block": blocks[-1], "largest block": max(blocks)}


# ---- all runs


def in_a_process(folder: Path, plan: str, *more: str) -> dict[str, Any]:
    """`run` in a fresh process."""
    line = [sys.executable, __file__, "--folder", str(folder), "--plan", plan, *more]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small model; nothing is recorded")
    parser.add_argument("--minutes", type=float, default=8.0, help="a plan that would take longer is cut to two blocks")
    parser.add_argument("--plan", help="this plan alone")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first-block", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        print(json.dumps(run(asked.folder, asked.plan, asked.first_block)))
        return

    from trimtab.catalogue import keep_benchmark

    with tempfile.TemporaryDirectory(prefix="trimtab-memory-") as place:
        folder = Path(place)
        weights = write_model(folder, SMALL if asked.small else LARGE)
        for plan in [asked.plan] if asked.plan else PLANS:
            facts: dict[str, Any] = {"asked": plan, "limited": None}
            look = in_a_process(folder, plan, "--first-block")
            expected = look["block_seconds"] * look["blocks"]
            if expected > 60 * asked.minutes:
                name, _, level = plan.partition(" @ ")
                plan = f"{name} @ model.layers.[01].*={level}"
                facts["limited"] = f"two blocks: all {look['blocks']} would take {expected / 60:.0f} minutes here"
            found = in_a_process(folder, plan)
            assert found["weights"] == weights, "the map counts other weights than were written"
            row = {"benchmark": "memory", **facts, **found}
            keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
