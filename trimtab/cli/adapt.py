"""`trimtab adapt`: train a small delta within a memory budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import options as o


def command(
    model: Annotated[
        str, typer.Argument(help="pocket, a folder, a hub name, or an artifact of a fit", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(help="JSON lines of messages, prompt and completion, or text; a text file; images")
    ] = None,
    method: Annotated[str, typer.Option(help="see `trimtab methods --family adapt`; auto tries some")] = "lora",
    rank: Annotated[int, typer.Option(min=1, help="rank, or columns, of each adapted linear")] = 16,
    level: Annotated[str, typer.Option(help="level in place of a rank, for methods that take one: 3b/g64, w25%")] = "",
    targets: Annotated[str, typer.Option(help="roles, names or globs of linears, like q,v; empty: the method's")] = "",
    memory: Annotated[str | None, typer.Option(help="peak memory of the training, like 6GB")] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="windows, or images, of a step")] = 4,
    rate: Annotated[float, typer.Option(help="largest learning rate")] = 1e-3,
    length: Annotated[int, typer.Option(min=8, max=1_048_576, help="tokens in a window")] = 256,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="several examples in a window")] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad lines out and count them")] = False,
    fresh_head: Annotated[
        bool, typer.Option("--fresh-head", help="a classifier's head for the data's classes")
    ] = False,
    dtype: Annotated[str, typer.Option(help="of the frozen weights: fp32 or bf16")] = "fp32",
    every: Annotated[int, typer.Option(min=0, help="steps between two checkpoints; 0: one at the end")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the run; by default runs/<model>-adapted")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write curves for TensorBoard into --out")] = False,
    seed: o.Seed = 0,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train a small delta on a frozen model, and say what it did to data that it never saw."""
    from trimtab.adapting import adapt

    asked: dict[str, Any] = {
        **{"memory": memory, "steps": steps, "batch": batch, "rate": rate, "length": length, "pack": pack},
        **{"skip_bad": skip_bad, "fresh_head": fresh_head, "dtype": dtype, "every": every, "seed": seed},
        "tensorboard": tensorboard,
        "targets": tuple(t.strip() for t in targets.split(",") if t.strip()),
    }
    with o.progress(quiet or json) as tell:
        found = adapt(
            model, data, method=method, level=level or f"r{rank}", out=out, resume=resume, progress=tell, **asked
        ).report
    if json:
        o.print_json(found)
        return
    o.print_quality(found)
    where = f"on {len(found['sites'])} linears"
    print(f"{found['trained']} numbers trained by {found['method']} at {found['level']} {where}")
    print(f"{found['saved_bytes'] / 1e6:.0f} MB kept for the backward pass, {found['peak_bytes'] / 1e6:.0f} MB peak")
    print(f"adapter: {found['adapter']} ({found['adapter_bytes'] / 1e6:.2f} MB)")
    if found["artifact"]:
        print(f"merged, at the same levels: {found['artifact']}")
