"""How good a merge is on the user's own data, beside its parents; and the search for its coefficients, block by block.

A candidate is merged to a temporary folder by the same stream as any merge, and measured like any model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.core.method import Allocator, Merger, method
from trimtab.core.recipe import Recipe, Rule, block_lists
from trimtab.core.table import Row
from trimtab.merging import Merge, merge, renamed, with_whole_models

FACTORS = (0.0, 0.5, 1.0, 1.5, 2.0)
PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
ITEMS = {"search": 24, "test": 64}
Progress = Callable[[str, int, int], None]


def score(model: str, data: str, split: str = "test", items: int | None = None) -> dict[str, Any]:
    """A model's metric and its mean negative log-likelihood on a split of the user's data."""
    from trimtab.engine.measure import measure
    from trimtab.engine.stream import Stream, traced
    from trimtab.models.source import open_source
    from trimtab.tasks.build import task_for

    source = open_source(model)
    task = task_for(source, data)
    batch = task.batch(split, (items or ITEMS[split]) * task.multiple)
    stream = Stream(source, traced(source, batch), task.options, resident=True)
    found = measure(stream, batch, task, task.chunk)
    value = task.overall(found, batch.amounts)
    return {"metric": task.metric, "value": value, "loss": float(found.nll.sum() / found.count.sum())}


def evaluate(models: Sequence[str], data: Sequence[str], progress: Progress) -> list[dict[str, Any]]:
    """A row for each model and task file, measured on held-out items: `model`, `data`, `metric`, `value`, `loss`."""
    rows: list[dict[str, Any]] = []
    for model in models:
        for file in data:
            progress("measuring", len(rows), len(models) * len(data))
            rows.append({"model": model, "data": file, **score(model, file)})
    progress("measuring", len(rows), len(rows))
    return rows


def search(recipe: Recipe, data: Sequence[str], progress: Progress) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with coefficients chosen on the search items of some task files.

    Where a merge is a plain mean, models are taken in greedily (a soup). Otherwise one coefficient for all is tried at
    a few values; then that of each block alone at the others; and the allocator takes for each block the value that
    hurts least. The blocks' own coefficients are kept if they are better together, too.

    Returns:
        The recipe, and what was found: mean losses `before`, `uniform` and `chosen`, and the coefficients.

    Raises:
        UserError: the method has no coefficient, or the recipe has several slices.
    """
    if len(recipe.slices) > 1:
        raise UserError(
            "a search chooses coefficients of whole models, and the recipe stacks slices; leave --search out"
        )
    with tempfile.TemporaryDirectory() as folder:

        def loss(tried: Recipe) -> float:
            out = Path(folder) / "candidate"
            merge(tried, out=out, overwrite=True)
            return sum(score(str(out), file, "search")["loss"] for file in data) / len(data)

        whole, names = with_whole_models(recipe, Path(folder) / "adapted")
        if recipe.method in ("linear", "model-soups"):
            chosen, found = _soup(whole, data, loss, progress)
            found["members"] = [names.get(name, name) for name in found["members"]]
        else:
            chosen, found = _by_block(whole, loss, progress)
        return renamed(chosen, names), found


def _soup(
    recipe: Recipe, data: Sequence[str], loss: Callable[[Recipe], float], progress: Progress
) -> tuple[Recipe, dict[str, Any]]:
    from trimtab.parts.merging import greedy_members

    parents = recipe.slices[0].parents
    alone = [-sum(score(p.model, f, "search")["loss"] for f in data) / len(data) for p in parents]
    done = 0

    def with_members(members: Sequence[int]) -> Recipe:
        kept = tuple(
            dataclasses.replace(p, settings={**p.settings, "weight": float(i in members)})
            for i, p in enumerate(parents)
        )
        return dataclasses.replace(recipe, slices=(dataclasses.replace(recipe.slices[0], parents=kept),))

    def scored(members: tuple[int, ...]) -> float:
        nonlocal done
        done += 1
        progress("searching", done, len(parents) - 1)
        return -loss(with_members(members))

    members = greedy_members(alone, scored)
    chosen = with_members(members)
    before, after = loss(recipe), loss(chosen)
    return chosen, {"before": before, "chosen": after, "members": [parents[i].model for i in members]}


def _by_block(recipe: Recipe, loss: Callable[[Recipe], float], progress: Progress) -> tuple[Recipe, dict[str, Any]]:
    merger = method(recipe.method)
    fields = {f.name for f in dataclasses.fields(merger)}  # type: ignore[arg-type]
    key = next((k for k in ("scale", "t") if k in fields), None)
    if key is None or not isinstance(merger, Merger):
        raise UserError(f"{recipe.method} has no coefficient that a search could choose; leave --search out")
    plain = recipe.settings.get(key, getattr(merger, key))
    if not isinstance(plain, int | float):
        raise UserError(
            f"the recipe gives {key} by tensor already, and a search would choose it; leave one of them out"
        )
    offered = PLACES if key == "t" else tuple(plain * factor for factor in FACTORS)
    with tempfile.TemporaryDirectory() as folder:
        lead = Merge(recipe, Path(folder) / "unused").models[recipe.slices[0].parents[0].model]
        path, count = next(iter(block_lists(lead.checkpoint.names()).items()), ("", 0))

    def with_values(rest: float, blocks: Sequence[float]) -> Recipe:
        rules = (Rule(tuple(blocks), f"{path}."), Rule(rest)) if blocks else (Rule(rest),)
        return dataclasses.replace(recipe, settings={**recipe.settings, key: rules})

    total = len(offered) + (count + 1) * (len(offered) - 1) + 1
    done = 0

    def measured(rest: float, blocks: Sequence[float]) -> float:
        nonlocal done
        done += 1
        progress("searching", done, total)
        return loss(with_values(rest, blocks))

    uniform = {value: measured(value, [value] * count) for value in offered}
    best = min(uniform, key=lambda v: uniform[v])
    rows = []
    for unit in range(-1, count):  # -1: what belongs to no block
        for value in offered:
            blocks = [value if i == unit else best for i in range(count)]
            hurt = uniform[best] if value == best else measured(value if unit < 0 else best, blocks)
            rows.append(Row(str(unit), repr(value), 1, 0.0, hurt, 1))
    allocator = method("milp")
    assert isinstance(allocator, Allocator)
    choice = allocator.allocate(rows, {"bytes": count + 1.0})
    values = {int(unit): float(row.choice) for unit, row in choice.items()}
    blocks = [values[i] for i in range(count)]
    together = measured(values[-1], blocks)
    found = {"before": loss(recipe), "uniform": uniform[best], "by_block": together, "field": key}
    if together < uniform[best]:
        return with_values(values[-1], blocks), {**found, "chosen": together, "blocks": blocks, "rest": values[-1]}
    return with_values(best, []), {**found, "chosen": uniform[best], "blocks": [best] * count, "rest": best}
