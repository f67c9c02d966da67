"""Random search, the baseline that every searcher must beat."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Identity, Known


@dataclass(frozen=True)
class RandomSearch(Searcher):
    """Every knob drawn evenly, none twice: g_i ~ U(options of knob i), g not yet evaluated.

    Args of `ask`:
        identity: candidates that compute the same function count as evaluated.

    Reference: Yang et al. 2020, arXiv:1912.12522, section 3: what a search is to be measured against, by
        `parts.protocol.relative_improvement`; Li and Talwalkar 2019, arXiv:1902.07638.
    Departures: without repetition.

    >>> from trimtab.core.knob import Domain, Knob
    >>> hunt = Hunt(Domain((Knob("width", (8, 16)),)), pending=((0,),))
    >>> RandomSearch().ask(hunt, 5, rng=Random(0))
    [(1,)]
    """

    card = Card(
        "random-search",
        catalogue=(130,),
        paper="arXiv:1912.12522",
        claim="The baseline: knows nothing, and is hard to beat.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, identity: Identity | None = None) -> list[Genome]:
        """At most `count` new genomes."""
        return Known(hunt, identity).taken(lambda: hunt.domain.random(rng), count)
