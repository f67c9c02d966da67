"""Layer-wise quantisation: the layers that change their input most keep the higher bits."""

from __future__ import annotations

from itertools import pairwise
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from trimtab.alloc.layerwisequant import LayerwiseQuant
from trimtab.core.claim import Check, Claim
from trimtab.core.level import Int
from trimtab.core.table import Row
from trimtab.parts.scores import outlier_score
from trimtab.quant.rtn import RTN

LEVELS = {"4b": Int(4, 64), "3b": Int(3, 64), "2b": Int(2, 64)}
WINDOWS = 8

CLAIM = Claim(
    method="layerwisequant",
    statement="Ordered by input-output dissimilarity or by few outliers, layers can go to low bits at lower perplexity "
    "than in random or reversed order; quantising layers beats pruning them except at 2 bits.",
    source="Dumitru et al. 2024, arXiv:2406.17415, abstract",
    figure="near the original until 25-50 % of layers are low, against 5-10 % without an order",
    setting="The shipped language model (6 blocks); a layer is a block; round-to-nearest in groups of 64, low is 2 "
    "bits and the rest 4; 1 to 5 low blocks; similarities from 8 calibration windows of 256 tokens, judged on 8 test "
    "windows. A pruned block adds nothing to the residual stream.",
    metric="perplexity a token, geometric mean over 1 to 5 low blocks",
    checks=(
        Check("cosine order below random", "cosine", "<", "random"),
        Check("cosine order below its reverse", "cosine", "<", "cosine_reversed"),
        Check("outlier order below random", "outliers", "<", "random"),
        Check("outlier order below its reverse", "outliers", "<", "outliers_reversed"),
        Check("quantising blocks to 3 bits beats pruning them", "cosine_3b", "<", "cosine_pruned"),
        Check("pruning blocks beats quantising them to 2 bits", "cosine_pruned", "<", "cosine"),
    ),
    seeds=(0, 1, 2),
)


@torch.no_grad()
def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of calibration and test windows."""
    bench = lab.bench("pocket-lm", seed)
    model, task = bench.source.materialise(), bench.task
    test = task.batch("test", WINDOWS, seed)
    layers = {path: part for path, part in model.named_modules() if ".layers." in path and hasattr(part, "weight")}
    layers = {path: layer for path, layer in layers.items() if layer.weight.dim() == 2}
    dense = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    units = sorted({block(path) for path in layers})

    stored = {name: {p: RTN().solve(w, level) for p, w in dense.items()} for name, level in LEVELS.items()}
    weights = {name: {p: packed.dense() for p, packed in by.items()} for name, by in stored.items()}
    weights["pruned"] = {
        p: torch.zeros_like(w) if p.endswith(("o_proj", "down_proj")) else w for p, w in weights["4b"].items()
    }

    def perplexity(choice: dict[str, str]) -> float:
        for path, layer in layers.items():
            layer.weight.copy_(weights[choice[block(path)]][path])
        scores = task.score(model(**test.inputs, use_cache=False), test.labels, None)
        return float(scores.nll.sum() / scores.count.sum())

    similar = similarities(model, task.batch("calibration", WINDOWS, seed).inputs)
    cosine = dict(zip(units, similar, strict=True))
    outliers = {u: outlier_score(torch.cat([w.flatten() for p, w in dense.items() if block(p) == u])) for u in units}
    rng = torch.Generator().manual_seed(seed)
    draws = [dict(zip(units, torch.rand(len(units), generator=rng).tolist(), strict=True)) for _ in range(3)]

    def sweep(scores: dict[str, float], low: str) -> float:
        """Mean log-perplexity over the numbers of low blocks, as the allocator places them."""
        rows = [Row(u, c, size, 0.0, 0.0) for u in units for c, size in (("4b", 2), ("low", 1))]
        method, found = LayerwiseQuant(high="4b", low="low"), []
        for count in range(1, len(units)):
            chosen = method.allocate(rows, {"bytes": 2 * len(units) - count}, cosine=scores)
            found.append(perplexity({u: low if row.choice == "low" else "4b" for u, row in chosen.items()}))
        return sum(found) / len(found)

    reverse = {name: {u: -s for u, s in scores.items()} for name, scores in (("c", cosine), ("o", outliers))}
    numbers = {
        "cosine": sweep(cosine, "2b"),
        "outliers": sweep(outliers, "2b"),
        "cosine_reversed": sweep(reverse["c"], "2b"),
        "outliers_reversed": sweep(reverse["o"], "2b"),
        "random": sum(sweep(draw, "2b") for draw in draws) / len(draws),
        "cosine_3b": sweep(cosine, "3b"),
        "cosine_pruned": sweep(cosine, "pruned"),
    }
    numbers["all_4b"] = perplexity(dict.fromkeys(units, "4b"))
    return {name: exp(min(value, log(1e30))) for name, value in numbers.items()}


def block(path: str) -> str:
    """The block that a weight lies in: its path up to the first number."""
    parts = path.split(".")
    return ".".join(parts[: next(at for at, part in enumerate(parts) if part.isdigit()) + 1])


def similarities(model: Any, inputs: dict[str, Tensor]) -> list[float]:
    """Mean cosine similarity of the residual stream before and after each block.

    The last of the hidden states has passed the final norm, so the last block's output is caught by a hook.
    """
    caught: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    states = (*states[:-1], caught[0])
    return [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairwise(states)]
