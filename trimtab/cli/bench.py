"""`trimtab bench`: what this machine can do, and how near the kernels come to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.cli import options as o

if TYPE_CHECKING:
    from trimtab.core.device import Device, Kernel


def command(
    artifact: Annotated[str | None, typer.Argument(help="with --against: an artifact to write with")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="by default one for each core")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer levels and shapes; the profile is not kept")] = False,
    levels: Annotated[str, typer.Option(help="levels to measure, like 4b/g64,8b/row; by default those of a fit")] = "",
    against: Annotated[str | None, typer.Option(help="run a peer beside ours: torch or llama.cpp")] = None,
    device_profile: Annotated[
        str | None, typer.Option(help="measure the operations of this space, and how far off whole networks are")
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Measure this machine, and keep the profile that plans are priced with."""
    if device_profile is not None:
        _space(device_profile, threads, json, quiet)
        return
    from trimtab.core.level import parse_level
    from trimtab.kernels import profile

    if against is not None:
        _against(against, artifact, threads or profile.cores(), json)
        return
    wanted = tuple(str(parse_level(t)) for t in levels.split(",") if t) or None
    with o.progress(quiet or json) as tell:
        device = profile.measure(threads, quick, wanted, tell)
    path = None if quick or wanted else profile.save(device)
    if json:
        from dataclasses import asdict

        o.print_json({**asdict(device), "kept": path})
        return
    _print(device)
    if path:
        print(f"kept in {path}")


def _space(space: str, threads: int | None, json: bool, quiet: bool) -> None:
    from trimtab.searching import profiled

    with o.progress(quiet or json) as tell:
        found = profiled(space, threads or 0, tell)
    if json:
        o.print_json(found)
        return
    print(
        f"{found['operations']} operations, those of {space} measured in {found['seconds']:.0f} s with "
        f"{found['threads']} threads"
    )
    print(f"{found['networks']} random networks: off by {found['mean']:.1%} on average, {found['most']:.1%} at most")
    print(f"kept in {found['kept']}")


def _against(peer: str, artifact: str | None, threads: int, json: bool) -> None:
    from trimtab import peers

    peers.check(peer, artifact)
    rows = peers.linears(threads) if artifact is None else peers.models(artifact, peer, threads)
    if json:
        o.print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names)
    for row in rows:
        table.add_row(*(_say(row.get(name, "")) for name in names))
    Console().print(table)


def _say(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _print(device: Device) -> None:
    """The limits, then each kernel beside the one that binds it."""
    from rich.console import Console
    from rich.table import Table

    from trimtab.kernels.profile import BUSY, waits

    console = Console()
    console.print(f"{device.name}, {device.threads} of {device.cores} cores, {device.variant} kernels")
    limits = Table("limit", "measured", title="What the machine can do")
    for size, rate in device.bandwidth:
        limits.add_row(f"read, {_size(size)} set", f"{rate / 1e9:.1f} GB/s")
    units = {"copy": (1e9, "GB/s"), "barrier": (1e-9, "ns"), "call": (1e-6, "µs")}
    for name, value in device.limits.items():
        scale, unit = units.get(name, (1e9, "Gop/s"))
        limits.add_row(name, f"{value / scale:.1f} {unit}")
    console.print(limits)
    names = ("kernel", "level", "inputs", "from caches", "from memory", "bound by", "reached")
    shares = Table(*names, title="Share of the limit reached")
    for kernel in device.kernels:
        if kernel.op in ("linear", "attention"):
            shares.add_row(*_shares(device, kernel))
    console.print(shares)
    if waits(device.kernels) > BUSY:
        console.print("other work had the cores while this machine was measured: measure it again")


def _shares(device: Device, kernel: Kernel) -> tuple[str, ...]:
    """A row of the table: for a linear of 2048 x 2048, all that a call costs counted in."""
    if kernel.op == "attention":
        return "attention", "", str(kernel.m), f"{kernel.near:.0%}", f"{kernel.far:.0%}", "", ""
    from trimtab.core.level import parse_level

    level, side = parse_level(kernel.level), 2048
    reads, operations = level.bytes((side, side)), kernel.m * level.flops((side, side))
    arithmetic = operations / device.peak(level)
    half = device.caches["l3"] / 2
    beside = kernel.fixed + kernel.edge * 2 * side
    near = max(reads / device.reads(half), arithmetic)
    far = max(reads / device.from_memory, arithmetic)
    reached = near / (beside + near / kernel.near), far / (beside + far / kernel.far + kernel.start * side)
    memory = reads / device.from_memory > arithmetic
    rate = (
        f"{reached[1] * device.from_memory / 1e9:.0f} GB/s"
        if memory
        else f"{reached[0] * device.peak(level) / 1e9:.0f} Gop/s"
    )
    bound = "memory" if memory else "arithmetic"
    return kernel.op, kernel.level, str(kernel.m), f"{reached[0]:.0%}", f"{reached[1]:.0%}", bound, rate


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"
