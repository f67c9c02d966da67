"""DeepArchitect's searchers: a tree of decisions, walked by what was found below each, or by a surrogate of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np

from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome
from trimtab.core.method import Card, Hunt, Searcher
from trimtab.parts.breeding import Known
from trimtab.parts.fronts import excess, table
from trimtab.parts.predicting import Encoding, Ridge

Path = tuple[int, ...]


@dataclass(frozen=True)
class DeepArchitect(Searcher):
    """Decide one knob after the other, each by the upper confidence bound of what was found behind its options.

        option* = argmax  mean score below it + bonus sqrt(2 ln n(parent) / n(option)),   an option never taken first

    Idle knobs are passed over, so that the tree is that of the conditional domain. The first decision without a
    history is drawn, and so are all behind it. Scores are the ranks of the trials, from 0 to 1. With `by="smbo"` a
    ridge over decisions scores such walks and learns the tree, and the best of `walks` is evaluated.

    Fields:
        by: `mcts` walks on what was evaluated, `smbo` on a surrogate of it.
        bonus: of the bound (paper's code: 1).
        walks: on the surrogate for each proposal (paper's code: 256).
        explore: share of proposals that are random with `smbo` (paper's code: 0.1).
        halves: decisions of ordered knobs are split in halves, so that near options share what is found.

    Reference: Negrinho and Gordon 2017, arXiv:1704.08792, sections 6.2 (MCTS, with bisection) and 6.3 (SMBO).
    Departures: ranks in place of accuracies, so that several objectives and limits are understood; nothing is
        evaluated twice; one feature a decision in place of n-grams of the printed network.

    >>> from trimtab.core.knob import Knob
    >>> from trimtab.core.method import Trial
    >>> hunt = Hunt(Domain((Knob("op", ("a", "b")), Knob("k", (1, 2)))), (Trial((0, 0), {"error": 1.0}),))
    >>> DeepArchitect().ask(hunt, 1, rng=Random(0))[0][0]
    1
    """

    by: Literal["mcts", "smbo"] = "mcts"
    bonus: float = 0.3
    walks: int = 128
    explore: float = 0.1
    halves: bool = True

    card = Card(
        "deeparchitect",
        catalogue=(132,),
        paper="arXiv:1704.08792",
        claim="At equal evaluations MCTS and SMBO find better networks than random search.",
        keeps=frozenset({"deterministic", "resumable"}),
    )

    def ask(self, hunt: Hunt, count: int, *, rng: Random) -> list[Genome]:
        """At most `count` new genomes.

        Raises:
            UserError: a field makes no sense.
        """
        if self.by not in ("mcts", "smbo") or self.bonus < 0 or self.walks < 1 or not 0 <= self.explore <= 1:
            raise UserError(
                f"deeparchitect was asked for by={self.by!r}, bonus={self.bonus}, walks={self.walks}, "
                f"explore={self.explore}; by is mcts or smbo, bonus is at least 0, walks 1, explore in 0..1"
            )
        known, domain = Known(hunt), hunt.domain
        if len(hunt.trials) < 2:
            return known.taken(lambda: domain.random(rng), count)
        genomes = [trial.genome for trial in hunt.trials]
        scores = _ranked(hunt)
        if self.by == "mcts":
            tree = _Tree(domain, self.halves, self.bonus)
            for genome, score in zip(genomes, scores, strict=True):
                tree.learn(genome, score)
            for genome in hunt.pending:
                tree.learn(genome, 0.0)
            return known.taken(lambda: tree.tried(rng), count)
        encoding = Encoding(domain)
        surrogate = Ridge(encoding.rows(genomes), np.asarray(scores))
        tree = _Tree(domain, self.halves, self.bonus)
        walked: dict[Genome, float] = {}
        for _ in range(self.walks):
            genome = tree.walk(rng)
            walked[genome] = float(surrogate.mean(encoding.rows([genome]))[0])
            tree.learn(genome, walked[genome])
        best = iter(sorted((g for g in walked if g not in known), key=lambda g: -walked[g]))
        make: Callable[[], Genome | None] = lambda: None if rng.random() < self.explore else next(best, None)  # noqa: E731
        return known.taken(lambda: make() or domain.random(rng), count)


def _ranked(hunt: Hunt) -> list[float]:
    """Scores from 0 (worst) to 1 (best): places by limits, then by the mean place over objectives."""
    points = table(hunt.trials, hunt.objectives)
    over = excess({name: table(hunt.trials, (name,))[:, 0] for name in hunt.limits}, hunt.limits)
    mean = np.mean([np.argsort(np.argsort(column, kind="stable"), kind="stable") for column in points.T], axis=0)
    order = np.lexsort((mean, over)) if len(over) else np.argsort(mean, kind="stable")
    found = np.empty(len(order))
    found[order] = np.linspace(1, 0, len(order))
    return [float(score) for score in found]


class _Tree:
    """Counts and sums of scores below each decision; a decision of an ordered knob is a row of halvings."""

    def __init__(self, domain: Domain, halves: bool, bonus: float) -> None:
        self.domain, self.halves, self.bonus = domain, halves, bonus
        self.count: dict[Path, int] = defaultdict(int)
        self.total: dict[Path, float] = defaultdict(float)

    def _parts(self, i: int, left: Sequence[int]) -> list[Sequence[int]]:
        """What a decision among some options of a knob is between."""
        if self.halves and self.domain.knobs[i].ordered and len(left) > 2:
            half = (len(left) + 1) // 2
            return [left[:half], left[half:]]
        return [[place] for place in left]

    def learn(self, genome: Genome, score: float) -> None:
        """Add a score to all decisions of a genome."""
        for path in self._path(genome):
            self.count[path] += 1
            self.total[path] += score

    def _path(self, genome: Genome) -> list[Path]:
        path: Path = ()
        found = [path]
        for i, on in enumerate(self.domain.active(genome)):
            left: Sequence[int] = range(len(self.domain.knobs[i].options)) if on else []
            while len(left) > 1:
                parts = self._parts(i, left)
                at = next(n for n, part in enumerate(parts) if genome[i] in part)
                left, path = parts[at], (*path, at)
                found.append(path)
        return found

    def walk(self, rng: Random) -> Genome:
        """A genome by the bounds as far as the tree is known, and drawn behind it."""
        genome = [0] * len(self.domain.knobs)
        path: Path = ()
        for i, knob in enumerate(self.domain.knobs):
            if not self.domain.active(tuple(genome))[i]:
                continue
            left: Sequence[int] = range(len(knob.options))
            while len(left) > 1:
                parts = self._parts(i, left)
                at = self._chosen(path, len(parts), rng)
                left, path = parts[at], (*path, at)
            genome[i] = left[0]
        return self.domain.canonical(genome)

    def tried(self, rng: Random) -> Genome:
        """A walk, which counts as one that found nothing until its score is there, so that the next goes elsewhere."""
        genome = self.walk(rng)
        self.learn(genome, 0.0)
        return genome

    def _chosen(self, path: Path, parts: int, rng: Random) -> int:
        fresh = [at for at in range(parts) if not self.count[(*path, at)]]
        if fresh:
            return rng.choice(fresh)
        log = math.log(self.count[path])

        def bound(at: int) -> float:
            child = (*path, at)
            return self.total[child] / self.count[child] + self.bonus * math.sqrt(2 * log / self.count[child])

        return max(range(parts), key=bound)
