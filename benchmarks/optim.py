"""What a step of a lean optimiser costs, and its state: ours beside the authors' packages and torch's fused AdamW.

The parameters are those of a Llama of 119.6 million weights (width 768, 12 blocks), with random gradients, in fp32. One
optimiser after the other is made and steps; figures are medians, `longest` is the longest step over the median, those
that find new projections among them. `state_bytes` are counted, `state_to_adamw` is the state of all but embedding and
head, as a share of AdamW's. `ratio` is the step's time over the authors'. `buckets` is APOLLO that projects by buckets
in place of products. A JSON line is printed and appended to records/benchmarks/optim.jsonl.

    python benchmarks/optim.py          # five minutes, 8 GB of memory
    python benchmarks/optim.py --small  # two blocks, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import trimtab

WIDTH, INNER, VOCABULARY, BLOCKS = 768, 2944, 8192, 12
RANK, EVERY = 192, 8  # a quarter of the width; projections are found anew often enough to be seen in a short run
PEERS = {"apollo": "apollo_torch", "apollo-mini": "apollo_torch", "galore": "galore_torch"}


def shapes(blocks: int) -> list[tuple[int, ...]]:
    """Of the parameters: embedding and head first."""
    block = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER), (WIDTH,), (WIDTH,)]
    return [(VOCABULARY, WIDTH), (VOCABULARY, WIDTH), *block * blocks, (WIDTH,)]


def ours(name: str, config: dict[str, Any]) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return lambda params: trimtab.optimizer(params, name, lr=1e-4, **config)


def theirs(name: str) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """The authors' own optimiser, the same numbers projected as ours: all matrices."""
    module: Any = importlib.import_module(PEERS[name])
    options: dict[str, Any] = {"update_proj_gap": EVERY, "proj_type": "std"}
    if name == "galore":
        options |= {"rank": RANK, "scale": 0.25}
        cls = module.GaLoreAdamW
    else:
        mini = name == "apollo-mini"
        options |= {"rank": 1 if mini else RANK, "scale": 128 if mini else 1, "proj": "random"}
        options |= {"scale_type": "tensor" if mini else "channel"}
        cls = module.APOLLOAdamW

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
        return cls([{"params": rest}, {"params": matrices, **options}], lr=1e-4)

    return make


def tensors(value: Any) -> int:
    """Bytes of the tensors that a state holds, its helpers' among them."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensors, value.values()))
    return tensors(vars(value)) if hasattr(value, "__dict__") else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two blocks; nothing is recorded")
    parser.add_argument("--steps", type=int, default=17)
    parser.add_argument("--only", default="", help="names that hold this text alone")
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark

    load, blocks = os.getloadavg()[0], 2 if asked.small else BLOCKS
    made: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
        "torch adamw fused": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
        "ours adamw": ours("adamw", {}),
        "ours apollo": ours("apollo", {"rank": RANK, "every": EVERY}),
        "ours apollo buckets": ours("apollo", {"rank": RANK, "every": EVERY, "projection": "buckets"}),
        "ours apollo-mini": ours("apollo-mini", {"every": EVERY}),
        "ours galore": ours("galore", {"rank": RANK, "every": EVERY}),
    }
    for name, package in PEERS.items():
        if importlib.util.find_spec(package) is not None:
            made[f"authors' {name}"] = theirs(name)
    made = {name: make for name, make in made.items() if asked.only in name}
    found: dict[str, dict[str, float]] = {}
    for name, make in made.items():  # one at a time in memory; what is compared lies in one run
        rng = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=rng) * 0.02) for shape in shapes(blocks)]
        for param in params:
            param.grad = torch.randn(param.shape, generator=rng) * 1e-3
        optimiser, spent = make(params), []
        for _ in range(asked.steps + 1):
            start = time.perf_counter()
            optimiser.step()
            spent.append(time.perf_counter() - start)
        state = [tensors({k: v for k, v in optimiser.state[p].items()}) for p in params]
        inner = sum(2 * p.nbytes for p in params[2:])
        median = statistics.median(spent[1:])
        found[name] = {
            **{"seconds": float(f"{median:.4g}"), "longest": float(f"{max(spent[1:]) / median:.3g}")},
            **{"state_bytes": sum(state), "state_to_adamw": float(f"{sum(state[2:]) / inner:.4g}")},
        }
    for name, row in found.items():
        peer = found.get(f"authors' {name.removeprefix('ours ').removesuffix(' buckets')}")
        if name.startswith("ours ") and peer is not None:
            row["ratio"] = float(f"{row['seconds'] / peer['seconds']:.3g}")
    said = {
        **{"benchmark": "optim", "blocks": blocks, "rank": RANK, "every": EVERY, "threads": torch.get_num_threads()},
        **{"found": found, "load_at_start": round(load, 1)},
    }
    keep_benchmark(said, kept=not asked.small)


if __name__ == "__main__":
    main()
