"""The profile of this machine: its limits, and how near each operation comes to them; kept in the user's cache folder.

Every figure is the fastest of several short repeats, which other work on the machine disturbs least; how much slower
the median was is kept beside it. With one thread the seconds are those of the processor, which do not count what else
runs; with more they are those on the wall, since threads that wait for each other are part of the work. Nothing here
runs a whole model: predictions for models stay predictions.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.core.device import CACHE_BYTES, Device, Kernel
from trimtab.core.errors import UserError
from trimtab.core.journal import write_atomic
from trimtab.core.level import Level, parse_level
from trimtab.kernels.bench import chain, heads_chain, pass_chain, random_packed, runs_here, step_chain
from trimtab.kernels.native import native

Progress = Callable[[str, int, int], None]

LEVELS = (
    *("fp32", "bf16", "8b/row", "6b/g128", "5b/g64", "4b/g128", "4b/g64", "4b/g32", "nvfp4/h", "3b/g128", "3b/g64"),
    *("3b/g32", "2b/g64", "2b/g32", "2b/g16", "vq/d4/k256", "2:4", "75%"),
)
"""Levels of the menus of a fit that compiled kernels may run, and the two of models as they come."""
QUICK_LEVELS = ("fp32", "bf16", "8b/row", "4b/g64", "2b/g32")
INPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_INPUTS = (1, 4, 16, 128, 512)
SHAPES = ((256, 256), (1024, 256), (256, 1024), (1024, 1024), (2048, 2048))
QUICK_SHAPES = ((256, 256), (256, 1024), (1024, 1024))
FAR_SHAPES = ((1024, 2048), (512, 512), (2048, 512), (512, 2048))
FAR_SETS = 4  # times the last cache: what is read again comes from memory
BUSY = 3e-4  # seconds: a call that costs more beside its work waited for a core that other work had
TRIES = 3  # where calls waited
PATIENCE = 10  # times as long as asked for
SLOWNESS = 0.7  # least seconds to the roof's: a kernel that seems faster than its limit was measured on a busy machine
FROM_MEMORY = 32  # inputs up to which a weight is also measured from memory: with more, arithmetic is what limits
MOST_COPIES = 64  # of a weight in one program
WIDTHS = (512, 2048, 8192)
ATTENTIONS = (  # heads, their keys and values, their size, context, sequences
    *((8, 4, 64, 64, 1), (8, 4, 64, 512, 1), (4, 2, 64, 256, 8), (16, 8, 64, 512, 4), (16, 4, 128, 1024, 1)),
    *((32, 8, 64, 64, 8), (32, 8, 64, 1024, 1)),
)
FAR_ATTENTION = (16, 8, 64, 1024, 8)
NEW_TOKENS = (1, 16, 128)


@dataclass(frozen=True)
class Point:
    """One measured shape: what limits it in seconds, its rows and columns, the fastest and the median seconds, its
    rows.
    """

    roof: float
    edges: float
    best: float
    median: float
    rows: int = 0


# ---- what the system says


def caches() -> dict[str, int]:
    """Bytes of the data caches: `l1` and `l2` of a core, `l3` of all; common sizes where the system does not say."""
    found = {"l1": 32 << 10, "l2": 1 << 20, "l3": 32 << 20}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((index / n).read_text().strip() for n in ("level", "type", "size"))
        except OSError:
            continue
        if kind in ("Data", "Unified") and size.endswith("K"):
            found[f"l{level}"] = int(size[:-1]) << 10
    return found


def machine_name() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory of the machine; 0 where the system does not say."""
    names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
    return os.sysconf(names[0]) * os.sysconf(names[1]) if set(names) <= set(os.sysconf_names) else 0


def variant() -> str:
    """The variant of the compiled kernels that runs here, or `torch`."""
    module = native()
    return module.__name__.rpartition("_")[2] if module is not None else "torch"


# ---- measuring


