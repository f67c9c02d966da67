"""ENAS's controller, and the memory of sampled architectures that was proposed for it."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher, Trial
from trimtab.parts.breeding import Identity, Known
from trimtab.parts.fronts import excess, table

if TYPE_CHECKING:
    from trimtab.parts.controllers import Controller


@dataclass(frozen=True)
class ENAS(Searcher):
    """A recurrent controller draws genomes, and policy gradients make those likelier that scored well.

        theta <- theta + rate grad [ (R(g) - b) log p(g) + entropy H ],   b <- decay b + (1 - decay) R

    With `memory`, each step also reads earlier genomes and lowers how badly their choices can be told from the state
    behind them, so that the state has to keep what was chosen.

    Fields:
        hidden: size of the state.
        rate: of Adam. entropy: weight of the entropy. decay: of the baseline.
        group: trials of a step. memory: weight of the loss of what was forgotten; 0: ENAS as it was.

    Args of `ask`:
        identity: candidates that compute the same function count as evaluated.

    Reference: Adam and Lorraine 2019, arXiv:1904.00438 (the comparison with random search, and the memory); Pham et al.
        2018, arXiv:1802.03268, section 2.2 (controller and policy gradient).
    Departures: the controller is trained anew from the journal at each ask, by one pass over it in its order, so trials
        may be of an older policy; R is the rank of the first objective, from -1 to 1, what breaks limits last; `rate`
        is ten times theirs, for trials are few; what is repeated is drawn again. How the memory enters the loss is our
        reading of the paper's summary.

    >>> from trimtab.core.knob import Domain, Knob
    >>> domain = Domain(tuple(Knob(f"k{i}", (1, 2, 3)) for i in range(4)))
    >>> len(ENAS().ask(Hunt(domain), 5, rng=Random(0)))
    5
    """

    hidden: int = 64
    rate: float = 3.5e-3
    entropy: float = 1e-4
    decay: float = 0.95
    group: int = 4
    memory: float = 0.0

    card = Card(
        "enas",
        catalogue=(95,),
        paper="arXiv:1904.00438",
        claim="No better than random search with the same shared weights; a memory makes its state know the network.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, identity: Identity | None = None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: a field makes no sense.
        """
        if min(self.hidden, self.group) < 1 or self.rate <= 0 or not 0 <= self.decay < 1 or self.memory < 0:
            raise UserError(
                f"enas was asked for hidden={self.hidden}, rate={self.rate}, decay={self.decay}, group={self.group}, "
                f"memory={self.memory}; hidden and group start at 1, rate is above 0, decay in 0..1, memory at least 0"
            )
        import torch

        known, controller = Known(hunt, identity), self.controller(hunt)
        drawing = torch.Generator().manual_seed(rng.randrange(2**31))
        drawn: list[Genome] = []

        def draw() -> Genome:
            if not drawn:
                drawn.extend(controller.draw(32, drawing))
            return drawn.pop()

        found = known.taken(draw, count)
        return found + known.taken(lambda: hunt.domain.random(rng), count - len(found))

    def controller(self, hunt: Hunt) -> Controller:
        """The controller, trained by the trials of a hunt."""
        import torch

        from trimtab.parts.controllers import Controller

        whole = [trial for trial in hunt.trials if trial.effort >= 1]
        with torch.random.fork_rng():
            torch.manual_seed(hunt.seed)
            controller = Controller(hunt.domain, self.hidden)
            optimiser = torch.optim.Adam(controller.parameters(), self.rate)
            memory, baseline = Random(hunt.seed), 0.0
            rewards = self._rewards(hunt, whole)
            for i in range(0, len(whole), self.group):
                genomes = [trial.genome for trial in whole[i : i + self.group]]
                reward = torch.tensor(rewards[i : i + self.group], dtype=torch.float32)
                baseline = self.decay * baseline + (1 - self.decay) * float(reward.mean())
                chances, entropies = controller.scored(genomes)
                loss = -((reward - baseline) * chances + self.entropy * entropies).mean()
                if self.memory:
                    earlier = [memory.choice(whole[: i + self.group]).genome for _ in range(32)]
                    loss = loss + self.memory * controller.forgotten(earlier)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        return controller

    @staticmethod
    def _rewards(hunt: Hunt, trials: list[Trial]) -> list[float]:
        """From 1 for the best to -1 for the worst."""
        if len(trials) < 2:
            return [0.0] * len(trials)
        values = table(trials, hunt.objectives[:1])[:, 0]
        over = excess({name: table(trials, (name,))[:, 0] for name in hunt.limits}, hunt.limits)
        order = np.lexsort((values, over if len(over) else np.zeros(len(values))))
        rewards = np.empty(len(trials))
        rewards[order] = np.linspace(1, -1, len(trials))
        return [float(reward) for reward in rewards]
