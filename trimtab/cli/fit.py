"""`trimtab fit`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import options as o


def command(
    model: o.Model,
    size: o.Size = None,
    memory: o.Memory = None,
    latency: o.Latency = None,
    quality: o.Quality = None,
    data: o.Data = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; by default runs/<model>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    plan: Annotated[
        str | None, typer.Option(help="carry out this plan (text, or a .toml file) in place of a search")
    ] = None,
    effort: o.Effort = "standard",
    target: o.Target = "native",
    methods: o.Methods = "",
    allocator: o.Allocator = "milp",
    length: o.Length = 256,
    context: o.Context = 1024,
    batch: o.Batch = 1,
    couple: o.Couple = True,
    padding: o.Padding = True,
    heal: Annotated[int, typer.Option(min=0, help="steps that train the result towards the original")] = 0,
    seed: o.Seed = 0,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Search, compress, measure, verify and save: the best model that fits the budget, with the evidence."""
    from trimtab.core.budget import Budget
    from trimtab.fitting import fit, read_plan

    budget = Budget.of(size, memory, latency, quality)
    with o.progress(quiet or json) as tell:
        result = fit(
            model,
            budget=budget,
            out=out,
            resume=resume,
            progress=tell,
            data=data,
            plan=read_plan(plan),
            effort=effort,
            target=target,
            methods=tuple(m for m in methods.split(",") if m),
            allocator=allocator,
            length=length,
            context=context,
            batch=batch,
            couple=couple,
            padding=padding,
            heal=heal,
            seed=seed,
        )
    if json:
        o.print_json(result.report())
    else:
        from trimtab.report.text import print_report

        print_report(result.report())
    if not result.met:
        raise typer.Exit(3)
