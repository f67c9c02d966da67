"""Predicted beside measured: the seconds of a prompt and of a written token, and the memory, for many models and plans.

The predictions know nothing but the machine's profile, which is measured on single operations just before. The points
are those of the claim of `roofline` (claims/hw/roofline.py), which `trimtab claim roofline` records over several seeds;
this prints the table of errors point by point, for any number of threads. A JSON line is printed and appended to
records/benchmarks/price.jsonl.

    python benchmarks/price.py                # some minutes
    python benchmarks/price.py --threads 1    # seconds of the processor: for a machine that other work shares
    python benchmarks/price.py --small        # two small models, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
from typing import Any

from trimtab.catalogue import _module, claim_files
from trimtab.kernels import profile


def line(point: Any) -> str:
    """A point with its errors in words."""
    errors = {what: f"{point.error(what):+.0%}" for what in ("decode", "prefill", "bytes")}
    return (
        f"{point.model:14} {point.level:7} x{point.batch} at {point.context:3}: decode {1e3 * point.decode:8.3f} ms "
        f"({errors['decode']}), prefill {1e3 * point.prefill:8.2f} ms ({errors['prefill']}), "
        f"{point.bytes / 1e6:6.1f} MB ({errors['bytes']})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=profile.cores())
    parser.add_argument("--small", action="store_true", help="two small models; nothing is recorded")
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark

    claim = _module(claim_files()["roofline"])
    device = profile.measure(asked.threads, asked.small, claim.LEVELS)
    with profile.threads_set(asked.threads):
        done = claim.points(device, small=asked.small, tell=lambda point: print(line(point), flush=True))
    found = claim.summary(done)
    row = {
        **{"benchmark": "price", "threads": asked.threads, **{k: float(f"{v:.4g}") for k, v in found.items()}},
        "table": [[float(f"{v:.4g}") if isinstance(v, float) else v for v in point] for point in done],
        **{"columns": list(claim.Point._fields)},
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
