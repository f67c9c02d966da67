"""The fresh process of the round-trip gate: load an artifact, run it on stored inputs, and print how far its outputs
are from the stored ones.

    python -m trimtab.models.fresh ARTIFACT PROBE.safetensors [--context N] [--batch N] [--threads N] [--packed]
    [--model module:function]

Prints one JSON object: `prefill` and `decode` (largest difference as a share of the largest output), `seconds` of one
forward of the item stored under `time.`, `tokens_per_second` of
decoding, `load_seconds`, and `peak_bytes`: most memory held above that of the idle process.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from pathlib import Path


def main() -> None:
    """Run the check that the arguments describe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("probe", type=Path)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--model")
    parser.add_argument("--packed", action="store_true")
    args = parser.parse_args()
    import torch

    from trimtab.engine.measure import forget_peak, held_bytes, peak_bytes
    from trimtab.engine.run import decoded, main_output, seconds_of, worst
    from trimtab.formats.checkpoint import Checkpoint
    from trimtab.models.artifact import build, make_skeleton, open_artifact
    from trimtab.models.source import open_source

    if args.threads:
        torch.set_num_threads(args.threads)
    stored = Checkpoint(args.probe)
    inputs, timed = (
        {n.removeprefix(p): stored.read(n) for n in stored.names() if n.startswith(p)} for p in ("input.", "time.")
    )
    contents = open_artifact(args.artifact)
    skeleton = open_source(args.model).skeleton if args.model else None
    torch.nn.functional.linear(
        torch.ones(64, 64), torch.ones(64, 64)
    )  # starts the threads and their buffers, which no model is to blame for
    (skeleton or (lambda: make_skeleton(contents)))()  # imports what the model needs
    forget_peak()
    idle = held_bytes()
    start = time.perf_counter()
    model = build(contents, skeleton, packed=args.packed)
    loaded = time.perf_counter() - start
    named = "input_ids" in inputs or (hasattr(model, "config") and hasattr(model.config, "architectures"))
    with torch.no_grad():

        def call(items: dict[str, torch.Tensor]) -> torch.Tensor:
            return main_output(model(**items) if named else model(*items.values()))

        expected = stored.read("output")
        result = {"prefill": worst(expected, call(inputs).float()), "load_seconds": loaded}
        result["seconds"] = seconds_of(lambda: call(timed))
        if contents.manifest["task"] == "causal-lm":
            start = time.perf_counter()
            result["decode"] = worst(expected, decoded(model, inputs["input_ids"]))
            result["tokens_per_second"] = inputs["input_ids"].numel() / (time.perf_counter() - start)
            length = min(args.context, getattr(model.config, "max_position_embeddings", args.context))
            last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
            model(input_ids=torch.zeros(args.batch, length, dtype=torch.long), use_cache=True, **last)
    result["peak_bytes"] = max(0, peak_bytes() - idle)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
