"""What a step of training takes in memory: forward passes alone, zeroth-order steps, and backward.

The shipped language model, 8 windows of 256 tokens, two steps of each kind in a process of its own. `peak_bytes` is the
most that the process held above what it held with the model loaded, `to_forward` its whole peak as a share of that of
forward passes alone, weights and interpreter included. A JSON line is printed and appended to
records/benchmarks/estimators.jsonl.

    python benchmarks/estimators.py          # two minutes
    python benchmarks/estimators.py --small  # two kinds; nothing is recorded
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

KINDS = {
    "forward": ("", ""),
    "mezo": ("sgd", "mezo"),
    "mezo with momentum": ("sgd(momentum=0.9)", "mezo"),
    "sparse-mezo": ("sgd", "sparse-mezo"),
    "zo-conservative": ("sgd", "zo-conservative"),
    "forward-gradient": ("sgd", "forward-gradient"),
    "backward with sgd": ("sgd", ""),
    "backward with adamw": ("adamw", ""),
    "wta-crs with adamw": ("adamw", "wta-crs"),
    "ghost-clipping with adamw": ("adamw", "ghost-clipping"),
}


def measured(kind: str) -> dict[str, float]:
    """Peaks of two steps of one kind, in this process."""
    import torch

    from trimtab.adapting import open_base
    from trimtab.core.plan import parse_method
    from trimtab.engine.measure import forget_peak, held_bytes, peak_bytes
    from trimtab.engine.memory import keep_freed_memory
    from trimtab.engine.train import Recipe, train
    from trimtab.parts.perturbing import mean_loss
    from trimtab.parts.stepping import Stepping
    from trimtab.tasks.training import Prediction

    optimizer, gradient = KINDS[kind]
    model: Any = open_base("pocket-lm").model
    tokens = torch.randint(0, 4096, (8, 256), generator=torch.Generator().manual_seed(0))
    loss = Prediction({"input_ids": tokens}, tokens, {"use_cache": False})
    keep_freed_memory(1 << 20)  # as the training loop does for forward passes
    mean_loss([lambda: loss.items(model, torch.arange(1))])  # what is made once is there
    forget_peak()
    held = held_bytes()
    if kind == "forward":
        for _ in range(4):
            mean_loss([lambda: loss.items(model, torch.arange(8))])
    else:
        model.requires_grad_(True)
        optimiser = Stepping(model.parameters(), parse_method(optimizer), 1e-6)  # type: ignore[arg-type]
        estimator: Any = parse_method(gradient) if gradient else None
        train(model, loss, 8, Recipe(steps=2, batch=8, rate=1e-6), optimiser, gradient=estimator)
    return {"peak_bytes": peak_bytes() - held, "whole": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two kinds; nothing is recorded")
    parser.add_argument("--kind", default="", help="one, in this process")
    asked = parser.parse_args()
    if asked.kind:
        print(json.dumps(measured(asked.kind)))
        return
    from trimtab.catalogue import keep_benchmark

    found: dict[str, dict[str, float]] = {}
    for kind in list(KINDS)[: 2 if asked.small else None]:
        line = [sys.executable, __file__, "--kind", kind]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    forward = found["forward"]["whole"]
    for row in found.values():
        row["to_forward"] = float(f"{row.pop('whole') / forward:.4g}")
    keep_benchmark({"benchmark": "estimators", "found": found}, kept=not asked.small)


if __name__ == "__main__":
    main()
