"""Flover: a request joins the others at the next token, and leaves at its last."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.method import Card, Scheduler
from trimtab.core.traffic import Decision, View
from trimtab.parts.admission import Door


@dataclass(frozen=True)
class Flover(Scheduler):
    """One loop over tokens for all: who arrives at tick t begins at t if there is memory, however far the others are.

    A newcomer's prompt is read by itself, one a tick, in the step in which the others write their next token.

    Reference: Yao et al. 2023, arXiv:2305.13484, sections 4 and 5.
    Departures: the memory of a text that ends goes back page by page, so that the paper's shuffling of the cache, which
        keeps it in one piece, has nothing to do. The order of ending needs no prediction for the same reason.

    >>> from trimtab.core.traffic import Pages, Running, Waiting
    >>> view = View(9, 64, 8, 10_000, Pages(64, 1000), (Waiting(1, 5, 20, None, 9),), (Running(0, 4, 30, None, 12, 0),))
    >>> Flover().decide(view)
    Decision(admit=(1,), evict=(), load=(), rows={1: 5})
    """

    card = Card(
        "flover",
        catalogue=(12,),
        paper="arXiv:2305.13484",
        claim="Admission at every token gives a lower latency and a higher throughput than batches that begin and end "
        "together.",
        keeps=frozenset({"exact", "deterministic"}),
    )

    def decide(self, view: View) -> Decision:
        """Who begins."""
        door = Door(view)
        door.let_in(view.waiting)
        return door.decision(most=1)