def measure(
    threads: int | None = None,
    quick: bool = False,
    levels: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Device:
    """Measure this machine: a minute, or some seconds where `quick`.

    Args:
        threads: that everything runs with; by default as many as there are cores.
        levels: texts of the levels to measure; by default those of a fit's menus. What no kernel runs here is left
            out: it is unpacked to fp32, which is always measured.
        progress: told what is being done.
    """
    with threads_set(threads or cores()):
        device = limits(quick)
        device = replace(device, spill=spilled(device, quick))
        rows = (*patient(partial(attention, device)), *patient(partial(passes, device, quick)), step(device))
        device = replace(device, kernels=rows)
        texts = tuple(levels) if levels is not None else QUICK_LEVELS if quick else LEVELS
        return with_levels(device, ("fp32", *texts), quick, progress)


def with_levels(device: Device, levels: Iterable[str], quick: bool, progress: Progress | None = None) -> Device:
    """The profile with the levels that it lacks and that a kernel runs here, measured with the threads that are set."""
    tell = progress or (lambda what, done, total: None)
    lacking = [t for t in dict.fromkeys(levels) if not device.kernel("linear", t) and runs_here(parse_level(t))]
    rows = list(device.kernels)
    for i, text in enumerate(lacking):
        tell("measuring", i, len(lacking))
        rows += patient(partial(linear, device, parse_level(text), quick))
        tell("measuring", i + 1, len(lacking))
    return replace(device, kernels=tuple(rows))


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Kernels and torch use so many threads for a while."""
    module = native()
    before = torch.get_num_threads(), module.threads() if module is not None else 1
    try:
        torch.set_num_threads(threads)
        if module is not None:
            module.set_threads(threads)
        yield
    finally:
        torch.set_num_threads(before[0])
        if module is not None:
            module.set_threads(before[1])


def limits(quick: bool = False) -> Device:
    """The machine's limits alone, with as many threads as are set, without any kernel's share of them."""
    module, sizes, seconds = native(), caches(), 0.1 if quick else 0.3
    threads = module.threads() if module is not None else torch.get_num_threads()
    near = [threads * sizes["l1"] // 2, threads * sizes["l2"] // 2, sizes["l3"] // 2]
    sets = [*near, *(n * sizes["l3"] for n in ((2, 8) if quick else (1, 2, 4, 8)))]
    sets = sorted({min(n, 1 << 30) for n in sets})
    found: dict[str, float] = {}
    if module is not None:
        rates = [max(module.read_rates(n, seconds)) for n in sets]
        found["copy"] = max(module.copy_rates(sets[-1], seconds))
        for kind in ("int8", "fp32", "bf16"):
            if rate := getattr(module, f"{kind}_rates")(seconds):
                found[kind] = max(rate)
        found["barrier"] = 1 / max(module.barrier_rates(seconds)) if threads > 1 else 0.0
        found["call"] = 1 / max(module.call_rates(seconds))
    else:
        rates = [_torch_reads(n, seconds) for n in sets]
        found["fp32"] = _torch_peak(seconds)
    # a larger set is never read faster; where it seems so, the smaller one was disturbed
    rates = [max(rates[i:]) for i in range(len(rates))]
    import transformers

    from trimtab import __version__

    return Device(
        name=machine_name(),
        cores=cores(),
        memory_bytes=memory_bytes(),
        threads=threads,
        variant=variant(),
        caches=sizes,
        bandwidth=tuple(zip(sets, rates, strict=True)),
        spill=((sizes["l3"], 0.0), (2 * sizes["l3"], 1.0)),
        limits=found,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"trimtab": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    )


def _torch_reads(size: int, seconds: float) -> float:
    x = torch.ones(size // 4)
    return 4 * x.numel() / timed(x.sum, seconds, torch.get_num_threads())[0]


def _torch_peak(seconds: float) -> float:
    x = torch.ones(1024, 1024)
    return 2 * 1024**3 / timed(lambda: x @ x, seconds, torch.get_num_threads())[0]


def timed(work: Callable[[], Any], seconds: float, threads: int, least: int = 3) -> tuple[float, float]:
    """Fastest and median seconds of a call, repeated for about `seconds`, after one to warm up.

    On a busy machine it goes on for up to `PATIENCE` times as long, until the fastest was nearly reached `least` times.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 1000:
        start = clock()
        work()
        times.append(clock() - start)
        spent = time.perf_counter() - began
        again = sum(t <= 1.05 * min(times) for t in times) >= least
        if len(times) >= least and spent > (seconds if again else PATIENCE * seconds):
            break
    return min(times), statistics.median(times)


def patient(measure: Callable[[], list[Kernel]]) -> list[Kernel]:
    """The rows that a measurement gives, once more where its calls waited for a core."""
    found = measure()
    for _ in range(TRIES - 1):
        if waits(found) > BUSY:
            found = min(found, measure(), key=waits)
    return found


def waits(rows: Iterable[Kernel]) -> float:
    """Most seconds that a call costs beside its work."""
    return max(k.fixed for k in rows)


def linear(device: Device, level: Level, quick: bool = False) -> list[Kernel]:
    """How near the kernel of a level comes to its limits, for several numbers of inputs."""
    shapes, inputs = (QUICK_SHAPES, QUICK_INPUTS) if quick else (SHAPES, INPUTS)
    seconds = 0.015 if quick else 0.04
    points: dict[int, list[Point]] = {m: [] for m in inputs}
    far: dict[int, list[Point]] = {m: [] for m in inputs}
    runs, peak, half = "", device.peak(level), device.caches["l3"] / 2
    for rows, cols in shapes:
        packed = random_packed(level, rows, cols)
        size = level.bytes((rows, cols))
        if size > device.caches["l3"] // 2:
            continue
        copies = max(
            1, min(MOST_COPIES, device.caches["l3"] // 4 // size)
        )  # as a model's weights that fit the last cache
        for m in inputs:
            repeats = (
                copies if m <= FROM_MEMORY else max(1, min(copies, int(2e-3 * peak / (m * level.flops((rows, cols))))))
            )
            roof = max(size / device.reads(min(copies * size, half)), m * level.flops((rows, cols)) / peak)
            runs, work = chain(packed, [i % copies for i in range(repeats)], m)
            best, median = timed(work, seconds, device.threads)
            points[m].append(Point(roof, rows + cols, best / repeats, median / repeats))
    for rows, cols in FAR_SHAPES[: 1 if quick else None]:
        packed, size = random_packed(level, rows, cols), level.bytes((rows, cols))
        copies = max(2, FAR_SETS * device.caches["l3"] // size)
        for m in [m for m in inputs if m <= FROM_MEMORY]:
            _, work = chain(packed, list(range(copies)), m)
            best, median = timed(work, 2 * seconds, device.threads)
            roof = max(size / device.from_memory, m * level.flops((rows, cols)) / peak)
            far[m].append(Point(roof, rows + cols, best / copies, median / copies, rows))
    return [fitted(Kernel("linear", str(level), m, runs, 0.0, 0.0, 1.0, 1.0), points[m], far[m]) for m in inputs]


def spilled(device: Device, quick: bool) -> tuple[tuple[int, float], ...]:
    """The share of a set that comes from memory, from the seconds a byte of a kernel that goes through it again and
    again: none of half the last cache, all of four times as much as it holds.
    """
    packed, last = random_packed(parse_level("fp32"), 512, 512), device.caches["l3"]
    sets = [int(n * last) for n in ((0.5, 1, 2, 4) if quick else (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4))]
    times = []
    for size in sets:
        order = list(range(max(1, size // packed.nbytes)))
        _, work = chain(packed, order, 1)
        times.append(timed(work, 0.1, device.threads)[0] / len(order))
    least, most = times[0], max(*times[1:], times[0] * 1.0001)
    shares = [min(1.0, max(0.0, (t - least) / (most - least))) for t in times]
    return tuple((size, max(shares[: i + 1])) for i, size in enumerate(sets))


def attention(device: Device) -> list[Kernel]:
    """How near attention comes to its limits, for several numbers of new tokens."""
    found = []
    for tokens in NEW_TOKENS:
        row = Kernel("attention", "", tokens, "", 0.0, 0.0, 1.0, 1.0)
        near = [_heads_point(device, shape, tokens, False) for shape in ATTENTIONS]
        far = [_heads_point(device, FAR_ATTENTION, tokens, True)[1]] if tokens == 1 else []
        found.append(fitted(replace(row, runs=near[0][0]), [point for _, point in near], far))
    return found


def _heads_point(device: Device, shape: tuple[int, ...], tokens: int, far: bool) -> tuple[str, Point]:
    """One attention, in as many layers as have caches of keys and values that fit the last cache, or do not."""
    heads, kv_heads, size, context, batch = shape
    batch = batch if tokens == 1 else 1  # prompts are read one after the other
    read = 2 * CACHE_BYTES * (context + tokens) * kv_heads * size * batch
    operations = 4.0 * heads * size * (context + (tokens + 1) / 2) * tokens * batch
    whole = FAR_SETS * device.caches["l3"] if far else device.caches["l3"] // 8
    layers = max(1, min(whole // read, MOST_COPIES if tokens == 1 else 4))
    runs, work = heads_chain(heads, kv_heads, size, context, tokens, batch, layers)
    best, median = timed(work, 0.04, device.threads)
    speed = device.from_memory if far else device.reads(min(layers * read, device.caches["l3"] / 2))
    roof = max(read / speed, operations / device.limits["fp32"])
    return runs, Point(roof, heads * size * tokens * batch, best / layers, median / layers)


def passes(device: Device, quick: bool = False) -> list[Kernel]:
    """What a pass over the activations costs: a normalisation."""
    found = []
    for m in QUICK_INPUTS if quick else INPUTS:
        points, runs = [], ""
        for width in WIDTHS:
            runs, work, repeats = pass_chain(width, m)
            best, median = timed(work, 0.02, device.threads)
            points.append(
                Point(4.0 * width * m / device.reads(device.caches["l2"]), 0, best / repeats, median / repeats)
            )
        found.append(fitted(Kernel("pass", "", m, runs, 0.0, 0.0, 1.0, 1.0), points))
    return found


def step(device: Device) -> Kernel:
    """What a forward costs beside its operations: the call from Python."""
    runs, work = step_chain()
    best, median = timed(work, 0.05, device.threads)
    return Kernel("step", "", 1, runs, best, 0.0, 1.0, 1.0, noise=median / best)


def fitted(row: Kernel, points: Sequence[Point], far: Sequence[Point] = ()) -> Kernel:
    """The row with its constants: least squares of the relative errors, first over the points in the caches, then over
    what those from memory take beside the call and the edges.
    """
    fixed, edge, slow = _least([(1.0, p.edges, p.roof) for p in points], [p.best for p in points], (0, 0, SLOWNESS))
    error = [p.best / (fixed + edge * p.edges + slow * p.roof) for p in points]
    start, out = 0.0, slow
    if far:
        over = [max(p.best - fixed - edge * p.edges, SLOWNESS * p.roof) for p in far]
        terms = [(p.roof, p.rows if len(far) > 1 else 0.0) for p in far]
        out, start = _least(terms, over, (SLOWNESS, 0))
        error += [t / (out * p.roof + start * p.rows) for t, p in zip(over, far, strict=True)]
    noise = statistics.median(p.median / p.best for p in (*points, *far))
    return replace(
        row, fixed=fixed, edge=edge, near=1 / slow, far=1 / out, start=start,
        low=min(1.0, *error), high=max(1.0, *error), noise=noise,
    )  # fmt: skip


def _least(terms: Sequence[tuple[float, ...]], seconds: Sequence[float], least: tuple[float, ...]) -> list[float]:
    """Coefficients of the terms, none below its least, that give the seconds with least relative error."""
    from scipy.optimize import lsq_linear

    relative = np.array(terms) / np.array(seconds)[:, None]
    scale = np.maximum(np.abs(relative).max(0), 1e-300)  # seconds beside counts of rows: solved in units of their own
    bounds = np.array(least) * scale, np.full(len(least), np.inf)
    return (lsq_linear(relative / scale, np.ones(len(seconds)), bounds, method="bvls").x / scale).tolist()


# ---- the profile in the user's cache folder


def profile_path(threads: int) -> Path:
    """Where the profile of this machine with so many threads is kept."""
    from trimtab import __version__

    said = (machine_name(), cores(), threads, variant(), sorted(caches().items()), __version__)
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:12]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "trimtab" / f"device-{digest}.json"


def save(device: Device) -> Path:
    """Keep a profile: whole or not at all."""
    path = profile_path(device.threads)
    write_atomic(path, lambda p: p.write_text(device.to_json()))
    return path


def kept(threads: int | None = None) -> Device | None:
    """The profile that is kept for this machine; None where there is none, or none that is sound and of this machine,
    which is said on standard error.
    """
    threads = threads or cores()
    path = profile_path(threads)
    if not path.is_file():
        return None
    try:
        device = Device.from_json(path.read_text("utf-8"))
    except (UserError, UnicodeDecodeError, OSError):
        print(f"{path} is damaged; measuring this machine again", file=sys.stderr)
        return None
    found, here = (
        (device.name, device.cores, device.threads, device.variant),
        (machine_name(), cores(), threads, variant()),
    )
    if found != here:
        print(f"{path} is of another machine ({device.name}); measuring this one", file=sys.stderr)
        return None
    return device


def here(threads: int | None = None, levels: Iterable[str] = ()) -> Device:
    """The profile of this machine that is kept, with these levels; what it lacks is measured quickly, said, and kept.

    Args:
        threads: by default as many as there are cores.
        levels: texts of levels; those that no kernel runs here are priced unpacked, and need no measuring.
    """
    found, wanted = kept(threads), tuple(levels)
    if found is None:
        print(
            "this machine has no profile yet: measuring one, some seconds; `trimtab bench` measures it better",
            file=sys.stderr,
        )
        device = measure(threads, quick=True, levels=wanted)
    else:
        with threads_set(found.threads):
            device = with_levels(found, wanted, quick=True)
    if device != found:
        save(device)
        if waits(device.kernels) > BUSY:
            print(
                "other work had the cores while this machine was measured, so prices may be off; `trimtab bench` "
                "measures it again",
                file=sys.stderr,
            )
    return device
