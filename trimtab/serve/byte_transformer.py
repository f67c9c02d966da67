"""ByteTransformer: prompts of different lengths are read end to end, and no padding between them."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.method import Card, Scheduler
from trimtab.core.traffic import Decision, View
from trimtab.parts.admission import Door


@dataclass(frozen=True)
class ByteTransformer(Scheduler):
    """A batch of prompts of n_1 .. n_b tokens is a step of sum n_i rows, where padding takes b max n_i.

    A batch begins when the one before has ended, with all its prompts packed; so the packing alone is what it adds to
    `static-batching`.

    Reference: Zhai et al. 2022, arXiv:2210.03052, sections III-D (zero padding) and III-E (unequal lengths).
    Departures: the paper encodes texts; here the packed rows are prompts of a decoder. A row knows its sequence and
        position, so that there is no prefix sum to map packed rows to padded ones.

    >>> from trimtab.core.traffic import Pages, Waiting
    >>> view = View(0, 64, 8, 10_000, Pages(64, 1000), tuple(Waiting(i, 5 + i, 20, None, 0) for i in range(3)))
    >>> ByteTransformer().decide(view).rows
    {0: 5, 1: 6, 2: 7}
    """

    card = Card(
        "byte-transformer",
        catalogue=(61,),
        paper="arXiv:2210.03052",
        claim="Packed prompts of unequal lengths take the time of their tokens, and not of the longest of them.",
        keeps=frozenset({"exact", "deterministic"}),
    )

    def decide(self, view: View) -> Decision:
        """Who begins, once nobody runs, and all prompts that the step has room for."""
        door = Door(view)
        if not view.running:
            door.let_in(view.waiting)
        return door.decision()
