"""Seconds in a fit: what each choice costs on this machine, and what no choice changes.

The latency of a fit is that of one item as `trimtab run` takes it: of text, a prompt read up to its next token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar

from trimtab.core.device import Device
from trimtab.core.errors import BudgetError
from trimtab.core.level import Depth
from trimtab.core.table import Row

if TYPE_CHECKING:
    from trimtab.core.modelmap import ModelMap
    from trimtab.engine.probe import Unit
    from trimtab.engine.stream import Stream
    from trimtab.job import Job

LEAVE = 0.97  # share of the latency that a plan may fill


@dataclass(frozen=True)
class Pace(ABC):
    """How long an item takes: in all, and what of it is a choice's.

    Fields:
        wanted: seconds that it may take; infinite where there is no limit.
        modelmap, dtype: of the original.
    """

    wanted: float
    modelmap: ModelMap
    dtype: str

    said: ClassVar[str]

    @abstractmethod
    def priced(self, units: Iterable[Unit], rows: Iterable[Row]) -> list[Row]:
        """The rows with the seconds of their unit."""

    @abstractmethod
    def original(self, dropped: Sequence[str] = ()) -> float:
        """Seconds of an item with every weight as it was, and with these sublayers left out."""

    def beside(self, rows: Iterable[Row], dropped: Sequence[str] = ()) -> float:
        """Seconds of an item that no choice of these rows changes, with these sublayers left out."""
        units = sum(r.seconds for r in without(self.modelmap, rows, dropped) if r.choice == self.dtype)
        return max(0.0, self.original(dropped) - units)

    def left(self, rows: Iterable[Row], dropped: Sequence[str] = (), haste: float = 1.0) -> float:
        """Seconds that the limit leaves to the choices.

        Args:
            haste: share of the limit to plan for, where an earlier plan took longer than it was to.
        """
        return LEAVE * haste * self.wanted - self.beside(rows, dropped)

    def fewest(self, rows: list[Row], drops: Mapping[str, float], haste: float = 1.0) -> tuple[str, ...]:
        """The fewest sublayers, least damage first, without which the fastest plan is within the limit.

        Args:
            drops: sublayer -> damage of leaving it out.

        Raises:
            BudgetError: nothing that this run may do makes the model fast enough.
        """
        order, seconds = sorted(drops, key=lambda p: drops[p]), inf
        for count in range(len(order) + 1):
            dropped = tuple(order[:count])
            fastest: dict[str, float] = {}
            for row in without(self.modelmap, rows, dropped):
                fastest[row.unit] = min(row.seconds, fastest.get(row.unit, inf))
            least = sum(fastest.values())
            if least <= self.left(rows, dropped, haste):
                return dropped
            seconds = min(seconds, least + self.beside(rows, dropped))
        how = "with every sublayer dropped" if order else "no sublayer of this model may be dropped"
        raise BudgetError(
            f"latency {1e3 * self.wanted:.3g} ms was asked for, and {1e3 * seconds:.3g} ms is the least {self.said} "
            f"here ({how}); ask for {1.01e3 * seconds / LEAVE / haste:.3g} ms or more"
        )


@dataclass(frozen=True)
class Predicted(Pace):
    """Of a model that runs as a compiled program: by the profile of the machine, for an item of so many tokens."""

    device: Device
    tokens: int

    said = "predicted"

    def priced(self, units: Iterable[Unit], rows: Iterable[Row]) -> list[Row]:
        from trimtab.engine.pricing import seconds_of_rows

        return seconds_of_rows(units, rows, self.device, self.tokens)

    def original(self, dropped: Sequence[str] = ()) -> float:
        from trimtab.engine.pricing import forecast

        gone = dict.fromkeys(dropped, Depth(0))
        return forecast(self.modelmap, gone, self.device, dtype=self.dtype, prompt=self.tokens).prefill.mid


@dataclass(frozen=True)
class Measured(Pace):
    """Of a model that torch runs: by the clock; levels are taken to change nothing."""

    clock: Callable[[Sequence[str]], float]

    said = "measured"

    def priced(self, units: Iterable[Unit], rows: Iterable[Row]) -> list[Row]:
        return list(rows)

    def original(self, dropped: Sequence[str] = ()) -> float:
        return self.clock(dropped)


def inside(found: ModelMap, dropped: Sequence[str]) -> set[str]:
    """Paths of the sites that lie in these sublayers."""
    return {s.path for s in found.sites if s.path.startswith(tuple(d + "." for d in dropped))}


def without(found: ModelMap, rows: Iterable[Row], dropped: Sequence[str]) -> list[Row]:
    """The rows, with nothing to pay for where their unit lies in a dropped sublayer."""
    gone = inside(found, dropped)
    return [Row(r.unit, r.choice, 0, 0.0, 0.0, r.weights) if r.unit.partition("+")[0] in gone else r for r in rows]


def speed_of(pace: Pace, rows: list[Row]) -> dict[str, Any]:
    """Seconds of an item of the original and at the fastest choices, and of each choice of each unit."""
    units: dict[str, dict[str, float]] = {}
    for row in rows:
        units.setdefault(row.unit, {})[row.choice] = row.seconds
    least = sum(min(offers.values()) for offers in units.values())
    return {
        **{"original": pace.original(), "fastest": pace.beside(rows) + least, "how": pace.said},
        "units": units if any(row.seconds for row in rows) else {},
    }


def pace_of(job: Job, levels: Iterable[str]) -> Pace:
    """By the profile where a compiled program runs the model here, else by the clock.

    Args:
        levels: texts of the levels that are to be priced; what the profile lacks of them is measured.
    """
    import torch

    from trimtab.kernels import profile

    facts = (job.request.budget.latency or inf, job.modelmap, job.source.dtype)
    if not compiles(job):
        return Measured(*facts, clock_of(job))
    texts = sorted({*levels, job.source.dtype})
    # committed, for a resumed run to see the same prices
    said = job.journal.step("device", lambda: profile.here(torch.get_num_threads(), texts).to_json())
    return Predicted(*facts, Device.from_json(said), job.batch("search").inputs["input_ids"].shape[1])


def clock_of(job: Job) -> Callable[[Sequence[str]], float]:
    """Seconds of one item in torch with some sublayers left out, committed."""
    from trimtab.engine.run import quiet_seconds_of

    inputs = job.batch("search").take(0, 1).inputs

    @cache
    def whole() -> Stream:
        stream = job.stream()
        stream.whole_model()
        return stream

    def measure(dropped: Sequence[str]) -> float:
        with whole().swapped(dict.fromkeys(dropped)):
            return quiet_seconds_of(lambda: whole().once(inputs))

    def committed(dropped: Sequence[str]) -> float:
        return job.journal.step(f"seconds without {', '.join(dropped) or 'nothing'}", partial(measure, dropped))

    return committed


def compiles(job: Job) -> bool:
    """Whether the model's form is one that a program of the compiled kernels expresses here."""
    from trimtab.engine.program import Unknown, form_of
    from trimtab.kernels.native import native

    if job.source.task != "causal-lm" or native() is None:
        return False
    try:
        form_of(job.source.skeleton(), job.modelmap)
    except Unknown:
        return False
    return True
