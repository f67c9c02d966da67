"""A training's curves for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError


class Events:
    """Writes each row of a training's log as scalars while the training runs, and its metric at the end.

    `train/loss`, `train/norm` and `train/rate` by step; `held-out/<metric>` at step 0 and at the last. A run that goes
    on replaces what was written behind its last checkpoint.

    Args:
        folder: of the event files.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard writes what TensorBoard reads, and it is not installed: "
                "pip install 'trimtab[tensorboard]'"
            ) from error
        self.folder, self.make = folder, SummaryWriter
        self.writer: Any = None

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of the log."""
        if self.writer is None:  # now it is known at which step the run begins or goes on
            self.writer = self.make(str(self.folder), purge_step=row["step"])
        for name in ("loss", "norm", "rate"):
            self.writer.add_scalar(f"train/{name}", row[name], row["step"])
        self.writer.flush()

    def close(self, report: Mapping[str, Any]) -> None:
        """The metric before and after; the files are complete."""
        if self.writer is None:
            return
        for name, step in (("before", 0), ("after", report["steps"])):
            self.writer.add_scalar(f"held-out/{report['metric']}", report[name]["value"], step)
        self.writer.close()
