"""EAS: networks are grown step by step from those that are trained, and a controller learns where."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher, Trial
from trimtab.parts.breeding import Known
from trimtab.parts.fronts import excess, ranks, table


@dataclass(frozen=True)
class EAS(Searcher):
    """From the smallest network on, one of the best is grown by one option of one ordered knob, drawn by a policy that
    REINFORCE teaches.

        p(knob) = softmax(theta),   reward = tan(accuracy pi / 2) - its moving mean,   theta += rate reward (1 - p)

    The policy is worked out anew from all trials. An evaluation may start from the weights of the network that was
    grown, by `parts.growing`, and then trains briefly: that is the evaluation's.

    Fields:
        parents: how many of the best trials are grown.
        rate: of the policy.
        decay: of the moving mean of rewards.

    Reference: Cai et al. 2018, arXiv:1707.04873, sections 3 (actions of widening and deepening) and 4.1 (reward).
    Departures: one softmax over knobs in place of recurrent actors that read the network; ordered knobs of any domain
        are what can be grown. The first objective is the error, in percent.

    >>> from trimtab.core.knob import Domain, Knob
    >>> hunt = Hunt(Domain((Knob("width", (4, 8), "width"), Knob("depth", (1, 2), "depth"))))
    >>> EAS().ask(hunt, 1, rng=Random(0))
    [(0, 0)]
    """

    parents: int = 4
    rate: float = 0.2
    decay: float = 0.9

    card = Card(
        "eas",
        catalogue=(84,),
        paper="arXiv:1707.04873",
        claim="Grown from trained weights, search finds better networks than from scratch at equal training.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: a field makes no sense.
        """
        if self.parents < 1 or not 0 <= self.decay < 1:
            raise UserError(
                f"eas was asked for parents={self.parents}, decay={self.decay}; 1 or more, and 0 to below 1"
            )
        known = Known(hunt)
        if not hunt.trials:
            found = known.taken(hunt.domain.smallest, 1)
            return found + known.taken(lambda: self._random(hunt, rng), count - len(found))
        policy = self._policy(hunt)
        over = excess({name: table(hunt.trials, (name,))[:, 0] for name in hunt.limits}, hunt.limits)
        place = ranks(table(hunt.trials, hunt.objectives), over)
        best = sorted(range(len(place)), key=lambda i: (place[i], -i))[: self.parents]

        def grow() -> Genome:
            parent = hunt.trials[rng.choice(best)].genome
            steps = grown(hunt, parent)
            if not steps:
                return self._random(hunt, rng)
            (knob,) = rng.choices(list(steps), [math.exp(policy[knob]) for knob in steps])
            return steps[knob]

        return known.taken(grow, count)

    @staticmethod
    def _random(hunt: Hunt, rng: Random) -> Genome:
        return hunt.domain.random(rng)

    def _policy(self, hunt: Hunt) -> dict[int, float]:
        """The logits of the knobs after all trials, each seen as a growth of the best that it can have grown from."""
        logits = dict.fromkeys(range(len(hunt.domain.knobs)), 0.0)
        mean = 0.0
        seen: list[Trial] = []
        for trial in hunt.trials:
            reward = math.tan(min(max(1 - trial.values[hunt.objectives[0]] / 100, 0.0), 0.99) * math.pi / 2)
            parents = [(t, k) for t in seen if (k := step_between(hunt, t.genome, trial.genome)) is not None]
            if parents:
                _, knob = min(parents, key=lambda pair: pair[0].values[hunt.objectives[0]])
                total = sum(math.exp(v) for v in logits.values())
                advantage = max(-5.0, min(5.0, reward - mean))
                logits[knob] += self.rate * advantage * (1 - math.exp(logits[knob]) / total)
            mean = self.decay * mean + (1 - self.decay) * reward if seen else reward
            seen.append(trial)
        return logits


def grown(hunt: Hunt, genome: Genome) -> Mapping[int, Genome]:
    """Place of each ordered knob that can grow -> the network grown there by one option."""
    found = {}
    for i, (knob, on) in enumerate(zip(hunt.domain.knobs, hunt.domain.active(genome), strict=True)):
        if on and knob.ordered and genome[i] + 1 < len(knob.options):
            found[i] = hunt.domain.canonical((*genome[:i], genome[i] + 1, *genome[i + 1 :]))
    return found


def step_between(hunt: Hunt, parent: Genome, child: Genome) -> int | None:
    """The knob that one step of growth from parent to child changed, or None."""
    return next((knob for knob, genome in grown(hunt, parent).items() if genome == child), None)
