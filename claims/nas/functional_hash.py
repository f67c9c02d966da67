"""Functional hash: candidates that compute the same are trained once."""

from __future__ import annotations

import functools
from collections import defaultdict
from random import Random
from typing import Any

import numpy as np

from trimtab.core.claim import Check, Claim
from trimtab.core.knob import Domain
from trimtab.core.method import Hunt, Trial
from trimtab.nas.functional_hash import FunctionalHash
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.breeding import every
from trimtab.parts.protocol import beside
from trimtab.tasks.nas_tables import bench201, cell_hash, needed

TRAININGS = 120

CLAIM = Claim(
    method="functional-hash",
    statement="With a cache keyed by what candidates compute, evolution trains fewer of them for the same best score; "
    "equivalents share a hash, and what computes something else rarely does.",
    source="Gillard et al. 2023, arXiv:2302.05433, sections 3 and 5",
    setting="NAS-Bench-201, whose 15,625 codes draw many cells more than once (6,466 graphs by its authors' count); "
    "regularised evolution on the validation error until the best 1 % of cells, with the cache and without it. A "
    "cached score is that of the cell which was trained first. Hashes are compared with those of other weights and "
    "images.",
    metric="trainings until a cell among the best 1 % (of 120); errors and shares in percent; improvement on the mean "
    "cell, in percent of its accuracy, after 120 trainings",
    checks=(
        Check("fewer trainings until the best 1 %", "cached", "<", "plain"),
        Check("the best error after 120 trainings is not above", "cached_best", "<=", "plain_best"),
        Check("at least 30 % of proposals are not trained", "skipped", ">=", 30.0),
        Check("other weights and images agree on who is equal, in percent of codes", "agreed", ">=", 99.0),
        *beside(),
        Check("errors within a hash differ less than between hashes", "within", "<", "between"),
    ),
    seeds=tuple(range(10)),
    needs=("data",),
)


@functools.cache
def hashes(domain: Domain, draw: int) -> dict[tuple[int, ...], str]:
    """The hash of every cell."""
    return {genome: cell_hash(genome, draw) for genome in every(domain)}


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed."""
    table = bench201(lab.data)
    first, other = hashes(table.domain, 0), hashes(table.domain, 1)
    goal = float(np.quantile(table.values["error"], 0.01))
    found: dict[str, float] = {}
    for kind, identity in (("plain", None), ("cached", first.__getitem__)):
        trials: list[Trial] = []
        known: dict[str, Trial] = {}
        errors: list[float] = []
        while len(errors) < TRAININGS:
            hunt = Hunt(table.domain, tuple(trials), ("error",), seed=seed)
            (new,) = FunctionalHash().ask(hunt, 1, rng=Random(f"{seed}/{len(trials)}"), identity=identity)
            same = known.get(identity(new)) if identity else None
            trials.append(Trial(new, same.values if same else table.evaluate(new), 0.0 if same else 1.0))
            if not same:
                known[identity(new) if identity else str(new)] = trials[-1]
                errors.append(trials[-1].values["error"])
        best = np.minimum.accumulate(errors)
        found[kind] = needed([-e for e in best], -goal)
        found[f"{kind}_best"] = float(best[-1])
        found |= {"skipped": 100 * (1 - TRAININGS / len(trials)), "improvement": table.improvement(trials)}
    drawn = RandomSearch().ask(Hunt(table.domain), TRAININGS, rng=Random(seed))
    found["random_improvement"] = table.improvement([Trial(genome, table.evaluate(genome)) for genome in drawn])
    return found | agreement(table.values["error"], first, other)


def agreement(errors: Any, first: dict[tuple[int, ...], str], other: dict[tuple[int, ...], str]) -> dict[str, float]:
    """In how far two draws of weights and images tell the same cells apart, and what the errors of equals say."""
    groups, second = defaultdict(list), defaultdict(set)
    for i, (genome, text) in enumerate(first.items()):
        groups[text].append(i)
        second[text].add(other[genome])
    pure = sum(len(groups[text]) for text in groups if len(second[text]) == 1)
    several = [errors[members] for members in groups.values() if len(members) > 1]
    within = float(np.sqrt(np.mean(np.concatenate([(part - part.mean()) ** 2 for part in several]))))
    return {
        "hashes": float(len(groups)),
        "agreed": 100 * pure / len(first),
        "within": within,
        "between": float(np.std([part.mean() for part in several])),
    }
