"""A database of solved sites: every choice is solved once, then any combination is put together and measured end to
end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.table import Row
from trimtab.engine.measure import measure
from trimtab.engine.probe import Unit, solve_unit
from trimtab.engine.stats import INPUT_STATS, collect
from trimtab.engine.stream import Stream
from trimtab.formats.packed import Packed


class Database:
    """Solved weights of units by choice, with statistics from the original's inputs.

    Raises:
        UserError: the model is too large to stay in memory, which measuring thousands of combinations needs.
    """

    def __init__(
        self,
        stream: Stream,
        units: list[Unit],
        calibration: Any,
        search: Any,
        task: Any,
        chunk: int,
        reference: list[Any],
        seed: int,
    ) -> None:
        if not stream.resident:
            raise UserError(
                "this allocator measures many combinations end to end, which needs a model that stays in memory; "
                "choose --allocator milp"
            )
        self.stream, self.units, self.search, self.task = stream, {u.name: u for u in units}, search, task
        self.chunk, self.reference, self.seed = chunk, reference, seed
        self.solved: dict[tuple[str, str], dict[str, Packed]] = {}
        wanted = {s.path: INPUT_STATS for u in units for s in u.sites}
        self.stats = collect(stream, wanted, lambda: measure(stream, calibration, task, chunk))

    def packed(self, unit: str, choice: str) -> dict[str, Packed]:
        """The unit's sites solved at a choice; nothing for the original."""
        if "@" not in choice:
            return {}
        key = (unit, choice)
        if key not in self.solved:
            self.solved[key] = solve_unit(self.stream, self.units[unit], choice, self.stats, self.seed)
        return self.solved[key]

    def measure(self, picked: Mapping[str, Row], samples: int | None = None) -> float:
        """End-to-end damage of a choice for every unit, on the search data's items that hold the first `samples`
        predictions, in whole forwards; all of them with None.
        """
        changes = {p: w for u, row in picked.items() for p, w in self.packed(u, row.choice).items()}
        items = len(self.search)
        if samples is not None:
            each = int(self.task.counts(self.search.labels[:1])[0])
            items = min(items, -(-samples // (each * self.chunk)) * self.chunk)
        with self.stream.swapped(changes):
            return measure(self.stream, self.search.take(0, items), self.task, self.chunk, self.reference).damage()
