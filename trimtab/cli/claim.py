"""`trimtab claim`: re-run the check of a paper's claim here, and append the result to its record."""

from __future__ import annotations

import math
import sys
from typing import Annotated

import typer

from trimtab.cli import options as o
from trimtab.core.errors import UserError


def command(
    name: Annotated[str | None, typer.Argument(help="a method, like gptq")] = None,
    every: Annotated[bool, typer.Option("--all", help="every claim, one after the other")] = False,
    stale: Annotated[bool, typer.Option("--stale", help="every claim without a record of the present code")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="append nothing; exit code 3 if a verdict is worse than the recorded one")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="start no claim after so many minutes; 40 with --stale")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a claim over its seeds; the verdict is computed and kept with machine, versions and hashes."""
    from trimtab import catalogue

    asked = [*([] if name is None else [name]), *(["--all"] if every else []), *(["--stale"] if stale else [])]
    if len(asked) != 1:
        raise UserError(
            f"which claims? given: {', '.join(asked) or 'nothing'}; give one of a method, as in "
            "`trimtab claim gptq`, --all and --stale"
        )
    names = catalogue.claimed() if every else catalogue.stale() if stale else asked
    limit = minutes if minutes is not None else 40.0 if stale else math.inf
    with o.progress(quiet or json) as tell:
        rows, left_out = catalogue.run_claims(names, limit, check, tell)
    if left_out:
        print(
            f"trimtab: left out, as {limit:g} minutes are over: {', '.join(left_out)}; --minutes sets the limit",
            file=sys.stderr,
        )
    if json:
        o.print_json(rows[0] if rows and name is not None else rows)
    else:
        for row in rows:
            beside = ""
            if check:
                beside = f", {'worse than recorded' if row['worse'] else 'recorded'}: {row['recorded'] or 'nothing'}"
            print(f"{row['method']}: {row['verdict']}{beside}  ({row['statement']})")
            for found in row["checks"]:
                half = f" ± {found['half_width']:.2g}" if found["half_width"] else ""
                print(
                    f"  {'holds' if found['held'] else 'fails'}: {found['say']}: {found['left']:.5g} against "
                    f"{found['right']:.5g} (difference {found['difference']:+.3g}{half})"
                )
        if stale and not names:
            print("no claim is stale, and none is without a record")
    if check and any(row["worse"] for row in rows):
        raise typer.Exit(3)
