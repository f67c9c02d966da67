"""Twin-Merging: shared model and routed residuals above static merging, and near the tuned models."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.merge.task_arithmetic import TaskArithmetic
from trimtab.merge.ties import TIES
from trimtab.merge.twin_merging import TwinMerging
from trimtab.tasks import domains as d

SCALES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
WIDE = (0.8, 1.0, 1.3, 1.6, 2.0)
KEEP = 0.25

CLAIM = Claim(
    method="twin-merging",
    statement="With a router that weighs compressed residuals by input, one shared model is above static task "
    "arithmetic and TIES on mixed data, and recovers most of the tuned models' accuracy.",
    source="Lu et al. 2024, arXiv:2406.15479, tables 1 and 2",
    figure="28.34 % more normalised score on average over discriminative tasks",
    setting="The shipped image transformer tuned to five ways to show digits, mixed test data. Residuals keep a "
    "quarter of their singular values (the model's matrices are 64 wide). The router, a linear layer on pixels and "
    "their squares, learns from training images which way it is; each image gets the residual of the likeliest.",
    metric="mean accuracy; recovered: share of the tuned models'; router: its accuracy; stored: bytes of shared model "
    "and residuals as a share of all tuned models'",
    checks=(
        Check("above task arithmetic at its best scale", "twin", ">", "task_arithmetic"),
        Check("above TIES at its best settings", "twin", ">", "ties"),
        Check("nine tenths of the tuned models' accuracy", "recovered", ">=", 0.9),
        Check("stored in fewer bytes than all models", "stored", "<", 1.0),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one tuning of the five models."""
    names = list(d.DOMAINS)
    parents, base = [d.tuned((name,), seed) for name in names], d.base_state()
    lab.hashes |= {"pocket-vit": d.base_hash()}
    method = TwinMerging(keep=KEEP)
    experts = [
        d.merged_state(method, parents, base, [float(i == own) for i in range(len(names))]) for own in range(len(names))
    ]
    route = _router({name: d.data(name, "train")[0] for name in names})
    hits = found = 0.0
    for own, name in enumerate(names):
        images, labels = d.data(name, "test")
        to = route(images)
        found += float((to == own).float().mean()) / len(names)
        for expert, state in enumerate(experts):
            if (mine := to == expert).any():
                right = d.logits(state, images[mine]).argmax(1) == labels[mine]
                hits += float(right.sum()) / len(labels) / len(names)
    tuned = sum(d.accuracy(p, n, "test") for p, n in zip(parents, names, strict=True)) / len(parents)
    return {
        "twin": hits,
        "tuned": tuned,
        "recovered": hits / tuned,
        "router": found,
        "stored": d.stored_share(method, parents, base),
        "task_arithmetic": d.mean_accuracy(d.best([TaskArithmetic(scale=s) for s in SCALES], parents, base)[1], "test"),
        "ties": d.mean_accuracy(
            d.best([TIES(scale=s, density=k) for s in WIDE for k in (0.2, 0.5, 0.8)], parents, base)[1], "test"
        ),
    }


def _router(images: dict[str, Any]) -> Any:
    """A softmax regression that says which way an image is shown."""
    import torch

    def features(x: Any) -> Any:
        flat = x.flatten(1)
        return torch.cat([flat, flat.square(), torch.ones(len(flat), 1)], 1)

    x = torch.cat([features(v) for v in images.values()])
    y = torch.cat([torch.full((len(v),), i) for i, v in enumerate(images.values())])
    weight = torch.zeros(x.shape[1], len(images), requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight, y) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return lambda new: (features(new) @ weight.detach()).argmax(1)
