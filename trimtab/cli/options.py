"""Options that several commands share, and what they print with."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Model = Annotated[
    str, typer.Argument(help="pocket, a Hugging Face folder, a hub name, or module:function", show_default=False)
]
Size = Annotated[str | None, typer.Option(help="bytes on disk, like 60MB")]
Memory = Annotated[str | None, typer.Option(help="peak memory of a run, like 400MB")]
Latency = Annotated[str | None, typer.Option(help="time of one item here, of text a --length prompt, like 15ms")]
Quality = Annotated[str | None, typer.Option(help="least share of the original's metric, like 98%")]
Data = Annotated[str | None, typer.Option(help="text, JSON lines, .npz or folder of images, or module:function")]
Effort = Annotated[str, typer.Option(help="quick, standard or thorough")]
Target = Annotated[str, typer.Option(help="what must load the result: native, gguf or compressed-tensors")]
Methods = Annotated[str, typer.Option("--methods", help="methods to search over, like gptq,vptq; empty: the menu's")]
Allocator = Annotated[str, typer.Option(help="allocator, see `trimtab methods --family alloc`")]
Length = Annotated[int, typer.Option(min=8, max=1_048_576, help="tokens in a window of text")]
Context = Annotated[int, typer.Option(min=1, help="context that a memory budget is for")]
Batch = Annotated[int, typer.Option(min=1, help="batch that a memory budget is for")]
Couple = Annotated[
    bool, typer.Option("--couple/--no-couple", help="q, k, v share a level, and gate and up, as fused kernels need it")
]
Padding = Annotated[
    bool, typer.Option("--padding/--no-padding", help="allow groups that do not divide a site's columns")
]
Seed = Annotated[int, typer.Option(min=0, help="of everything random")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress")]


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1, default=str))


def print_quality(found: dict[str, Any]) -> None:
    """Notes of a training, and the metric before and after it on what was kept apart."""
    for note in found["notes"]:
        print(note)
    spans = {k: f"{found[k]['value']:.4g} [{found[k]['low']:.4g}, {found[k]['high']:.4g}]" for k in ("before", "after")}
    low, high = found["difference"]
    print(f"{found['metric']} on {found['held_out']} held-out items: {spans['before']} before, {spans['after']} after")
    print(f"paired difference {low:+.4g} to {high:+.4g} (95 %): {found['verdict']}")


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress line on standard error with the time left; lines at most every few seconds where that is no
    terminal.
    """
    if quiet:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        said: dict[str, float] = {}

        def line(what: str, done: int, total: int) -> None:
            now = time.monotonic()
            if done >= total or now - said.get(what, 0.0) > 10:
                said[what] = now
                print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield update
