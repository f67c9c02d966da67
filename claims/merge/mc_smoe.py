"""MC-SMoE: merged experts in thin factors and a few rows, against thin factors, rows or fewer experts alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Rank, Width
from trimtab.core.method import Rewriter, Scene
from trimtab.core.modelmap import trace
from trimtab.distill.kd import KD
from trimtab.engine.experts import routing, sensitivity
from trimtab.merge.m_smoe import MSMoE
from trimtab.merge.mc_smoe import MCSMoE
from trimtab.tasks.mixture import loss, trained, windows

STEPS, RATE, MIXED = 150, 1e-3, KD(weight=1 / 6, temperature=2.0)  # a fifth as much of the teacher as of the text
SPLIT, WIDER, THIN, ROWS = (Rank(11), 0.075), (Rank(15), 0.1), (Rank(14), 0.0), 0.37
FEW, MERGED = Width(0.25), Width(0.5)

CLAIM = Claim(
    method="mc-smoe",
    statement="Experts merged to half as many and then split into thin factors and a few rows take a fifth of the "
    "original experts' memory at virtually no loss after distillation; factors and rows together lose less than "
    "either alone, and than merging to fewer experts.",
    source="Li et al. 2023, arXiv:2310.01334, tables 2 and 5",
    figure="up to 80 % less memory with virtually no loss",
    setting="The small mixture of experts of m-smoe's claim, 4 of 8 experts left in each of two blocks, matrices 64 "
    "wide. Each variant, and the original, is then trained for 150 steps towards the original's outputs and the text, "
    "the router frozen: rank 11 and 7.5 % of the rows; rank 14; 37 % of the rows, chosen in the same way; rank 15 and "
    "10 % of the rows beside merging further, to 2 experts of 8.",
    metric="loss on 64 test windows, nats a byte; bytes: share of the numbers of the original's experts",
    checks=(
        Check("a fifth of the experts' numbers", "bytes", "<=", 0.2),
        Check("within 2 % of the original's loss after the same training", "times", "<=", 1.02),
        Check("below thin factors alone, of no fewer numbers", "split", "<", "thin"),
        Check("below rows alone, of no fewer numbers", "split", "<", "rows"),
        Check("at a quarter of the numbers, below merging to fewer experts alone", "wider", "<", "fewer"),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one training."""
    train, test = windows("train", 2000, seed), windows("test", 64, seed)
    original = trained(train, seed)
    batches = [{"input_ids": part} for part in train[:64].split(8)]

    def rewritten(model: nn.Module, method: Rewriter, level: Any) -> nn.Module:
        result = copy.deepcopy(model)
        modelmap = trace(result, batches[0])
        given: dict[str, Any] = {}
        if "sensitivity" in method.needs():
            given["sensitivity"] = sensitivity(result, modelmap, [lambda b=b: _own_loss(result, b) for b in batches])
        else:
            given = dict(routing(result, modelmap, batches))
        levels = {s.path: level for s in modelmap.sites if s.kind == "experts"}
        method.rewrite(Scene(result, modelmap, levels=levels), **given)
        return result

    merged = rewritten(original, MSMoE(), MERGED)
    split = rewritten(merged, MCSMoE(rows=SPLIT[1]), SPLIT[0])
    wider = rewritten(merged, MCSMoE(rows=WIDER[1]), WIDER[0])
    thin = rewritten(merged, MCSMoE(rows=THIN[1]), THIN[0])
    rows, masks = whole_rows(merged, batches)
    fewer = rewritten(original, MSMoE(), FEW)

    def tuned(model: nn.Module, after: Callable[[], None] = lambda: None) -> float:
        distilled(model, original, train, seed, after)
        return loss(model, test)

    def masked() -> None:
        for name, mask in masks.items():
            rows.get_parameter(name).data.mul_(mask)

    count = numbers(original)
    found = {
        "original": loss(original, test),
        "merged": loss(merged, test),
        "untrained": loss(split, test),
        "split": tuned(split),
        "thin": tuned(thin),
        "rows": tuned(rows, masked),
        "fewer": tuned(fewer),
        "wider": tuned(wider),
        "whole": tuned(copy.deepcopy(original)),
        "bytes": numbers(split) / count,
        "bytes_wider": numbers(wider) / count,
        "bytes_thin": numbers(thin) / count,
        "bytes_rows": sum(float(m.expand_as(rows.get_parameter(n)).sum()) for n, m in masks.items()) / count,
        "bytes_fewer": numbers(fewer) / count,
    }
    return {**found, "times": found["split"] / found["whole"]}


def numbers(model: nn.Module) -> int:
    """How many numbers the experts hold."""
    return sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)


def whole_rows(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy whose experts keep the share ROWS of their rows, and masks of these."""
    result = copy.deepcopy(model)
    modelmap = trace(result, batches[0])
    found = sensitivity(result, modelmap, [lambda b=b: _own_loss(result, b) for b in batches])
    scores = [(result.get_parameter(path).abs() * size).mean(2) for path, size in found.items()]
    kept = MCSMoE(rows=ROWS).kept(scores, [size.shape[2] for size in found.values()])
    masks = {}
    for path, score, places in zip(found, scores, kept, strict=True):
        masks[path] = torch.zeros(score.numel()).index_fill(0, places, 1.0).reshape(*score.shape, 1)
        result.get_parameter(path).data.mul_(masks[path])
    return result, masks


def distilled(
    model: Any, teacher: Any, tokens: Tensor, seed: int, after: Callable[[], None], steps: int = STEPS
) -> None:
    """Train a model on the text and towards the teacher's outputs; routers stay as they are."""
    for name, p in model.named_parameters():
        p.requires_grad_("gate.weight" not in name)
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser, rng = torch.optim.AdamW(params, lr=RATE, weight_decay=0.01), torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 10) * (1 - step / steps)
        batch = tokens[torch.randint(0, len(tokens), (16,), generator=rng)]
        logits = model(input_ids=batch).logits
        with torch.no_grad():
            wanted = teacher(input_ids=batch).logits
        value = MIXED.loss(*(x[:, :-1].flatten(0, 1) for x in (logits, wanted)), batch[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        after()
    model.requires_grad_(False)


def _own_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, labels=batch["input_ids"]).loss
