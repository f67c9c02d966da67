"""Speed of the compiled kernels as shares of what this machine can do, beside torch's linears of the same shape.

A weight of 8192 x 2048 at 2 to 8 bits, in groups of 32, 64, 128 columns and of a row, by 1 to 512 inputs. For every
level the machine's two limits are measured next to it: bytes a second read of a set beyond the caches, and operations
a second of int8 products summed in registers. Weights are taken in turn from a set beyond the caches too. Peers are
torch's fp32 and bf16 linears and its dynamic int8 one, the same way, with as many threads.

Figures are the best of many turns, since a machine that other work shares is slower, never faster. A JSON line is
printed and appended to records/benchmarks/kernels.jsonl.

    python benchmarks/kernels.py              # some minutes
    python benchmarks/kernels.py --small      # a small weight, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch

from trimtab.core.level import Int
from trimtab.kernels.bench import random_packed
from trimtab.kernels.native import native
from trimtab.kernels.weight import kernel_weight
from trimtab.peers import dynamic_int8

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128, None)
INPUTS = (1, 4, 8, 16, 32, 128, 512)
BEYOND = 192 << 20  # bytes of weights that are taken in turn: beyond the last cache


def best(turn: Callable[[], list[float]], seconds: float) -> float:
    """The least seconds that any turn took, of as many as fit into the time."""
    turn()
    least, end = min(turn()), time.perf_counter() + seconds
    while time.perf_counter() < end:
        least = min(least, *turn())
    return least


def shares(seconds: float, size: int, m: int, shape: tuple[int, int], limits: dict[str, float]) -> dict[str, float]:
    """A product's time as shares of the two limits."""
    work = 2 * shape[0] * shape[1] * m
    return {
        "of_bandwidth": round(size / seconds / limits["read"], 3),
        "of_int8_peak": round(work / seconds / limits["int8"], 3),
        "gops": round(work / seconds / 1e9, 1),
    }


def ours(module: Any, shape: tuple[int, int], inputs: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Each level by each number of inputs."""
    for bits in BITS:
        for group in GROUPS:
            packed = random_packed(Int(bits, group), *shape)
            start = time.perf_counter()
            weights = [kernel_weight(packed)]
            weights += [kernel_weight(packed) for _ in range(min(BEYOND // weights[0].nbytes, 40))]
            loaded = len(weights) * weights[0].nbytes / (time.perf_counter() - start)
            rows = []
            limits = limits_of(module)
            for m in inputs:
                x = np.random.default_rng(0).standard_normal((m, shape[1]), np.float32)
                turns = len(weights) if m <= 32 else 2
                took = best(partial(module.seconds, weights, x, turns), seconds)
                rows.append((m, took))
                limits = {k: max(v, limits[k]) for k, v in limits_of(module).items()}
            by = {str(m): shares(took, weights[0].nbytes, m, shape, limits) for m, took in rows}
            yield {"level": str(packed.level), "loaded_gb_s": round(loaded / 1e9, 2), "limits": limits, "inputs": by}


def limits_of(module: Any) -> dict[str, float]:
    """Bytes read and int8 operations a second, the best slices of a short measurement."""
    return {"read": max(module.read_rates(1 << 28, 0.1)), "int8": max(module.int8_rates(0.05))}


def peers(module: Any, shape: tuple[int, int], inputs: tuple[int, ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Torch's linears: fp32, bf16, and int8 with inputs rounded on the fly."""
    rows, cols = shape
    torch.set_num_threads(module.threads())

    makers: dict[str, tuple[int, torch.dtype, Callable[[], torch.nn.Module]]] = {
        "torch fp32": (4, torch.float32, lambda: torch.nn.Linear(cols, rows, bias=False)),
        "torch bf16": (2, torch.bfloat16, lambda: torch.nn.Linear(cols, rows, bias=False).bfloat16()),
        "torch dynamic int8": (1, torch.float32, lambda: dynamic_int8(torch.nn.Linear(cols, rows, bias=False))),
    }
    for name, (width, dtype, make) in makers.items():
        size = rows * cols * width
        layers = [make() for _ in range(1 + BEYOND // size)]
        turn = cycle(layers)
        limits, found = limits_of(module), []
        for m in inputs:
            x = torch.randn(m, cols).to(dtype)

            def once(x: torch.Tensor = x, turn: Iterator[torch.nn.Module] = turn) -> list[float]:
                layer = next(turn)
                start = time.perf_counter()
                layer(x)
                return [time.perf_counter() - start]

            with torch.inference_mode():
                found.append((m, best(once, seconds)))
            limits = {k: max(v, limits[k]) for k, v in limits_of(module).items()}
        by = {str(m): shares(took, size, m, shape, limits) for m, took in found}
        yield {"peer": name, "limits": limits, "inputs": by}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="a small weight; nothing is recorded")
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark

    module = native()
    if module is None:
        print("no kernels were compiled here, so there is nothing to measure")
        return
    shape, inputs, seconds = ((256, 256), (1, 16), 0.001) if asked.small else ((8192, 2048), INPUTS, 0.15)
    load = os.getloadavg()[0]
    row = {
        "benchmark": "kernels",
        **{"shape": shape, "kernels": module.__name__.rpartition("_")[2], "threads": module.threads()},
        "ours": list(ours(module, shape, inputs, seconds)),
        "peers": list(peers(module, shape, inputs, seconds)),
        "load_at_start": round(load, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
