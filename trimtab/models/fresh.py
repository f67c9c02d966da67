"""The fresh process of the round-trip gate: load an artifact, run it on stored inputs, and print how far its outputs
are from the stored ones.

    python -m trimtab.models.fresh ARTIFACT PROBE.safetensors [--context N] [--batch N] [--threads N] [--packed]
    [--model module:function]

Prints one JSON object: `prefill` and `decode` (largest difference as a share of the largest output),
`tokens_per_second` of decoding, `load_seconds`, and `peak_bytes`: most memory held above that of the idle process, all
in exact arithmetic on torch; then `seconds` of the item stored under `time.`, of text as `trimtab run` reads a prompt,
and `engine`: what ran it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from pathlib import Path
from typing import Any


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
    use_threads(args.threads)
    print(json.dumps(exact(args) | as_run(args)))


def use_threads(threads: int) -> None:
    """So many threads for torch and for the kernels; 0: as many as they take by themselves."""
    import torch

    from trimtab.kernels.native import native

    if threads:
        torch.set_num_threads(threads)
        if (kernels := native()) is not None:
            kernels.set_threads(threads)


def stored(probe: Path, kind: str) -> dict[str, Any]:
    """Tensors of that kind in the probe, by name."""
    from trimtab.formats.checkpoint import Checkpoint

    file = Checkpoint(probe)
    return {n.removeprefix(kind): file.read(n) for n in file.names() if n.startswith(kind)}


def exact(args: argparse.Namespace) -> dict[str, Any]:
    """How far the outputs are from the stored ones, and what it took."""
    import torch

    from trimtab.engine.measure import forget_peak, held_bytes, peak_bytes
    from trimtab.engine.run import decoded, worst
    from trimtab.models.artifact import build, make_skeleton, open_artifact
    from trimtab.models.source import open_source

    inputs, (expected,) = stored(args.probe, "input."), stored(args.probe, "output").values()
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
    result = {"load_seconds": time.perf_counter() - start}
    with torch.no_grad():
        result["prefill"] = worst(expected, called(model, inputs).float())
        if contents.manifest["task"] == "causal-lm":
            start = time.perf_counter()
            result["decode"] = worst(expected, decoded(model, inputs["input_ids"]))
            result["tokens_per_second"] = inputs["input_ids"].numel() / (time.perf_counter() - start)
            length = min(args.context, getattr(model.config, "max_position_embeddings", args.context))
            last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
            model(input_ids=torch.zeros(args.batch, length, dtype=torch.long), use_cache=True, **last)
    return {**result, "peak_bytes": max(0, peak_bytes() - idle)}


def called(model: Any, inputs: dict[str, Any]) -> Any:
    """The output that counts for inputs, by name where the model's forward knows their names."""
    from trimtab.engine.run import main_output

    named = "input_ids" in inputs or (hasattr(model, "config") and hasattr(model.config, "architectures"))
    return main_output(model(**inputs) if named else model(*inputs.values()))


def as_run(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the timed item, of text as `trimtab run` reads a prompt: until the next token is known."""
    import torch

    from trimtab.engine.run import quiet_seconds_of
    from trimtab.loading import load
    from trimtab.models.artifact import open_artifact

    inputs = stored(args.probe, "time.")
    writes = open_artifact(args.artifact).manifest["task"] == "causal-lm"
    loaded = load(args.artifact, model=args.model, packed=args.packed or writes)
    if not writes:
        with torch.no_grad():
            return {"seconds": quiet_seconds_of(lambda: called(loaded.model, inputs)), "engine": loaded.engine}
    tokens = inputs["input_ids"][0].tolist()
    writer = loaded.writer(len(tokens))

    def read() -> None:
        writer.forget(0)
        writer.extend(0, tokens)

    return {"seconds": quiet_seconds_of(read), "engine": loaded.engine}


if __name__ == "__main__":
    main()
