"""`trimtab export`: an artifact in a format that other tools load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import options as o


def command(
    artifact: Annotated[Path, typer.Argument(help="an artifact, or the folder of a run")],
    to: Annotated[str, typer.Option("--to", help="hf, gguf or compressed-tensors")],
    out: Annotated[Path, typer.Option(help="folder (hf, compressed-tensors) or file (gguf) to write")],
    dtype: Annotated[str, typer.Option(help="hf: type of the weights, bf16, fp16 or fp32")] = "bf16",
    type: Annotated[str, typer.Option(help="gguf: F16, Q8_0, Q4_0 or Q4_1, for what the plan leaves open")] = "F16",
    json: o.Json = False,
) -> None:
    """Write a plain Hugging Face folder, a GGUF file or a compressed-tensors folder."""
    from trimtab.exporting import export

    found = export(artifact, to, out, dtype=dtype, type=type)
    if json:
        o.print_json(found)
    else:
        print(", ".join(f"{k}: {v}" for k, v in found.items()))
