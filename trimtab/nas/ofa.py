"""Once-for-all networks: the largest is trained first, then ever smaller ones inside of it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Offered
from trimtab.core.method import Card, Elastic, Lesson, Pupil


@dataclass(frozen=True)
class OFA(Elastic):
    """Progressive shrinking: the largest network alone, then with elastic kernels, then depths, then widths, each
    phase with all choices of those before, learning from the largest network as it was after its own phase.

    A step of a phase trains `pupils[phase]` sub-networks drawn evenly from the choices that are open; the loss of each
    is the cross-entropy with the teacher's probabilities. Depths and widths open in two parts: first all options but
    the smallest, then all. Before widths open, channels are sorted by the sum of |w| over the weights that read them.
    The schedule of the learning rate begins anew in every phase.

    Fields:
        shares: of the steps, for the largest network, kernels, depths and widths (paper: 180, 125, 145, 145 epochs).
        first: share of the phases of depths and widths in which the smallest option is left out (paper: 25 / 145).
        pupils: sub-networks a step in these phases (paper: 1, 1, 2, 4).
        rates: largest learning rate of these phases, as shares of the training's (paper, with SGD: 2.6, 0.96, 0.24 and
            0.24).
        labels: share of the loss that comes from labels once there is a teacher (paper's code: 0).
        transforms: smaller kernels come from the middles of larger ones through a matrix for each layer and size, which
            is trained, too (paper: yes).

    Reference: Cai et al. 2020, arXiv:1908.09791, section 3.3; numbers of steps and sub-networks from the authors' code.
    Departures: plain choices (activations, blocks) open with kernels; the teacher sees images at the largest
        resolution, whatever its pupils see; the schedule does not begin anew once more when the smallest depth and
        width open; every phase begins at the full rate, since at the paper's shares of it AdamW leaves the smaller
        networks as they are.

    >>> OFA().phase(Lesson(Domain(()), {}, step=999, steps=1000))
    3
    """

    shares: tuple[float, ...] = (0.3, 0.21, 0.245, 0.245)
    first: float = 25 / 145
    pupils: tuple[int, ...] = (1, 1, 2, 4)
    rates: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    labels: float = 0.0
    transforms: bool = True

    card = Card(
        "ofa",
        catalogue=(107,),
        paper="arXiv:1908.09791",
        claim="Sub-networks cut out without retraining are close to networks trained alone.",
        keeps=frozenset({"extract", "deterministic"}),
    )

    def offer(self, domain: Domain) -> Offered:
        """All choices."""
        return {knob.name: range(len(knob.options)) for knob in domain.knobs}

    def rate(self, lesson: Lesson) -> tuple[float, float, float]:
        phase, _ = self._place(lesson)
        start = sum(self.shares[:phase])
        return start, start + self.shares[phase], self.rates[phase]

    def phase(self, lesson: Lesson) -> int:
        """0: the largest network, at every resolution; 1: kernels, too; 2: depths, too; 3: widths, too."""
        return self._place(lesson)[0]

    def teach(self, lesson: Lesson, rng: Random) -> tuple[Pupil, ...]:
        phase, through = self._place(lesson)
        if phase == 0:
            return (Pupil(lesson.domain.random(rng, self._open(lesson, phase, through))),)
        drawn = [lesson.domain.random(rng, self._open(lesson, phase, through)) for _ in range(self.pupils[phase])]
        return tuple(Pupil(genome, "before", self.labels, 1 / len(drawn)) for genome in drawn)

    def sorts(self, lesson: Lesson) -> bool:
        phase = self.phase(lesson)
        before = Lesson(lesson.domain, lesson.offered, lesson.step - 1, lesson.steps)
        return phase == 3 and (lesson.step == 0 or self.phase(before) < 3)

    def _place(self, lesson: Lesson) -> tuple[int, float]:
        """The phase, and the share of it that is over."""
        four = all(len(numbers) == 4 for numbers in (self.shares, self.pupils, self.rates))
        if not four or abs(sum(self.shares) - 1) > 1e-6 or min(self.pupils) < 1 or min(self.rates) <= 0:
            raise UserError(
                f"ofa: shares={self.shares}, pupils={self.pupils} and rates={self.rates} were given; four shares that "
                "add up to 1 are needed, four numbers of at least 1, and four above 0"
            )
        done, start = (lesson.step + 0.5) / lesson.steps, 0.0
        for phase, share in enumerate(self.shares):
            if done < start + share:
                return phase, (done - start) / share
            start += share
        return 3, 1.0

    def _open(self, lesson: Lesson, phase: int, through: float) -> Offered:
        opened: dict[str, tuple[int, ...]] = {}
        for knob in lesson.domain.knobs:
            places = tuple(lesson.offered.get(knob.name, (len(knob.options) - 1,)))
            turn = {"resolution": 0, "depth": 2, "width": 3, "heads": 3}.get(knob.kind, 1)
            if turn > phase:
                places = places[-1:]
            elif turn == phase > 1 and through < self.first and len(places) > 2:
                places = places[1:]
            opened[knob.name] = places
        return opened
