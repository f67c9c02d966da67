"""ENAS: its controller beside random search on the same shared weights, and what its state knows."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np

from trimtab.core.claim import Check, Claim
from trimtab.core.knob import Domain, Genome
from trimtab.core.method import Hunt, Searcher, Trial
from trimtab.nas.enas import ENAS
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.protocol import beside, improvement

STEPS, EVALUATIONS, PAIRED = 200, 64, 60

CLAIM = Claim(
    method="enas",
    statement="A recurrent controller finds no better networks than random search with the same shared weights, and "
    "its state says little of the network that was drawn; a memory of earlier networks makes it tell them apart.",
    source="Adam and Lorraine 2019, arXiv:1904.00438",
    figure="no figure in its summary: ENAS is not significantly better than random search with weight sharing",
    setting=f"The space mobile-cnn on scikit-learn's digits: one elastic network, {STEPS} steps of 64 images, each of "
    f"one random sub-network; {EVALUATIONS} evaluations with its weights, in fours, of ENAS, of ENAS with the memory, "
    f"and of random search. What the state knows: {PAIRED} random networks, all pairs.",
    metric="error on 300 test images of the best by the search images, in percent; improvement: on the mean of the "
    "random networks, in percent of its accuracy; knows: rank correlation of the distance of two states with the "
    "number of choices that differ",
    checks=(
        Check("random search is less than a point behind", "behind", "<", 1.0),
        Check("the memory raises what the state knows", "knows_memory", ">", "knows"),
        Check("with the memory the state knows the network, at least 0.5", "knows_memory", ">=", 0.5),
        Check("with the memory no more error", "memory", "<=", "enas"),
        *beside(),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one elastic network and its searches."""
    from trimtab.elasticity import digits_space
    from trimtab.engine.jury import Jury

    bench = digits_space(seed)
    net = bench.trained("uniform-sampling", STEPS)
    choosing = Jury(bench.task, bench.items.take(0, bench.gathered), bench.task.batch("search", 300, seed))
    known: dict[Genome, dict[str, float]] = {}

    def evaluate(genome: Genome) -> dict[str, float]:
        if genome not in known:
            known[genome] = {"error": 100 * choosing.of(net, genome), "unseen": 100 * bench.error(net, genome)}
        return known[genome]

    plain, memory = ENAS(), ENAS(memory=1.0)
    searchers: dict[str, Searcher] = {"enas": plain, "memory": memory, "random": RandomSearch()}
    hunts: dict[str, Hunt] = {}
    for name, searcher in searchers.items():
        hunt = Hunt(bench.domain, seed=seed)
        while len(hunt.trials) < EVALUATIONS:
            new = searcher.ask(hunt, 4, rng=Random(f"{seed}/{len(hunt.trials)}"))
            trials = (*hunt.trials, *(Trial(genome, evaluate(genome)) for genome in new))
            hunt = Hunt(bench.domain, trials, seed=seed)
        hunts[name] = hunt
    found = {name: best(hunt.trials) for name, hunt in hunts.items()}
    accuracies = [100 - trial.values["unseen"] for trial in hunts["random"].trials]
    return {
        **found,
        "behind": found["random"] - found["enas"],
        "knows": knows(plain, hunts["enas"]),
        "knows_memory": knows(memory, hunts["memory"]),
        "improvement": improvement(100 - found["enas"], accuracies),
        "random_improvement": improvement(100 - found["random"], accuracies),
    }


def best(trials: tuple[Trial, ...]) -> float:
    """The unseen error of the best by the error seen."""
    return min(trials, key=lambda trial: trial.values["error"]).values["unseen"]


def knows(searcher: ENAS, hunt: Hunt) -> float:
    """Rank correlation of how far states are apart with how many choices differ."""
    from scipy.stats import spearmanr

    genomes = drawn(hunt.domain)
    states = searcher.controller(hunt).states(genomes).detach().double().numpy()
    one, other = np.triu_indices(len(genomes), 1)
    apart = np.linalg.norm(states[one] - states[other], axis=1)
    differ = (np.array(genomes)[one] != np.array(genomes)[other]).sum(1)
    return float(spearmanr(apart, differ).statistic)


def drawn(domain: Domain) -> list[Genome]:
    """Random networks, the same ones always."""
    rng = Random(0)
    return [domain.random(rng) for _ in range(PAIRED)]
