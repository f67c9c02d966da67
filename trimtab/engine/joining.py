"""Whole models into one: what a joining method asks to see of them, the join, and batch norms that see the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Joiner, Scene
from trimtab.core.modelmap import trace
from trimtab.engine.stats import rows_of
from trimtab.engine.watching import watched

Batch = Mapping[str, Tensor]
Places = tuple[str, ...]


@torch.no_grad()
def moments(models: Sequence[nn.Module], places: Sequence[Places], batches: Sequence[Batch]) -> dict[Places, Tensor]:
    """Second moments E[u u^T], u = [x_1, x_2, ..., 1], of what modules of several models read, double.

    Args:
        places: groups of paths, one a model.
        batches: forward arguments by name; every model sees all of them.

    Raises:
        UserError: modules of one group do not read equally many rows.
    """
    sums: dict[Places, Tensor] = {}
    count: dict[Places, int] = {}
    for batch in batches:
        seen = [_inputs(model, {group[i] for group in places}, batch) for i, model in enumerate(models)]
        for group in places:
            rows = [seen[i][path] for i, path in enumerate(group)]
            if len({len(x) for x in rows}) > 1:
                raise UserError(f"{' and '.join(group)} read {', '.join(str(len(x)) for x in rows)} rows of one batch; "
                                "only places that see the same items and positions can be compared")  # fmt: skip
            u = torch.cat([*rows, rows[0].new_ones(len(rows[0]), 1)], 1).double()
            sums[group] = sums[group].addmm_(u.T, u) if group in sums else u.T @ u
            count[group] = count.get(group, 0) + len(u)
    return {group: total / count[group] for group, total in sums.items()}


def _inputs(model: nn.Module, paths: set[str], batch: Batch) -> dict[str, Tensor]:
    """What each module reads in one forward, as rows; of a module that runs several times all of it."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def see(path: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[path].append(rows_of(next(v for v in given if v.is_floating_point()), module, path))

    with watched(model, {path: partial(see, path) for path in paths}):
        model(**batch)
    return {path: torch.cat(parts) for path, parts in found.items()}


def join(method: Joiner, models: Sequence[nn.Module], batches: Sequence[Batch]) -> nn.Module:
    """Trace the models, collect what the method asks for on the batches, and join.

    Args:
        models: in evaluation mode; left as they are.
        batches: forward arguments by name, the first of which the models are also traced on.

    Raises:
        UserError: the method cannot join these.
    """
    scenes = [Scene(model, trace(model, dict(batches[0]))) for model in models]
    given: dict[str, Any] = {}
    if "moments" in method.needs():
        given["moments"] = moments(models, method.places(scenes), batches)
    return method.join(scenes, **given)


@torch.no_grad()
def settle(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Give every batch norm the mean and variance of what it now sees; a joined model's differ from its parents'."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    pace = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then takes the plain mean over batches
        norm.train()
    try:
        for batch in batches if norms else ():
            model(**batch)
    finally:
        for norm, momentum in zip(norms, pace, strict=True):
            norm.momentum = momentum
            norm.eval()
