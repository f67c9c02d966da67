"""A language model fine-tuned once, so that it may lose layers and half of some feed-forward layers."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Offered
from trimtab.core.method import Card, Elastic, Lesson, Pupil


@dataclass(frozen=True)
class LLaMANAS(Elastic):
    """Each step trains the whole model on labels and one random sub-network on what it put out: three depths, and a
    feed-forward width for each layer; heads stay. The search for networks afterwards is a searcher's.

    Fields:
        depths: shares of the layers (paper: 24, 28 and 32 of 32).
        widths: shares of the hidden units of feed-forward layers (paper: 5,504 and 11,008 of 11,008).

    Reference: Sarah et al. 2024, arXiv:2405.18377, section 3; how the elastic model is tuned: Sridhar et al. 2023,
        arXiv:2308.15609, section 3.
    Departures: which layers go first is told by how little they turn the residual, and is the same for all networks.

    >>> from trimtab.core.knob import Knob
    >>> domain = Domain((Knob("blocks", (4, 5, 6, 7, 8), "depth"), Knob("ffn", (32, 64), "width")))
    >>> LLaMANAS().offer(domain)
    {'blocks': (2, 3, 4), 'ffn': (0, 1)}
    """

    depths: tuple[float, ...] = (0.75, 0.875, 1.0)
    widths: tuple[float, ...] = (0.5, 1.0)

    card = Card(
        "llama-nas",
        catalogue=(295,),
        paper="arXiv:2405.18377",
        claim="Found sub-networks beat uniform and pruned ones of their size, and quantisation shrinks them further.",
        keeps=frozenset({"extract", "deterministic"}),
    )

    def offer(self, domain: Domain) -> Offered:
        """Depths and widths."""
        for name in ("depths", "widths"):
            if not getattr(self, name) or not all(0 < share <= 1 for share in getattr(self, name)):
                raise UserError(f"llama-nas: {name}={getattr(self, name)} were given; give shares above 0, up to 1")
        shares = {"depth": self.depths, "width": self.widths}
        return {knob.name: knob.nearest(shares[knob.kind]) for knob in domain.knobs if knob.kind in shares}

    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        domain, offered = lesson.domain, lesson.offered
        return Pupil(domain.largest(offered), weight=0.5), Pupil(domain.random(rng, offered), 0, weight=0.5)
