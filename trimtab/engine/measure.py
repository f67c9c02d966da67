"""Scores of a model on a batch: the whole pass, or only what lies behind the blocks."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.engine.stream import Flow, Stream


def through(stream: Stream, batch: Any, chunk: int) -> Flow:
    """All items through all blocks: their final hidden states."""
    flow = stream.begin(batch.inputs, chunk)
    for i in range(len(stream.paths)):
        with stream.loaded(i):
            flow.hidden = stream.forward(i, flow)
    return flow


@torch.no_grad()
def references(stream: Stream, flow: Flow, batch: Any, task: Any, hidden: Sequence[Any] | None = None) -> list[Any]:
    """For each chunk what the task keeps of the original's outputs, to compare with."""
    return [task.reference(out, part.labels) for part, out in _outputs(stream, flow, batch, hidden)]


@torch.no_grad()
def scores(
    stream: Stream, flow: Flow, batch: Any, task: Any, reference: list[Any] | None, hidden: Sequence[Any] | None = None
) -> Any:
    """Scores of every item from final hidden states."""
    outputs = _outputs(stream, flow, batch, hidden)
    parts = [task.score(o, part.labels, reference[i] if reference else None) for i, (part, o) in enumerate(outputs)]
    return parts[0].join(parts)


def _outputs(stream: Stream, flow: Flow, batch: Any, hidden: Sequence[Any] | None) -> Any:
    start = 0
    for i, output in stream.finish(flow, hidden):
        stop = start + len(next(iter(flow.inputs[i].values())))
        yield batch.take(start, stop), output
        start = stop


def measure(stream: Stream, batch: Any, task: Any, chunk: int, reference: list[Any] | None = None) -> Any:
    """Scores of the model as it stands."""
    return scores(stream, through(stream, batch, chunk), batch, task, reference)


def _status(key: str) -> int:
    """Bytes that the kernel reports of this process under a key of `/proc/self/status`; 0 where there is no such
    file.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(key + ":")), 0)


def held_bytes() -> int:
    """Memory that this process holds now."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Most memory that this process has held since its start, or since `forget_peak`."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Count the peak from now on, where the system lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
