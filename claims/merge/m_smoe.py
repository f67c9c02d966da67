"""M-SMoE: aligned merging by use above plain averaging and above leaving experts out, at equal experts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Width
from trimtab.core.method import Scene
from trimtab.core.modelmap import ModelMap, trace
from trimtab.engine.experts import routing
from trimtab.merge.m_smoe import MSMoE, dominants
from trimtab.tasks.mixture import EXPERTS, loss, trained, windows

HALF = Width(0.5)

CLAIM = Claim(
    method="m-smoe",
    statement="Of a trained mixture of experts half of the experts are left: merged into the most used ones, aligned "
    "and weighted by use, they lose less than averaged, unaligned, replaced by the most used or left out.",
    source="Li et al. 2023, arXiv:2310.01334, tables 2 and 4",
    figure="up to 80 % less memory with virtually no loss, after distillation",
    setting="A language model on bytes of the standard library's sources (two blocks 64 wide, 8 experts, two for each "
    "byte), trained for 300 steps; use and logits from 32 windows of the training text, 64 test windows of 64 bytes. "
    "No training after merging.",
    metric="loss, nats a byte; rank: entropy rank of the experts' matrices over their width",
    checks=(
        Check("below plain averaging of the same groups", "merged", "<", "averaged"),
        Check("below merging by use without alignment", "merged", "<", "unaligned"),
        Check("below the dominant experts alone, in the others' place", "merged", "<", "replaced"),
        Check("below leaving the others out of the router", "merged", "<", "left_out"),
        Check("merged experts have a lower rank", "rank_merged", "<", "rank"),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one training."""
    train, test = windows("train", 2000, seed), windows("test", 64, seed)
    model = trained(train, seed)
    batches = [{"input_ids": train[:32]}]
    modelmap = trace(model, {"input_ids": train[:2]})
    found = routing(model, modelmap, batches)
    usage, likeness = found["usage"], found["likeness"]
    counts = dominants(usage, HALF.keep)
    kept = {path: usage[path].argsort(descending=True, stable=True)[:count] for path, count in counts.items()}
    alone = {path: torch.zeros(EXPERTS).index_copy(0, k, usage[path][k]) for path, k in kept.items()}

    def merged(method: MSMoE, by: dict[str, Tensor]) -> nn.Module:
        result = copy.deepcopy(model)
        levels = {s.path: HALF for s in modelmap.sites if s.kind == "experts"}
        method.rewrite(Scene(result, modelmap, levels=levels), usage=by, likeness=likeness)
        return result

    ours = merged(MSMoE(), usage)
    return {
        "original": loss(model, test),
        "merged": loss(ours, test),
        "averaged": loss(merged(MSMoE(permute=False, weigh=False), usage), test),
        "unaligned": loss(merged(MSMoE(permute=False), usage), test),
        "replaced": loss(merged(MSMoE(), alone), test),
        "left_out": loss(left_out(model, modelmap, kept), test),
        "rank": rank(model),
        "rank_merged": rank(ours),
    }


def left_out(model: nn.Module, modelmap: ModelMap, kept: dict[str, Tensor]) -> nn.Module:
    """The model whose routers choose among these experts alone."""
    result = copy.deepcopy(model)
    for site in modelmap.where("router"):
        stack = next(p for p in kept if p.startswith(site.path.rpartition(".")[0]))
        barred = torch.ones(EXPERTS, dtype=torch.bool).index_fill(0, kept[stack], False)

        def choose(module: Any, args: Any, output: Any, barred: Tensor = barred) -> Any:
            logits = output[0].masked_fill(barred, -torch.inf)
            shares, places = logits.float().softmax(-1).topk(min(2, int((~barred).sum())), -1)
            return logits, shares / shares.sum(-1, keepdim=True), places

        result.get_submodule(site.path).register_forward_hook(choose)
    return result


def rank(model: nn.Module) -> float:
    """Mean over the experts' matrices of the exponential of the entropy of their singular values, over the width."""
    found = []
    for parameter in model.parameters():
        if parameter.dim() == 3:
            values = torch.linalg.svdvals(parameter)
            shares = values / values.sum(1, keepdim=True)
            found.append((-(shares * shares.clamp_min(1e-12).log()).sum(1)).exp() / values.shape[1])
    return float(torch.cat(found).mean())
