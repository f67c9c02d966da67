"""Heal a fit's result: train the numbers that its weights store anyway towards what the original says.

artifact -> scales, kept values, factors and codewords become trained -> the loop of `engine.train`, with the
original's outputs as targets -> kept where the damage on the search data fell -> the same bytes, other numbers
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from trimtab.engine.apply import Applied
    from trimtab.evidence import Evidence
    from trimtab.models.artifact import Contents
    from trimtab.parts.moving import Moving

ITEMS = 512  # of the calibration split at most, in which labels are not looked at
BATCH, RATE, EVERY = 4, 4e-3, 25
OBJECTIVE = "kd(weight=1.0, temperature=1.0)"


def moving_sites(model: nn.Module, contents: Contents) -> dict[str, Moving]:
    """Put something trained in the place of every module whose packed weight stores numbers that can be; in place.

    What is shared, as a tied head's weight, stays as it is.
    """
    from trimtab.models.artifact import uses
    from trimtab.parts.moving import Moving, movable

    counts = uses(model)
    model.requires_grad_(False)
    found = {}
    for name, read in contents.packed.items():
        path, _, parameter = name.rpartition(".")
        module, packed = model.get_submodule(path), read()
        own = parameter == "weight" and counts[id(module.get_parameter("weight"))] == 1
        if own and movable(packed):
            found[path] = Moving(module, packed, contents.manifest["packed"][name]["transposed"])
    for path, moving in found.items():
        model.set_submodule(path, moving)
    return found


class _Towards:
    """The loss of a student against what a teacher says of the same items, for the training loop."""

    def __init__(self, teacher: nn.Module, task: Any, batch: Any) -> None:
        from trimtab.core.plan import parse_method

        self.teacher, self.task, self.batch = teacher.eval().requires_grad_(False), task, batch
        self.objective: Any = parse_method(OBJECTIVE)

    def __call__(self, model: nn.Module, places: Any) -> tuple[Any, int]:
        import torch

        inputs = {k: v[places] for k, v in self.batch.inputs.items()}
        labels = self.batch.labels[places]
        with torch.no_grad():
            wanted = self._rows(self.teacher, inputs, labels)
        rows = self._rows(model, inputs, labels)
        value = self.objective.loss(rows, wanted, self.task.targets(labels))
        return value * len(rows), len(rows)

    def _rows(self, model: nn.Module, inputs: Any, labels: Any) -> Any:
        named = hasattr(model, "config")
        output = model(**inputs, **self.task.options) if named else model(*inputs.values())
        return self.task.pick(output, labels).float()


def heal(evidence: Evidence, applied: Applied, folder: Path) -> dict[str, Any]:
    """Train the artifact in `folder` for the steps that the request asks for, and put what came out into `applied`.

    It is put there only where the damage on the search data fell.

    Returns:
        `steps`, `sites`, `trained` (numbers), `loss` of the first and the last step, `damage` before and after on the
        search data, `kept`, and `reason` where nothing was done.

    Raises:
        UserError: the loss is no number at a step, or the model is one of embeddings.
    """
    import torch

    from trimtab.engine.train import Recipe, train
    from trimtab.models.artifact import build, open_artifact

    job = evidence.job
    if job.task.name == "embedding":
        raise UserError(
            "healing learns what a model predicts, and one of embeddings predicts nothing; leave --heal out"
        )
    contents = open_artifact(folder)
    model = build(contents, job.source.skeleton)
    moving = moving_sites(model, contents)
    found: dict[str, Any] = {"steps": job.request.heal, "sites": len(moving), "kept": False, "reason": None}
    if not moving:
        return found | {"reason": "no weight of the result stores numbers that can be trained"}
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = job.task.batch("calibration", ITEMS, job.request.seed)
    towards = _Towards(job.source.materialise(), job.task, batch)
    out = job.out / "heal"
    recipe = Recipe(job.request.heal, min(BATCH, len(batch)), rate=RATE, every=EVERY, seed=job.request.seed)
    done = train(
        *(model, towards, len(batch), recipe, torch.optim.AdamW(trained, weight_decay=0.0, fused=True), out),
        resume=job.resume and out.exists(),
        identity={"model": job.source.hash, "sites": list(moving)},
        progress=job.progress,
    )
    before = evidence.scores("result", "search", lambda: applied.stream).damage()
    sites = applied.stream.sites
    old = {path: applied.stream.packed[path] for path in moving}
    for path, site in moving.items():
        _replace(applied, sites[path], site.packed())
    after = evidence.scores("healed", "search", lambda: applied.stream).damage()
    kept = after < before
    if not kept:
        for path, packed in old.items():
            _replace(applied, sites[path], packed)
    ends = [done.log[0]["loss"], done.log[-1]["loss"]]
    return found | {
        **{"trained": sum(p.numel() for p in trained), "loss": ends, "damage": [before, after], "kept": kept},
    }


def _replace(applied: Applied, site: Any, packed: Any) -> None:
    applied.stream.packed.pop(site.path)  # a shelf keeps what lies on disk
    applied.stream.put(site, packed)


def said(found: dict[str, Any], point: dict[str, Any] | None) -> str:
    """In words what healing did, from the paired interval on held-out data."""
    if found["reason"]:
        return f"nothing was healed: {found['reason']}"
    if point is None:
        return "healing did not lower the damage on the search data, and was left out"
    low, high = point["healed"]
    word = "lies on both sides of zero" if low <= 0 <= high else "is apart from zero"
    return f"healed in {found['steps']} steps: {point['metric']} {low:+.3g} to {high:+.3g}, 95 % paired, which {word}"
