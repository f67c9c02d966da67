"""`trimtab claim`: re-run the check of a paper's claim here, and append the result to its record."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options as o
from trimtab.core.errors import UserError


def command(
    name: Annotated[str | None, typer.Argument(help="a method, like gptq")] = None,
    every: Annotated[bool, typer.Option("--all", help="every claim, one after the other")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure a claim over its seeds; the verdict is computed and kept with machine, versions and data hashes."""
    from trimtab.catalogue import claimed, run_claim

    if name is None and not every:
        raise UserError("which claim? name a method, like `trimtab claim gptq`, or ask for all with --all")
    records = []
    with o.progress(quiet or json) as tell:
        for method in claimed() if every else [name or ""]:
            records.append(run_claim(method, progress=tell))
    if json:
        o.print_json(records if every else records[0])
        return
    for record in records:
        print(f"{record['method']}: {record['verdict']}  ({record['statement']})")
        for check in record["checks"]:
            half = f" ± {check['half_width']:.2g}" if check["half_width"] else ""
            print(
                f"  {'holds' if check['held'] else 'fails'}: {check['say']}: {check['left']:.5g} against "
                f"{check['right']:.5g} (difference {check['difference']:+.3g}{half})"
            )
