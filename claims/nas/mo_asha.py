"""MO-ASHA: most of a front for a part of the training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.engine.hunting import Chase, hunt
from trimtab.nas.mo_asha import MOASHA
from trimtab.nas.random_search import RandomSearch
from trimtab.tasks.digit_nets import DOMAIN, costs, error, made, trained

TRIALS, RUNGS, STEPS = 30, (10, 30), 90

CLAIM = Claim(
    method="mo-asha",
    statement="Stopping what is on none of the best fronts of a rung keeps nearly all of the volume for a part of the "
    "training.",
    source="Schmucker et al. 2021, arXiv:2106.12639, section 4",
    setting="30 random convolutional networks and recipes for the digits, of 90 steps each, rungs at 10 and 30 steps, "
    "error and multiplications; the same networks, all trained to the end, are what it is compared with. Beside it, "
    "as many networks as its steps would train to the end, the first of the same 30.",
    metric="share of the volume of all 30, of what was trained to the end; share of the steps",
    checks=(
        Check("at least 95 % of the volume", "volume", ">=", 0.95),
        Check("at most 60 % of the steps", "steps", "<=", 0.6),
        Check("more volume than fewer networks trained to the end", "volume", ">", "fewer"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed."""
    from trimtab.parts.fronts import hypervolume, table

    spent = [0]

    def evaluate(genome: tuple[int, ...]) -> Iterator[tuple[float, dict[str, float]]]:
        setting = DOMAIN.setting(genome)
        model, before, macs = made(setting, seed), 0, costs(setting)["macs"]
        for step in (*RUNGS, STEPS):
            trained(model, setting, seed + step, step - before)
            spent[0] += step - before
            before = step
            yield step / STEPS, {"error": error(model, "search"), "macs": macs}

    chase = Chase(DOMAIN, RandomSearch(), ("error", "macs"), evaluations=TRIALS, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        everything = hunt(chase, evaluate, Path(folder) / "all")
        whole, spent[0] = spent[0], 0
        stopped = hunt(Chase(**{**vars(chase), "stopper": MOASHA()}), evaluate, Path(folder) / "stopped")
    points = table(everything, ("error", "macs"))
    corner = points.max(0) * 1.01

    def volume(trials: list[Any]) -> float:
        return hypervolume(table(trials, ("error", "macs")), corner) / hypervolume(points, corner)

    share = spent[0] / whole
    return {
        "volume": volume([trial for trial in stopped if trial.effort == 1]),
        "steps": share,
        "fewer": volume(everything[: round(share * TRIALS)]),
    }
