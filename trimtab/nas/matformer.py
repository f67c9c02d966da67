"""Feed-forward layers nested like Russian dolls, each of which is trained as a network of its own."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Offered
from trimtab.core.method import Card, Elastic, Lesson, Pupil


@dataclass(frozen=True)
class MatFormer(Elastic):
    """Each step draws one granularity, gives it to the feed-forward layers of all blocks, and trains that network on
    labels: min over theta of the mean over i of L(M_i(x; theta), y), M_i with the first m_i hidden units of each layer.

    What was trained are as many networks as there are granularities; *Mix'n'Match* takes another granularity in each
    block, which a search over the blocks' widths does.

    Fields:
        granularities: shares of the hidden units, m_i / m_g (paper: 1/8, 1/4, 1/2 and 1).

    Reference: Devvrit et al. 2023, arXiv:2310.07707, section 3.1-3.3.
    Departures: granularities are the nearest that the network's widths offer.

    >>> from trimtab.core.knob import Knob
    >>> domain = Domain((Knob("ffn", (16, 32, 64, 128), "width"), Knob("depth", (1, 2), "depth")))
    >>> MatFormer(granularities=(0.25, 1.0)).offer(domain)
    {'ffn': (1, 3)}
    """

    granularities: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)

    card = Card(
        "matformer",
        catalogue=(11,),
        paper="arXiv:2310.07707",
        claim="Each nested network is about as good as one of its size trained alone, and mixtures lie between.",
        keeps=frozenset({"extract", "deterministic"}),
    )

    def offer(self, domain: Domain) -> Offered:
        """The widths, at the granularities."""
        if not self.granularities or not all(0 < share <= 1 for share in self.granularities):
            raise UserError(f"matformer: granularities={self.granularities} were given; give shares above 0, up to 1")
        return {knob.name: knob.nearest(self.granularities) for knob in domain.knobs if knob.kind == "width"}

    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        share = rng.choice(self.granularities)
        same = {k.name: k.nearest((share,)) for k in lesson.domain.knobs if k.name in lesson.offered}
        return (Pupil(lesson.domain.largest(same)),)
