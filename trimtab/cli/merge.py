"""`trimtab merge`: many checkpoints into one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import options as o
from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from trimtab.core.method import Joiner


def command(
    models: Annotated[
        list[str], typer.Argument(help="models (folders, hub names), or one recipe.yaml", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="folder of the result", show_default=False)],
    base: Annotated[str | None, typer.Option(help="the model that the others were tuned from")] = None,
    method: Annotated[str, typer.Option(help="see `trimtab methods --family merge`; fields in brackets")] = "linear",
    weight: Annotated[str | None, typer.Option(help="one number for all models, or one each: 0.5,0.3,0.2")] = None,
    density: Annotated[str | None, typer.Option(help="share of changes that is kept, for all or each")] = None,
    scale: Annotated[float | None, typer.Option(help="factor of the merged changes")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; by default the base's")] = None,
    vocabulary: Annotated[str, typer.Option(help="same; union: tokens of all; force: cut to the smallest")] = "same",
    shard: Annotated[str, typer.Option(help="most bytes a file of weights")] = "5GB",
    apply_adapters: Annotated[
        bool, typer.Option("--apply-adapters", help="put models that are adapters onto their models while merging")
    ] = False,
    keep_tasks: Annotated[
        bool, typer.Option("--keep-tasks", help="also keep what each model is made of again (tall-masks, twin-merging)")
    ] = False,
    task: Annotated[str | None, typer.Option(help="make the model of one kept task again, from a merged model")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is in --out")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a merge that was cut off")] = False,
    evaluate: Annotated[
        list[str] | None, typer.Option(help="measure parents and result on this data; may come several times")
    ] = None,
    data: Annotated[str | None, typer.Option(help="for pleas and sn-net: what the models are looked at on")] = None,
    search: Annotated[bool, typer.Option("--search", help="choose coefficients by block on that data")] = False,
    seed: o.Seed = 0,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Merge models into one, streamed from disk to disk; the parents' sizes do not matter to memory."""
    from trimtab.core.budget import parse_bytes
    from trimtab.core.method import Joiner
    from trimtab.merging import Merge, asked_method, asked_recipe, merge

    flags = apply_adapters or keep_tasks or resume or search
    plain = vocabulary == "same" and not flags and not any(x is not None for x in (weight, density, scale, evaluate))
    if task is not None:
        if len(models) != 1 or method != "linear" or not plain or dtype is not None:
            raise UserError("--task makes one kept task again: give one merged model, --out and, if need be, --base")
        _restore(models[0], task, out, base, parse_bytes(shard), overwrite, json)
        return
    if isinstance(joiner := asked_method(method), Joiner):
        if not plain or base is not None:
            raise UserError(f"{method} joins whole models on --data; it takes --dtype and --overwrite beside, no more")
        _join(models, joiner, out, data, dtype, overwrite, json)
        return
    if data is not None:
        raise UserError(f"--data was given, and {method} looks at none; --evaluate measures on data")
    given = {"weight": weight, "density": density, "scale": scale}
    recipe = asked_recipe(models, base, method, given, dtype, vocabulary, seed)
    recipe = dataclasses.replace(recipe, adapters=apply_adapters)
    if search and not evaluate:
        raise UserError("a search needs data to choose by; give it with --evaluate")
    with o.progress(quiet or json) as tell:
        found: dict[str, Any] = {}
        if search and evaluate:
            from trimtab.judging import search as choose

            Merge(recipe, out, parse_bytes(shard), overwrite or resume, keep_tasks)
            recipe, found["search"] = choose(recipe, evaluate, tell)
        report = merge(
            recipe,
            out=out,
            keep_tasks=keep_tasks,
            shard_bytes=parse_bytes(shard),
            resume=resume,
            overwrite=overwrite,
            progress=tell,
        )
        if evaluate:
            from trimtab.judging import evaluate as measure

            found["scores"] = measure(
                [p["name"] for p in report["parents"] if not p["adapter"]] + [report["out"]], evaluate, tell
            )
    report |= found
    if json:
        o.print_json(report)
        return
    names = ", ".join(f"{p['name']}{' (base)' if p['base'] else ''}" for p in report["parents"])
    print(f"merged:   {names}\nmethod:   {report['method']}\nresult:   {report['out']}, {report['bytes'] / 1e6:.4g} MB")
    if kept := report.get("tasks"):
        own = ", ".join(f"{name} {size / 1e6:.4g} MB" for name, size in kept["own_bytes"].items())
        print(f"tasks:    {kept['shared_bytes'] / 1e6:.4g} MB for all, {own}")
    if chosen := report.get("search"):
        said = ", ".join(f"{k} {v:.4g}" for k, v in chosen.items() if isinstance(v, float))
        print(f"search:   mean loss on the search items: {said}")
    for row in report.get("scores", ()):
        print(f"{row['metric']:>12} {row['value']:9.4g}   {row['data']}   {row['model']}")


def _restore(model: str, task: str, out: Path, base: str | None, shard: int, overwrite: bool, json: bool) -> None:
    from trimtab.merging import restore

    report = restore(model, task, out=out, base=base, shard_bytes=shard, overwrite=overwrite)
    if json:
        o.print_json(report)
        return
    print(f"restored: {task} of {model}\nmethod:   {report['method']}")
    print(f"result:   {report['out']}, {report['bytes'] / 1e6:.4g} MB")


def _join(
    models: list[str], method: Joiner, out: Path, data: str | None, dtype: str | None, overwrite: bool, json: bool
) -> None:
    from trimtab.joining import join

    report = join(models, method=method, out=out, data=data, dtype=dtype, overwrite=overwrite)
    if json:
        o.print_json(report)
        return
    print(f"joined:   {', '.join(report['parents'])}\nmethod:   {report['method']}")
    print(f"result:   {report['out']}, {report['bytes'] / 1e6:.4g} MB, {report['form']}")
