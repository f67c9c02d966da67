"""The roofline: seconds and memory of whole models from measurements of single operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from trimtab.core.claim import Check, Claim
from trimtab.core.device import Device
from trimtab.core.level import Dense, Level, parse_level
from trimtab.engine.pricing import forecast
from trimtab.engine.session import Runtime, map_of
from trimtab.kernels import profile
from trimtab.kernels.bench import random_packed

WITHIN = 0.15
SIZES = ((256, 4), (512, 8), (1024, 4), (1024, 12))  # hidden width, blocks
LEVELS = ("bf16", "8b/row", "4b/g64", "2b/g32")
RUNS = ((1, 64), (4, 256), (8, 510))  # sequences, context
THREADS = 1

CLAIM = Claim(
    method="roofline",
    statement="Micro-benchmarks of latency, bandwidth and arithmetic describe a machine well enough that a roofline "
    "fed with them predicts the time of real layers and models.",
    source="Luo et al. 2024, arXiv:2402.13499, abstract; Williams et al. 2009, section 3",
    setting="The shipped language model and Llamas of random weights (hidden widths 256 to 1024, 4 to 12 blocks), the "
    "linears of their blocks at bf16, 8, 4 and 2 bits; 1, 4 and 8 sequences at contexts of 64, 256 and 510; 60 points "
    "a seed. The profile is measured anew before each seed, on single operations of other shapes; nothing is fitted to "
    "the models. One thread, seconds of the processor, the fastest of several repeats.",
    metric="errors: |predicted / measured - 1|, of the seconds of a written token (decode), of a prompt (prefill), and "
    "of the bytes held; shares of points within 15 %; naive: every operation at its peak or at memory's bandwidth",
    checks=(
        Check("median error of decode below 15 %", "decode_median", "<", WITHIN),
        Check("median error of prefill below 15 %", "prefill_median", "<", WITHIN),
        Check("no error of memory above 15 %", "bytes_worst", "<=", WITHIN),
        Check("four of five decodes within 15 %", "decode_within", ">=", 0.8),
        Check("four of five prefills within 15 %", "prefill_within", ">=", 0.8),
        Check("nearer to decode than the naive roofline", "decode_median", "<", "decode_naive"),
        Check("nearer to prefill than the naive roofline", "prefill_median", "<", "prefill_naive"),
    ),
)


class Point(NamedTuple):
    """One (model, plan, sequences, context): predicted and measured seconds and bytes."""

    model: str
    level: str
    batch: int
    context: int
    decode: float
    decode_predicted: float
    decode_naive: float
    prefill: float
    prefill_predicted: float
    prefill_naive: float
    bytes: int
    bytes_predicted: int
    between: bool  # measured decode lies between the low and the high prediction

    def error(self, what: str, kind: str = "predicted") -> float:
        """Predicted to measured, less one."""
        return getattr(self, f"{what}_{kind}") / getattr(self, what) - 1


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Errors over all points, after a profile of their own."""
    device = profile.measure(THREADS, levels=LEVELS)
    with profile.threads_set(THREADS):
        return summary(points(device, seed))


def llama(width: int, blocks: int, seed: int) -> nn.Module:
    """A Llama of random weights that bf16 holds exactly."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(2.75 * width) // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        vocab_size=4096,
        max_position_embeddings=512,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(torch.bfloat16).float().eval().requires_grad_(False)


def shipped() -> nn.Module:
    """The shipped language model."""
    from trimtab.models.source import open_source

    return open_source("pocket-lm").materialise()


def models(seed: int, small: bool) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names, and what makes them."""
    yield "pocket-lm", shipped
    for width, blocks in SIZES[:1] if small else SIZES:
        yield f"llama {width}x{blocks}", partial(llama, width, blocks, seed)


def packed_at(found: Any, level: Level) -> dict[str, Any]:
    """Random packed weights for every linear of the blocks; a dense plan packs none."""
    if isinstance(level, Dense):
        return {}
    sites = [s for s in found.sites if s.kind == "linear" and s.block is not None]
    return {f"{s.path}.weight": partial(random_packed, level, *s.shape) for s in sites}


def points(
    device: Device, seed: int = 0, small: bool = False, tell: Callable[[Point], object] = lambda point: None
) -> list[Point]:
    """Every point, measured and predicted."""
    done = []
    for name, make in models(seed, small):
        for text in LEVELS:
            level, model = parse_level(text), make()
            found = map_of(model)
            packed = packed_at(found, level)
            runtime = Runtime(model, packed)
            plan = {path.removesuffix(".weight"): level for path in packed}
            for batch, context in RUNS:
                decode, prefill, held = measured(runtime, batch, context, device.threads, 0.1 if small else 0.4)
                said, naive = (forecast(found, plan, d, batch=batch, prompt=context) for d in (device, ideal(device)))
                done.append(Point(
                    name, text, batch, context, decode, said.decode.mid, naive.decode.mid,
                    prefill, said.prefill.mid, naive.prefill.mid, held, said.bytes,
                    said.decode.low <= decode <= said.decode.high,
                ))  # fmt: skip
                tell(done[-1])
    return done


def measured(runtime: Runtime, batch: int, context: int, threads: int, seconds: float) -> tuple[float, float, int]:
    """Fastest seconds of writing a token of each sequence and of reading a prompt, and the bytes held."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    writer: Any = runtime.open(context + 2, sequences=batch)
    prompt = torch.randint(1000, (context,), generator=torch.Generator().manual_seed(0)).tolist()

    def read(sequence: int) -> None:
        writer.forget(sequence)
        writer.extend(sequence, prompt)

    def write() -> None:
        for sequence in range(batch):
            writer.forget(sequence, context)
        writer.step(dict.fromkeys(range(batch), 1))

    def fastest(work: Callable[[], None], least: int) -> float:
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < least or (time.perf_counter() - began < seconds and len(times) < 200):
            start = clock()
            work()
            times.append(clock() - start)
        return min(times)

    for sequence in range(batch):
        read(sequence)
    prefill, decode = fastest(partial(read, 0), 3), fastest(write, 5)
    paths = [s.path for s in map_of(runtime.model).sites]
    return decode, prefill, runtime.weights.nbytes(paths) + writer.program.nbytes


def ideal(device: Device) -> Device:
    """The naive roofline's machine: every operation at its peak or at the bandwidth of memory, and no call costs."""
    kernels = tuple(
        replace(k, fixed=0.0, edge=0.0, near=1.0, far=1.0, start=0.0) for k in device.kernels if k.op != "step"
    )
    return replace(device, kernels=kernels, spill=((0, 1.0),))


def summary(done: list[Point]) -> dict[str, float]:
    """Median and worst errors, and the share of points within 15 %."""
    found: dict[str, float] = {"points": len(done), "between": sum(p.between for p in done) / len(done)}
    for what in ("decode", "prefill", "bytes"):
        errors = [abs(p.error(what)) for p in done]
        found[f"{what}_median"] = statistics.median(errors)
        found[f"{what}_worst"] = max(errors)
        found[f"{what}_within"] = sum(e <= WITHIN for e in errors) / len(errors)
        if what != "bytes":
            found[f"{what}_naive"] = statistics.median(abs(p.error(what, "naive")) for p in done)
    return found
