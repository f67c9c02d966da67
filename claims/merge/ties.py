"""TIES: above averaging and task arithmetic on several tasks; electing signs is part of the gain."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.merge.dare import DARE
from trimtab.merge.linear import Linear
from trimtab.merge.task_arithmetic import TaskArithmetic
from trimtab.merge.ties import TIES
from trimtab.parts.merging import combine
from trimtab.tasks import domains as d

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
TIES_SCALES = (0.8, 1.0, 1.3, 1.6, 2.0)
DENSITIES = (0.2, 0.5, 0.8)

CLAIM = Claim(
    method="ties",
    statement="TIES is above simple averaging and task arithmetic, each at its best scale; without the election of "
    "signs it is lower; all are below the tuned models and the multi-task model.",
    source="Yadav et al. 2023, arXiv:2306.01708, tables 1 and 5",
    figure="ViT-B/32, 8 tasks, mean accuracy: 65.8 (averaging), 70.1 (task arithmetic), 73.6 (TIES)",
    setting="The shipped image transformer tuned to five ways to show digits; scales and densities chosen on 300 "
    "search images, accuracy on 300 others, mean over the five.",
    metric="mean accuracy; no_election: trimmed as TIES, and averaged without regard to signs, at its best scale",
    checks=(
        Check("above simple averaging", "ties", ">", "average"),
        Check("above task arithmetic at its best scale", "ties", ">", "task_arithmetic"),
        Check("lower without the election of signs", "no_election", "<", "ties"),
        Check("below the multi-task model", "ties", "<", "multi_task"),
        Check("below the tuned models, each on its own task", "ties", "<", "tuned"),
        Check("above the base", "ties", ">", "base"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one tuning of the five models."""
    parents, base = [d.tuned((name,), seed) for name in d.DOMAINS], d.base_state()
    lab.hashes |= {"pocket-vit": d.base_hash()}
    grid = [TIES(scale=s, density=k) for s in TIES_SCALES for k in DENSITIES]
    chosen, merged = d.best(grid, parents, base)
    assert isinstance(chosen, TIES)
    flat = {n: combine([_kept(p[n] - b, chosen.density) for p in parents], [1 / len(parents)] * len(parents))
            for n, b in base.items()}  # fmt: skip
    no_election = [{n: b + s * flat[n] for n, b in base.items()} for s in (chosen.scale * f for f in (0.5, 1, 2, 3, 4))]
    search = [d.mean_accuracy(state, "search") for state in no_election]
    return {
        "ties": d.mean_accuracy(merged, "test"),
        "no_election": d.mean_accuracy(no_election[search.index(max(search))], "test"),
        "average": d.mean_accuracy(d.merged_state(Linear(), parents), "test"),
        "task_arithmetic": d.mean_accuracy(d.best([TaskArithmetic(scale=s) for s in SCALES], parents, base)[1], "test"),
        "dare": d.mean_accuracy(d.best([DARE(scale=s, density=0.5) for s in SCALES], parents, base)[1], "test"),
        "multi_task": d.mean_accuracy(d.tuned(tuple(d.DOMAINS), seed, d.Tuning(epochs=4)), "test"),
        "tuned": sum(d.accuracy(p, n, "test") for p, n in zip(parents, d.DOMAINS, strict=True)) / len(parents),
        "base": d.mean_accuracy(base, "test"),
    }


def _kept(change: Any, density: float) -> Any:
    from trimtab.parts.merging import kept
    from trimtab.parts.selection import count_for, kth_largest

    return kept(change, kth_largest(change, count_for(density, change.numel())))
