"""`trimtab train`: train all of a model, with a lean optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import options as o


def command(
    model: Annotated[str, typer.Argument(help="pocket, a folder, or a hub name", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="JSON lines of messages, prompt and completion, or text; a text file; images")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="update rule with its fields, see `trimtab methods --family optim`")
    ] = "apollo-mini",
    gradient: Annotated[str | None, typer.Option(help="in place of the backward pass, like mezo or wta-crs")] = None,
    freeze: Annotated[str | None, typer.Option(help="which layers are frozen when, like lisa")] = None,
    form: Annotated[str | None, typer.Option(help="what stands for each matrix of the blocks, like sltrain")] = None,
    rank: Annotated[int, typer.Option(min=1, help="rank of the form")] = 16,
    fresh: Annotated[bool, typer.Option("--fresh", help="begin with weights drawn anew")] = False,
    memory: Annotated[str | None, typer.Option(help="peak memory of the training, like 6GB")] = None,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="windows, or images, of a step")] = 4,
    rate: Annotated[float, typer.Option(help="largest learning rate")] = 1e-3,
    decay: Annotated[float, typer.Option(min=0, help="decoupled weight decay")] = 0.0,
    length: Annotated[int, typer.Option(min=8, max=1_048_576, help="tokens in a window")] = 256,
    pack: Annotated[bool, typer.Option("--pack/--no-pack", help="several examples in a window")] = True,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave bad lines out and count them")] = False,
    fresh_head: Annotated[
        bool, typer.Option("--fresh-head", help="a classifier's head for the data's classes")
    ] = False,
    every: Annotated[int, typer.Option(min=0, help="steps between two checkpoints; 0: one at the end")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the run; by default runs/<model>-trained")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write curves for TensorBoard into --out")] = False,
    seed: o.Seed = 0,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train all of a model, and say what it did to data that it never saw."""
    from trimtab.training import train

    asked: dict[str, Any] = {
        **{"optimizer": optimizer, "gradient": gradient, "freeze": freeze, "form": form},
        **{"level": f"r{rank}", "fresh": fresh, "memory": memory},
        **{"steps": steps, "batch": batch, "rate": rate, "decay": decay, "length": length, "pack": pack},
        **{"skip_bad": skip_bad, "fresh_head": fresh_head, "every": every, "seed": seed, "tensorboard": tensorboard},
    }
    with o.progress(quiet or json) as tell:
        found = train(model, data, out=out, resume=resume, progress=tell, **asked).report
    if json:
        o.print_json(found)
        return
    o.print_quality(found)
    print(f"{found['trained']} numbers trained by {found['optimizer']}, {found['state_bytes'] / 1e6:.2f} MB of state")
    print(f"{found['saved_bytes'] / 1e6:.0f} MB kept for the backward pass, {found['peak_bytes'] / 1e6:.0f} MB peak")
    print(f"model: {found['folder']} ({found['bytes'] / 1e6:.2f} MB)")
