"""ParZC: nodes that are weighed order networks better than nodes that are summed."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import numpy as np

from trimtab.core.claim import Check, Claim
from trimtab.core.knob import Genome
from trimtab.core.method import Hunt, Searcher, Trial
from trimtab.nas.parzc import ParZC
from trimtab.nas.random_search import RandomSearch
from trimtab.parts.neural_predictors import Mixer
from trimtab.parts.predicting import Concord
from trimtab.parts.protocol import beside
from trimtab.tasks.nas_tables import OPERATIONS, bench201
from trimtab.tasks.untrained_cells import untrained_cell

NETWORKS, TAUGHT, EVALUATIONS = 200, 80, 40

CLAIM = Claim(
    method="parzc",
    statement="A mixer that learns what each node's statistic counts for orders networks it has not seen better than "
    "the sum of the statistics does, and the smooth tau teaches it at least as well as squared errors.",
    source="Dong et al. 2024, arXiv:2402.02105, sections 3 and 4",
    figure="above zero-cost proxies on NAS-Bench-101, 201 and NDS; no single figure",
    setting="200 random cells of NAS-Bench-201 with their validation error; untrained networks of two cells and six "
    "channels, one batch of noise with random labels; for each edge |y dL/dy|, and |w dL/dw| where it has weights. 80 "
    "networks teach, 120 are ordered. Raw: the best of the sums of either statistic and the number of convolutions.",
    metric="Kendall's tau with the validation error, 120 networks; improvement on the mean cell, in percent of its "
    "accuracy, after 40 evaluations",
    checks=(
        Check("above the best summed proxy", "parzc", ">", "raw"),
        Check("the smooth tau is not below squared errors", "parzc", ">=", "mse"),
        *beside(),
    ),
    seeds=tuple(range(8)),
    needs=("data",),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one split of the networks."""
    table = bench201(lab.data)
    rng = Random(0)
    genomes = list(dict.fromkeys(table.domain.random(rng) for _ in range(NETWORKS + 20)))[:NETWORKS]
    known = statistics(tuple(genomes))
    error = table.values["error"][table.index(genomes)]
    order = np.random.default_rng(seed).permutation(NETWORKS)
    taught, rest = order[:TAUGHT], order[TAUGHT:]
    edges = known.shape[1] // 2
    convolutions = np.array([sum(OPERATIONS[place].startswith("conv") for place in genome) for genome in genomes])
    sums = [known[rest, :edges].sum(1), known[rest, edges:].sum(1), convolutions[rest]]
    found = {"raw": max(Concord(-np.asarray(total, dtype=float), error[rest]).tau for total in sums)}
    for name, loss in (("parzc", "kendall"), ("mse", "mse")):
        mixer = Mixer(known[taught], error[taught], loss, seed)  # type: ignore[arg-type]
        found[name] = Concord(mixer.mean(known[rest]), error[rest]).tau
    searchers: dict[str, Searcher] = {"": ParZC(), "random_": RandomSearch()}
    for name, searcher in searchers.items():
        trials: tuple[Trial, ...] = ()
        while len(trials) < EVALUATIONS:
            hunt = Hunt(table.domain, trials, ("error",), seed=seed)
            given: dict[str, Any] = {"rng": Random(f"{seed}/{len(trials)}"), "nodes": nodes}
            new = searcher.ask(hunt, EVALUATIONS // 2, **{k: v for k, v in given.items() if k in searcher.needs()})
            trials += tuple(Trial(genome, table.evaluate(genome)) for genome in new)
        found[f"{name}improvement"] = table.improvement(trials)
    return found


def nodes(genomes: list[Genome]) -> Any:
    """What is known of the edges of untrained networks."""
    return statistics(tuple(genomes))


@functools.cache
def statistics(genomes: tuple[Genome, ...]) -> Any:
    """Saliencies of the outputs and of the weights of every edge of every cell, `[genomes, 2 * edges]`."""
    return np.array([untrained_cell(genome) for genome in genomes])
