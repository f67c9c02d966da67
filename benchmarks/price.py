"""Predicted beside measured: the seconds of a prompt and of a written token, and the memory, for many models and plans.

The predictions know nothing but the machine's profile, which is measured on single operations just before; the models are
Llamas of random weights in several widths and depths and the shipped language model, at 8, 4 and 2 bits and dense, for
several batches and contexts. Each is measured in a session of its own; seconds are the fastest of several repeats, those
of the processor with one thread, as the profile takes them. Memory is what the session's weights, caches and buffers
hold. Prints the table of errors; `trimtab claim roofline` records it.

    python benchmarks/price.py [--threads 1] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.core.device import Device
from trimtab.core.level import Dense, Level, parse_level
from trimtab.engine.pricing import forecast
from trimtab.engine.session import Runtime, map_of
from trimtab.kernels import profile
from trimtab.kernels.bench import random_packed

WITHIN = 0.15
SIZES = ((256, 4), (512, 8), (1024, 4), (1024, 12))  # hidden width, blocks
LEVELS = ("bf16", "8b/row", "4b/g64", "2b/g32")
RUNS = ((1, 64), (4, 256), (8, 512))  # batch, context


@dataclass(frozen=True)
class Point:
    """One (model, plan, batch, context): predicted and measured seconds and bytes."""

    model: str
    level: str
    batch: int
    context: int
    decode: float
    decode_predicted: float
    prefill: float
    prefill_predicted: float
    bytes: int
    bytes_predicted: int
    covered: bool

    def error(self, what: str) -> float:
        """Predicted to measured, less one."""
        return getattr(self, f"{what}_predicted") / getattr(self, what) - 1


def llama(width: int, blocks: int) -> nn.Module:
    """A Llama of random weights that bf16 holds exactly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(2.75 * width) // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        vocab_size=4096,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).float().eval()
    return model.requires_grad_(False)


def shipped() -> nn.Module:
    """The shipped language model."""
    from trimtab.models.source import open_source

    return open_source("pocket-lm").materialise()


def models(quick: bool) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names, and what makes them."""
    yield "pocket-lm", shipped
    for width, blocks in SIZES[:1] if quick else SIZES:
        yield f"llama {width}x{blocks}", partial(llama, width, blocks)


def packed_at(found: Any, level: Level) -> dict[str, Any]:
    """Random packed weights for every linear of the blocks; a dense plan packs none."""
    if isinstance(level, Dense):
        return {}
    sites = [s for s in found.sites if s.kind == "linear" and s.block is not None]
    return {f"{s.path}.weight": partial(random_packed, level, *s.shape) for s in sites}


def measured(runtime: Runtime, batch: int, context: int, threads: int, seconds: float) -> tuple[float, float, int]:
    """Fastest seconds of writing a token of each sequence and of reading a prompt, and the bytes held."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    writer = runtime.open(context + 2, sequences=batch)
    prompt = torch.randint(1000, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill, decode = [], []
    for sequence in range(batch):
        writer.extend(sequence, prompt)
    began = time.perf_counter()
    while len(prefill) < 3 or (time.perf_counter() - began < seconds and len(prefill) < 30):
        writer.forget(0)
        start = clock()
        writer.extend(0, prompt)
        prefill.append(clock() - start)
    began = time.perf_counter()
    while len(decode) < 5 or (time.perf_counter() - began < seconds and len(decode) < 200):
        start = clock()
        writer.step(dict.fromkeys(range(batch), 1))
        decode.append(clock() - start)
        for sequence in range(batch):
            writer.forget(sequence, context)
    held = runtime.weights.nbytes([s.path for s in map_of(runtime.model).sites]) + writer.program.nbytes  # type: ignore[attr-defined]
    return min(decode), min(prefill), held


def points(device: Device, quick: bool = False, tell: Callable[[str], object] = lambda text: None) -> list[Point]:
    """Every point that runs as a program of the kernels."""
    done = []
    for name, make in models(quick):
        for text in LEVELS:
            level, model = parse_level(text), make()
            found = map_of(model)
            packed = packed_at(found, level)
            runtime = Runtime(model, packed)
            plan = {path.removesuffix(".weight"): level for path in packed}
            for batch, context in RUNS:
                limit = model.config.max_position_embeddings - 2
                context = min(context, limit)
                decode, prefill, held = measured(runtime, batch, context, device.threads, 0.15 if quick else 0.4)
                said = forecast(found, plan, device, batch=batch, prompt=context)
                low, high = said.decode.low, said.decode.high
                point = Point(
                    name, text, batch, context, decode, said.decode.mid, prefill, said.prefill.mid,
                    held, said.bytes, low <= decode <= high,
                )  # fmt: skip
                tell(
                    f"{name:14} {text:8} x{batch} at {context:4}: decode {1e3 * decode:8.3f} ms ({point.error('decode'):+.0%}), "
                    f"prefill {1e3 * prefill:8.2f} ms ({point.error('prefill'):+.0%}), {held / 1e6:6.1f} MB ({point.error('bytes'):+.0%})"
                )
                done.append(point)
    return done


def summary(done: list[Point]) -> dict[str, float]:
    """Median and worst errors, and the share of points within 15 %."""
    found: dict[str, float] = {"points": len(done), "covered": sum(p.covered for p in done) / len(done)}
    for what in ("decode", "prefill", "bytes"):
        errors = [abs(p.error(what)) for p in done]
        found[f"{what}_median"] = statistics.median(errors)
        found[f"{what}_worst"] = max(errors)
        found[f"{what}_within"] = sum(e <= WITHIN for e in errors) / len(errors)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few small models, to see that it runs")
    asked = parser.parse_args()
    levels = ("fp32", *LEVELS)
    device = profile.measure(asked.threads, asked.quick, levels)
    with profile.threads_set(asked.threads):
        done = points(device, asked.quick, lambda text: print(text, flush=True))
    row: Mapping[str, Any] = {**summary(done), "threads": asked.threads}
    print(json.dumps({**row, "table": [asdict(p) for p in done]}))
    print({k: round(v, 3) for k, v in row.items()})


if __name__ == "__main__":
    main()
