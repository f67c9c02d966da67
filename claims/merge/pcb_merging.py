"""PCB-Merging: above averaging, task arithmetic and TIES at the size of one model."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.merge.linear import Linear
from trimtab.merge.pcb_merging import PCBMerging
from trimtab.merge.task_arithmetic import TaskArithmetic
from trimtab.merge.ties import TIES
from trimtab.tasks import domains as d

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
WIDE = (0.8, 1.0, 1.3, 1.6, 2.0)

CLAIM = Claim(
    method="pcb-merging",
    statement="PCB-Merging is above simple averaging, task arithmetic and TIES, each at its best settings.",
    source="Du et al. 2024, arXiv:2410.02396, tables 1 and 2",
    setting="The shipped image transformer tuned to five ways to show digits; scales and densities chosen on 300 "
    "search images, accuracy on 300 others, mean over the five.",
    metric="mean accuracy",
    checks=(
        Check("above simple averaging", "pcb", ">", "average"),
        Check("above task arithmetic at its best scale", "pcb", ">", "task_arithmetic"),
        Check("above TIES at its best settings", "pcb", ">", "ties"),
        Check("below the multi-task model", "pcb", "<", "multi_task"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one tuning of the five models."""
    parents, base = [d.tuned((name,), seed) for name in d.DOMAINS], d.base_state()
    lab.hashes |= {"pocket-vit": d.base_hash()}
    pcb = d.best([PCBMerging(scale=s, density=k) for s in WIDE for k in (0.05, 0.1, 0.2)], parents, base)
    ties = d.best([TIES(scale=s, density=k) for s in WIDE for k in (0.2, 0.5, 0.8)], parents, base)
    return {
        "pcb": d.mean_accuracy(pcb[1], "test"),
        "ties": d.mean_accuracy(ties[1], "test"),
        "average": d.mean_accuracy(d.merged_state(Linear(), parents), "test"),
        "task_arithmetic": d.mean_accuracy(d.best([TaskArithmetic(scale=s) for s in SCALES], parents, base)[1], "test"),
        "multi_task": d.mean_accuracy(d.tuned(tuple(d.DOMAINS), seed, d.Tuning(epochs=4)), "test"),
    }
