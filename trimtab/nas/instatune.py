"""A trained model made elastic while it is fine-tuned, and not before."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Offered
from trimtab.core.method import Card, Elastic, Lesson, Pupil


@dataclass(frozen=True)
class InstaTune(Elastic):
    """Each step trains the whole model on labels, and `between` random sub-networks on what it just put out; depth,
    heads and the widths of feed-forward layers are drawn anew for every block.

    Fields:
        widths: shares of the hidden units that are offered.
        heads: shares of the heads.
        between: sub-networks a step.
        labels: share of a sub-network's loss that comes from labels.

    Reference: Sridhar et al. 2023, arXiv:2308.15609, section 3.
    Departures: the paper names no shares of losses; here the whole model and the sub-networks weigh the same.

    >>> from trimtab.core.knob import Knob
    >>> domain = Domain((Knob("blocks", (2, 3, 4), "depth"), Knob("heads", (1, 2), "heads")))
    >>> InstaTune().offer(domain)
    {'blocks': (0, 1, 2), 'heads': (0, 1)}
    """

    widths: tuple[float, ...] = (0.5, 0.75, 1.0)
    heads: tuple[float, ...] = (0.5, 0.75, 1.0)
    between: int = 1
    labels: float = 0.0

    card = Card(
        "instatune",
        catalogue=(108,),
        paper="arXiv:2308.15609",
        claim="Sub-networks of a model fine-tuned so beat the same shapes cut after ordinary fine-tuning.",
        keeps=frozenset({"extract", "deterministic"}),
    )

    def offer(self, domain: Domain) -> Offered:
        """Depth, heads and widths; plain choices and blocks as they are."""
        for name in ("widths", "heads"):
            if not getattr(self, name) or not all(0 < share <= 1 for share in getattr(self, name)):
                raise UserError(f"instatune: {name}={getattr(self, name)} were given; give shares above 0, up to 1")
        shares = {"width": self.widths, "heads": self.heads}
        return {
            knob.name: knob.nearest(shares[knob.kind]) if knob.kind in shares else tuple(range(len(knob.options)))
            for knob in domain.knobs
        }

    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        if self.between < 1:
            raise UserError(f"instatune: between={self.between} was given; at least 1 sub-network is trained")
        domain, share = lesson.domain, 1 / (1 + self.between)
        drawn = [domain.random(rng, lesson.offered) for _ in range(self.between)]
        whole = Pupil(domain.largest(lesson.offered), weight=share)
        return whole, *(Pupil(genome, 0, self.labels, share) for genome in drawn)
