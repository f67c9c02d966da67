"""`trimtab search`: one elastic network, and the best of its sub-networks for a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli import options as o


def command(
    space: Annotated[
        str | None,
        typer.Argument(help="mobile-cnn, vit, tiny-llm, a Python file, or module:function", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--from", help="make this trained model elastic, in place of a space")
    ] = None,
    data: o.Data = None,
    size: Annotated[str | None, typer.Option(help="bytes of the weights, like 300kB")] = None,
    latency: Annotated[str | None, typer.Option(help="time of a forward of --items items here, like 5ms")] = None,
    flops: Annotated[
        float | None, typer.Option(help="of a forward, multiply and add counted as two, like 40e6")
    ] = None,
    parameters: Annotated[float | None, typer.Option(help="how many at most, like 1e6")] = None,
    quality: Annotated[str | None, typer.Option(help="least share of the largest network's metric, like 98%")] = None,
    device: Annotated[str, typer.Option(help="here, or the file of a device profile of this machine")] = "here",
    levels: Annotated[str, typer.Option(help="with --from: levels that each block may have, like 8b/row,4b/g64")] = "",
    method: Annotated[
        str | None, typer.Option(help="how the elastic network is trained; by default uniform-sampling, or instatune")
    ] = None,
    searcher: Annotated[
        str,
        typer.Option(help="what proposes sub-networks: linas, evolution, random-search, optuna-tpe, ..."),
    ] = "linas",
    evaluations: Annotated[int, typer.Option(min=1, help="sub-networks that are scored")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="of the training")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="items of a step")] = 64,
    rate: Annotated[float, typer.Option(help="largest learning rate")] = 3e-3,
    decay: Annotated[float, typer.Option(min=0, help="decoupled weight decay")] = 0.01,
    length: Annotated[int, typer.Option(min=8, max=1_048_576, help="tokens in a window of text")] = 128,
    image_size: Annotated[int, typer.Option(min=4, max=4096, help="that a folder's images are resized to")] = 32,
    items: Annotated[int, typer.Option(min=1, help="items of the forward that costs are for")] = 1,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="that time is measured with; 0: as torch has them")] = 0,
    describe: Annotated[
        bool, typer.Option("--describe", help="say what there is to choose and what it costs; no more")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="folder of the run; by default runs/<space>-search")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    seed: o.Seed = 0,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Train one elastic network, and take the sub-network that fits the budget, as plain torch."""
    from trimtab.core.budget import Budget
    from trimtab.report.networks import print_found
    from trimtab.searching import describe as described
    from trimtab.searching import search

    asked: dict[str, Any] = {
        **{"model": model, "budget": Budget.of(size=size, latency=latency, quality=quality), "device": device},
        **{"flops": flops, "parameters": parameters, "method": method, "searcher": searcher, "steps": steps},
        **{"evaluations": evaluations, "batch": batch, "rate": rate, "decay": decay, "length": length},
        **{
            "levels": tuple(t for t in levels.split(",") if t),
            "size": image_size,
            "items": items,
            "threads": threads,
            "seed": seed,
        },
    }
    with o.progress(quiet or json) as tell:
        if describe:
            said = described(space, data, progress=tell, **asked)
        else:
            found = search(space, data, out=out, resume=resume, progress=tell, **asked).report
    if describe:
        o.print_json(said) if json else print(said["text"])
    elif json:
        o.print_json(found)
    else:
        print_found(found)
