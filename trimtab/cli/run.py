"""`trimtab run`: write text, or name classes, with an artifact or a model."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options as o


def command(
    artifact: Annotated[str, typer.Argument(help="an artifact, the folder of a run, or a model")],
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
    tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="at most so many new tokens")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: the likeliest token each time")] = 0.0,
    seed: o.Seed = 0,
    model: Annotated[
        str | None, typer.Option(help="module:function, for an artifact of a Python function's model")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="keep weights packed in memory: least memory, slower")
    ] = False,
    json: o.Json = False,
) -> None:
    """Load and run it here."""
    import time

    from trimtab.loading import load

    start = time.perf_counter()
    loaded = load(artifact, model=model, packed=packed)
    ready = time.perf_counter()
    text = ""
    for piece in loaded.stream(prompt, tokens, temperature=temperature, seed=seed):
        text += piece
        if not json:
            print(prompt + piece if piece is text else piece, end="", flush=True)
    if json:
        seconds = time.perf_counter() - ready
        o.print_json({"prompt": prompt, "text": text, "load_seconds": ready - start, "seconds": seconds})
    else:
        print()
