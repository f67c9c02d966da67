"""Train every network of the small space of `trimtab.tasks.digit_nets`, which searches are then replayed on.

python benchmarks/digit_nets.py            # some minutes; appends to records/benchmarks/digit-nets.jsonl
python benchmarks/digit_nets.py --small    # the first few, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse

import torch

from trimtab.catalogue import keep_benchmark
from trimtab.parts.breeding import every
from trimtab.tasks.digit_nets import BATCH, DOMAIN, IMAGES, STEPS, scores


def main() -> None:
    """Train and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    torch.set_num_threads(1)
    genomes = list(every(DOMAIN))[: 4 if small else None]
    seen, unseen = zip(*map(scores, genomes), strict=True)
    row = {"benchmark": "digit-nets", "images": IMAGES, "steps": STEPS, "batch": BATCH}
    rounded = {name: [round(e, 3) for e in errors] for name, errors in (("error", seen), ("unseen", unseen))}
    keep_benchmark(row | rounded, kept=not small)


if __name__ == "__main__":
    main()
