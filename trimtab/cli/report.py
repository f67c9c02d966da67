"""`trimtab report`: the evidence of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trimtab.cli import options as o


def command(run: Annotated[Path, typer.Argument(help="folder of the run")], json: o.Json = False) -> None:
    """Print the evidence of a run: verdict, front, plan; the page with plots is report.html in the run's folder."""
    from trimtab.loading import read_report

    found = read_report(run)
    if json:
        o.print_json(found)
        return
    if "networks" in found:
        from trimtab.report.networks import print_found

        print_found(found)
    else:
        from trimtab.report.text import print_report

        print_report(found, sites=True)
    print(f"\npage with plots: {run / 'report.html'}")
