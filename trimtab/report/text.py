"""The evidence in a terminal."""

from __future__ import annotations

from typing import Any

from trimtab.core.budget import say_bytes


def print_report(report: dict[str, Any], sites: bool = False) -> None:
    """Print verdict, the three points, the front and where the artifact lies; with `sites` the level of each."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    budget = ", ".join(f"{k} {_limit(k, v)}" for k, v in report["budget"].items()) or "none"
    console.print(f"\n[bold]{report['model']}[/] ({report['task']}), budget: {budget}", highlight=False)
    table = Table(
        box=None,
        header_style="bold",
        title="held-out data, never seen by the search",
        title_justify="left",
        title_style="dim",
    )
    for column, side in (
        ("", "left"),
        ("size", "right"),
        (report["best"]["metric"], "right"),
        ("95 % interval", "right"),
        ("kept", "right"),
        ("plan", "left"),
    ):
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    points = {label: report.get(label) for label in ("original", "best", "uniform")}
    points["unhealed"] = (report.get("healing") or {}).get("before")
    for label, point in points.items():
        if point:
            table.add_row(*_cells(label, point))
    console.print(table, highlight=False)
    if report["front"]:
        front = Table(
            box=None,
            header_style="bold",
            title="front, measured on the search data",
            title_justify="left",
            title_style="dim",
        )
        for column, side in (
            ("", "left"),
            ("size", "right"),
            (report["best"]["metric"], "right"),
            ("95 % interval", "right"),
            ("kept", "right"),
        ):
            front.add_column(column, justify=side)  # type: ignore[arg-type]
        for point in sorted(report["front"], key=lambda p: p["bytes"]):
            front.add_row(*_cells(point["name"], point)[:5])
        console.print(front, highlight=False)
    if sites:
        levels = Table(box=None, header_style="bold")
        for column in ("site", "level", "method", "bytes", "bits a weight"):
            levels.add_column(column)
        for row in report["sites"]:
            levels.add_row(
                row["path"], row["level"], row["method"] or "as it was", say_bytes(row["bytes"]), f"{row['bits']:.2f}"
            )
        console.print(levels, highlight=False)
    gate = report["gate"]
    decode = f", token by token {gate['decode']:.1e}" if "decode" in gate else ""
    console.print(f"verdict:  {report['verdict']}", highlight=False)
    console.print(
        f"checked:  a fresh process gives the same outputs (largest difference {gate['prefill']:.1e} of the "
        f"largest{decode})",
        highlight=False,
    )
    if (run := report.get("compiled") or {}).get("to_exact"):
        low, high = run["to_exact"]
        console.print(
            f"as run:   {run['metric']} {run['value']:.4g} on {run['engine']}, with inputs of 8 bits where weights are "
            f"integers ({low:+.3g} to {high:+.3g} beside exact arithmetic, 95 % paired)",
            highlight=False,
        )
    elif run.get("reason") and report["task"] == "causal-lm":
        console.print(f"as run:   on torch; {run['reason']}", highlight=False)
    if said := _latency(report):
        console.print(f"latency:  {said}", highlight=False)
    console.print(
        f"took:     {report['seconds']:.0f} s, peak memory {say_bytes(report['peak_bytes'])}", highlight=False
    )
    console.print(f"artifact: {report['artifact']}", highlight=False)


def _latency(report: dict[str, Any]) -> str:
    """What an item takes where that was limited, beside what was predicted; else nothing."""
    forecast, gate = report.get("forecast"), report["gate"]
    if not forecast:
        return ""
    said = f"{1e3 * gate['seconds']:.3g} ms an item on {gate['engine']}; {1e3 * forecast['seconds']:.3g} ms "
    said += "were predicted" if forecast["how"] == "predicted" else "before, whatever the plan"
    slower = ", ".join(forecast["slower_here"])
    return said + (f"; left out as slower here than the original: {slower}" if slower else "")


def _limit(name: str, value: float) -> str:
    return (
        say_bytes(value)
        if name in ("size", "memory")
        else f"{1e3 * value:.3g} ms"
        if name == "latency"
        else f"{value:.1%}"
    )


def _cells(label: str, point: dict[str, Any]) -> tuple[str, ...]:
    plan = "" if label == "original" else point["name"]
    interval = f"{point['low']:.4g} to {point['high']:.4g}"
    return label, say_bytes(point["bytes"]), f"{point['value']:.4g}", interval, f"{point['retained']:.1%}", plan


def print_preview(found: dict[str, Any]) -> None:
    """Print what a fit would try."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    original, least = say_bytes(found["original_bytes"]), say_bytes(found["smallest_bytes"])
    console.print(f"[bold]{found['model']}[/] ({found['task']}): {original}, smallest plan {least}", highlight=False)
    speed = found["speed"] or {"units": {}}
    table = Table(box=None, header_style="bold")
    for column in ("unit", "role", "weights", "choices" + (", microseconds here" if speed["units"] else "")):
        table.add_column(column)
    for unit in found["units"]:
        offers = speed["units"].get(unit["name"], {})
        said = [f"{c} {1e6 * offers[c]:.0f}" if c in offers else c for c in unit["choices"]]
        table.add_row(unit["name"], unit["role"], f"{unit['weights']:,}", ", ".join(said))
    console.print(table, highlight=False)
    if "original" in speed:
        console.print(
            f"an item takes the original {1e3 * speed['original']:.3g} ms here, and at the fastest choices "
            f"{1e3 * speed['fastest']:.3g} ms ({speed['how']})",
            highlight=False,
        )
    console.print(
        f"{found['probes']} probes, about {found['seconds']:.0f} s here; {found['feasible']}", highlight=False
    )
