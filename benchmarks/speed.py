"""Speed as ratios within one run: the column sweep beside its baselines, and a probe beside a plain forward.

1. GPTQ at 4 bits and groups of 128, on weights of 2048 x 2048 and 2048 x 8192: the seconds of our sweep, of rounding to
   nearest, and of the textbook loop, which inverts the Hessian and updates all columns to come after each one. Both
   sweeps are the same algorithm: that their output errors agree within 1 % is checked, or there is no ratio.
2. Probing the shipped language model: the seconds of one probe (a unit solved at a choice, put in place, and the damage
   on the search items measured) beside one plain forward of the same items by transformers. Only the blocks behind the
   unit run again, so the ratio should be below 1.

Every figure is the least of a few turns, taken in turn with what it is compared to, in seconds of the processor on one
thread, which a busy machine changes less than those on the wall. A JSON line is printed and appended to
records/benchmarks/speed.jsonl.

    python benchmarks/speed.py              # some minutes
    python benchmarks/speed.py --small      # small weights, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.core.level import Int
from trimtab.core.method import Solver, method

LEVEL = Int(4, 128)
AGREE = 0.01
MENUS = [[f"{name}@{level}" for level in ("3b/g64", "4b/g64")] for name in ("rtn", "gptq")]


def seconds(works: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """The least seconds of the processor that each piece of work takes, all of them once a turn."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(turns):
        for name, work in works.items():
            start = time.process_time()
            work()
            least[name] = min(least[name], time.process_time() - start)
    return least


# ---- the sweep


def textbook(weight: Tensor, gram: Tensor, level: Int, damp: float = 0.01) -> Tensor:
    """GPTQ as its equations stand: w_j is rounded, and W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:] for every column j."""
    from trimtab.parts.grids import grid_for

    w, cols, group = weight.clone(), weight.shape[1], level.group
    assert group is not None
    h = gram + damp * gram.diagonal().mean() * torch.eye(cols)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    grid = grid_for(weight, level)
    for j in range(cols):
        if j % group == 0:
            grid.refit(w[:, j : j + group], j)
        q = grid.round(w[:, j : j + 1], j)[1]
        missed = (w[:, j : j + 1] - q) / u[j, j]
        w[:, j:] -= missed * u[j : j + 1, j:]
        w[:, j : j + 1] = q
    return w


def sweep(rows: int, cols: int, turns: int) -> dict[str, Any]:
    """Ratios for one weight.

    Raises:
        RuntimeError: the two sweeps do not agree, so that their times do not compare.
    """
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=rng) * 0.02
    x = torch.randn(1024, cols, generator=rng)
    x[:, ::31] *= 10
    gram = x.T @ x / len(x)
    gptq, rtn = method("gptq"), method("rtn")
    assert isinstance(gptq, Solver) and isinstance(rtn, Solver)
    found: dict[str, Tensor] = {}
    works: dict[str, Callable[[], Any]] = {
        "gptq": lambda: found.__setitem__("gptq", gptq.solve(weight, LEVEL, gram=gram).dense()),
        "rtn": lambda: found.__setitem__("rtn", rtn.solve(weight, LEVEL).dense()),
        "textbook loop": lambda: found.__setitem__("textbook loop", textbook(weight, gram, LEVEL)),
    }
    least = seconds(works, turns)
    outputs = (x @ weight.T).square().sum()
    errors = {name: float((x @ (dense - weight).T).square().sum() / outputs) for name, dense in found.items()}
    if abs(errors["gptq"] / errors["textbook loop"] - 1) > AGREE:
        raise RuntimeError(f"the sweeps differ in output error ({errors}), so their times do not compare")
    return {
        **{"shape": [rows, cols], "level": str(LEVEL), "turns": turns, "seconds": _rounded(least)},
        "output_error": _rounded(errors),
        **_rounded({"gptq_to_rtn": least["gptq"] / least["rtn"]}),
        **_rounded({"gptq_to_textbook_loop": least["gptq"] / least["textbook loop"]}),
    }


# ---- probing


def probing(model: str, choices: list[str], turns: int) -> dict[str, Any]:
    """Seconds of a probe as a share of a plain forward of the search items."""
    from trimtab.engine.measure import references, through
    from trimtab.engine.probe import probe, units_of
    from trimtab.lab import Bench
    from trimtab.models.source import open_source

    source = open_source(model)
    bench = Bench(source, calibration=16, items=8)
    stream, search = bench.stream(), bench.test
    menu = {kind: choices for kind in ("linear", "head")}
    units = [u for u in units_of(stream, menu, True, lambda level, site: True) if u.choices]
    reference = references(stream, through(stream, search, bench.chunk), search, bench.task)
    plain = source.materialise()

    @torch.no_grad()
    def forward() -> None:
        for start in range(0, len(search), bench.chunk):
            plain(**search.take(start, start + bench.chunk).inputs, use_cache=False)

    def probes() -> None:
        data = (bench.calibration, search, bench.task, bench.chunk)
        probe(stream, units, *data, reference=reference, step=lambda name, work: work())

    forward()
    least = seconds({"all probes": probes, "one forward": forward}, turns)
    count = sum(len(u.choices) for u in units)
    one = least["all probes"] / count
    return {
        **{"model": model, "choices": choices, "items": len(search), "probes": count, "blocks": len(stream.paths)},
        **{"turns": turns, "seconds": _rounded({"one probe": one, "one forward": least["one forward"]})},
        **_rounded({"probe_to_forward": one / least["one forward"]}),
    }


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="small weights; nothing is recorded")
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark

    shapes = ((256, 256, 2), (256, 1024, 1)) if asked.small else ((2048, 2048, 2), (2048, 8192, 1))
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    row = {
        "benchmark": "speed",
        "sweep": [sweep(*shape) for shape in shapes],
        "probing": [probing("pocket-lm", choices, 1 if asked.small else 2) for choices in MENUS],
        "load_at_start": round(load, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
