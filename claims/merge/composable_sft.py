"""Composable SFT: the sparse changes of a task and a domain add up, and clash less than whole ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.merge.composable_sft import ComposableSFT
from trimtab.merge.task_arithmetic import TaskArithmetic
from trimtab.merge.ties import TIES
from trimtab.tasks import domains as d

SOURCE, TARGET, CLASSES, SHARE = "plain", "turned", 3, 0.1
SCALES = (0.3, 0.5, 0.7, 1.0)

CLAIM = Claim(
    method="composable-sft",
    statement="A task that was learnt in one domain works in another when the sparse change of that domain, learnt "
    "without the task, is added; sparse changes add up better than whole ones.",
    source="Ansell et al. 2022, arXiv:2110.07560, tables 2 to 4 and section 7",
    figure="zero-shot cross-lingual transfer above adapters by 2.5 to 3.5 points of F1",
    setting="The shipped image transformer. Task: the digit modulo 3, learnt on digits as they are; domain: digits "
    "that are turned by 40 degrees, learnt as the ten classes with a fixed head. A tenth of the weights outside of the "
    "head is tuned. Tested as the task on turned digits, 300 images; for whole changes also the best scale and TIES, "
    "chosen on 300 search images of that very setting.",
    metric="accuracy of the task in the new domain; cost: points lost in the task's own domain by adding the other's",
    checks=(
        Check("both sparse changes: above the task's alone", "both", ">", "task_only"),
        Check("above the sum of whole changes", "both", ">", "whole"),
        Check("above the sum of whole changes at its best scale", "both", ">", "whole_best"),
        Check("above TIES of whole changes at its best scale", "both", ">", "ties_best"),
        Check("the task's own domain suffers less than by whole changes", "cost", "<", "whole_cost"),
        Check("the sparse task is as good in its domain, to a point", "task_lost", "<", 0.01),
    ),
    seeds=(0, 1, 2, 3, 4),
)

State = dict[str, Tensor]


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of the order of images."""
    lab.hashes |= {"pocket-vit": d.base_hash()}
    base, method = d.base_state(), ComposableSFT()
    body = {name: tensor for name, tensor in base.items() if not name.startswith("classifier")}
    count = int(SHARE * sum(t.numel() for t in body.values()))

    def lottery(domain: str, task: bool) -> tuple[State, State]:
        """Tuned whole, and tuned again where that changed most."""
        whole = tuned(domain, task, seed, None)
        return whole, tuned(domain, task, seed, method.mask(body, whole, count))

    (task_whole, task_sparse), (domain_whole, domain_sparse) = lottery(SOURCE, True), lottery(TARGET, False)

    def summed(merger: Any, task: State, domain: State) -> State:
        parents = [{n: t for n, t in state.items() if n in body} for state in (task, domain)]
        heads = {n: t for n, t in task.items() if n not in body}
        return {**d.merged_state(merger, parents, body), **heads}

    both = summed(method, task_sparse, domain_sparse)
    whole = summed(TaskArithmetic(), task_whole, domain_whole)
    scaled = [summed(TaskArithmetic(scale=s), task_whole, domain_whole) for s in SCALES]
    ties = [summed(TIES(scale=s, density=k), task_whole, domain_whole) for s in (0.7, 1.0, 1.5) for k in (0.1, 0.5)]
    own = accuracy(task_sparse, SOURCE, "test")
    return {
        "both": accuracy(both, TARGET, "test"),
        "task_only": accuracy(task_sparse, TARGET, "test"),
        "whole": accuracy(whole, TARGET, "test"),
        "whole_best": accuracy(max(scaled, key=lambda s: accuracy(s, TARGET, "search")), TARGET, "test"),
        "ties_best": accuracy(max(ties, key=lambda s: accuracy(s, TARGET, "search")), TARGET, "test"),
        "cost": own - accuracy(both, SOURCE, "test"),
        "whole_cost": accuracy(task_whole, SOURCE, "test") - accuracy(whole, SOURCE, "test"),
        "task_lost": accuracy(task_whole, SOURCE, "test") - own,
        "stored": count / sum(t.numel() for t in body.values()),
    }


def tuned(domain: str, task: bool, seed: int, mask: dict[str, Tensor] | None, epochs: int = 8) -> State:
    """The base tuned: the task with its head, a domain with the head as it is; with a mask, these weights alone."""
    model = copy.deepcopy(d.base_model()).train().requires_grad_(True)
    if not task:
        model.classifier.requires_grad_(False)  # type: ignore[union-attr]
    images, labels = d.data(domain, "train")
    labels = labels % CLASSES if task else labels
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(params.values(), lr=5e-4, weight_decay=0.0)
    rng = torch.Generator().manual_seed(1000 + seed)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = 5e-4 * (1 - epoch / epochs)
        for picked in torch.randperm(len(images), generator=rng).split(64):
            logits = model(pixel_values=images[picked]).logits
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits, labels[picked]).backward()
            for name, marked in (mask or {}).items():
                params[name].grad.mul_(marked)  # type: ignore[union-attr]
            optimiser.step()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def accuracy(state: State, domain: str, split: str) -> float:
    """Share of a domain's images whose task is solved."""
    images, labels = d.data(domain, split)
    return float((d.logits(state, images).argmax(1) == labels % CLASSES).float().mean())
