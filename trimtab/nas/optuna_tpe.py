"""Optuna's tree-structured Parzen estimator, as a searcher to compare with."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from random import Random

from trimtab.core.errors import UserError
from trimtab.core.knob import Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Identity, Known
from trimtab.parts.studies import Study, library


@dataclass(frozen=True)
class OptunaTPE(Searcher):
    """Draws from a density of the good trials, and of those draws the one that the good trials explain best against
    the others:

        g* = argmax over draws g of l(g) / m(g),   l of the good trials, m of all others, of all knobs together

    Good is what the first fronts hold, those of limits that are met before all others.

    Fields:
        warmup: trials that are drawn evenly before.
        draws: how many genomes are drawn of l.

    Args of `ask`:
        identity: candidates that compute the same function count as evaluated.

    Reference: Bergstra et al. 2011, NeurIPS, section 4; Watanabe 2023, arXiv:2304.11127, for what Optuna does.
    Departures: Optuna's own, version 5 or newer, from the extra `search`, told all whole trials at each ask; knobs are
        taken together (`multivariate`), and what is being evaluated counts as bad (`constant_liar`). What it repeats is
        asked for again.

    >>> OptunaTPE(warmup=20).config()
    {'warmup': 20}
    """

    warmup: int = 10
    draws: int = 24

    card = Card(
        "optuna-tpe",
        paper="arXiv:2304.11127",
        claim="The peer with densities: what a searcher with predictors is compared with.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random, identity: Identity | None = None) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: Optuna is not installed, or a field makes no sense.
        """
        if min(self.warmup, self.draws) < 1:
            raise UserError(f"optuna-tpe was asked for warmup={self.warmup}, draws={self.draws}; both start at 1")
        optuna, seed = library("optuna"), rng.randrange(2**31)
        hangs = any(knob.when for knob in hunt.domain.knobs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own, of what is experimental there
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=self.warmup,
                n_ei_candidates=self.draws,
                multivariate=True,
                group=hangs,
                constant_liar=True,
                seed=seed,
            )
            return Study(hunt, sampler).ask(Known(hunt, identity), count, lambda: hunt.domain.random(rng))
