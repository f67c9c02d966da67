"""`trimtab methods`: what exists, what each needs, what the evidence says."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options as o


def command(
    family: Annotated[str | None, typer.Option(help="only this family, like quant")] = None, json: o.Json = False
) -> None:
    """List the methods, with the verdict of the newest run of each one's claim; stale: not of the present code."""
    from trimtab.catalogue import rows

    found = rows(family)
    if json:
        o.print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("name", "family", "catalogue", "paper", "verb", "requires", "leaves", "verdict"):
        table.add_column(column, no_wrap=column in ("name", "verdict"))
    for row in found:
        values = (
            row["name"],
            row["family"],
            ", ".join(map(str, row["catalogue"])) or "baseline",
            row["paper"],
            row["verb"],
        )
        verdict = f"{row['verdict']} (stale)" if row["stale"] else row["verdict"]
        table.add_row(*values, ", ".join(row["requires"]), ", ".join(row["leaves"]), verdict)
    Console().print(table)
