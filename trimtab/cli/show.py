"""`trimtab show`: all about one method."""

from __future__ import annotations

from typing import Annotated

import typer

from trimtab.cli import options as o


def command(name: Annotated[str, typer.Argument(help="a method, like gptq")], json: o.Json = False) -> None:
    """Show a method's description, fields, card and evidence."""
    from trimtab.catalogue import about

    found = about(name)
    if json:
        o.print_json(found)
        return
    print(f"{found['name']} ({found['family']}, verb `{found['verb']}`, {found['paper'] or 'baseline'})\n")
    print(found["doc"] + "\n")
    for key in ("requires", "leaves", "keeps", "statistics", "levels", "kinds"):
        print(f"{key + ':':12} {', '.join(found[key]) or '-'}")
    for field in found["fields"]:
        print(f"field:       {field['name']} = {field['default']!r}")
    print(
        f"file:        {found['file']}\nclaim:       {found['claim']}\nverdict:     {found['verdict']} "
        f"({found['record'] or 'no record'}{', stale: not of the present code' if found['stale'] else ''})"
    )
    for check in found["checks"]:
        print(
            f"  {'holds' if check['held'] else 'fails'}: {check['say']} ({check['left']:.4g} against "
            f"{check['right']:.4g})"
        )
