"""Static batching, the baseline: a batch begins together, is read one prompt after the other, and ends together."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.method import Card, Scheduler
from trimtab.core.traffic import Decision, View
from trimtab.parts.admission import Door


@dataclass(frozen=True)
class StaticBatching(Scheduler):
    """Nobody begins while anybody runs.

    Reference: the baseline of Yao et al. 2023, arXiv:2305.13484, and of Yu et al. 2022 (Orca), section 2.
    Departures: a place whose text has ended is not filled up with padding; it costs nothing.

    >>> from trimtab.core.traffic import Pages, Running, Waiting
    >>> view = View(9, 64, 8, 10_000, Pages(64, 1000), (Waiting(1, 5, 20, None, 9),), (Running(0, 4, 30, None, 12, 0),))
    >>> StaticBatching().decide(view).admit
    ()
    """

    card = Card(
        "static-batching",
        claim="The baseline: who comes late waits for the last of those who run.",
        keeps=frozenset({"exact", "deterministic"}),
    )

    def decide(self, view: View) -> Decision:
        """Who begins, once nobody runs."""
        door = Door(view)
        if not view.running:
            door.let_in(view.waiting)
        return door.decision(most=1)
