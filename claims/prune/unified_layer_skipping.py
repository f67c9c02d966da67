"""Unified Layer Skipping: after the same short tuning, balanced skipping is better than a run at either end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Depth
from trimtab.core.method import Scene
from trimtab.engine.run import seconds_of
from trimtab.prune.unified_layer_skipping import UnifiedLayerSkipping

METHOD = UnifiedLayerSkipping(speedup=1.5)
STEPS, ITEMS, LENGTH, RATE = 24, 4, 128, 3e-4
BATCHES = (1, 4, 16)

CLAIM = Claim(
    method="unified-layer-skipping",
    statement="At equal numbers of skipped blocks and the same short tuning, balanced skipping has lower loss than "
    "skipping a contiguous run at the bottom or the top, and the speed-up comes near its target at every batch size.",
    source="Liu et al. 2024, arXiv:2404.06954, sections 3-4",
    figure="better quality and throughput than dynamic skipping at target speed-ups of 2 to 5 (no single figure)",
    setting="The shipped language model (6 blocks), target speed-up 1.5: four blocks stay. A run at the bottom or top "
    "spares the first or last block, as the method does. 24 AdamW steps on 4 windows of 128 tokens each; 32 test "
    "windows of 256. Speed-up: forward without the head, batches of 1, 4 and 16 windows of 128 tokens.",
    metric="loss: cross-entropy a token, nats; speedup: seconds of all blocks by seconds of those that stay",
    checks=(
        Check("loss below skipping a run at the bottom", "loss_balanced", "<", "loss_bottom"),
        Check("loss below skipping a run at the top", "loss_balanced", "<", "loss_top"),
        Check("the mean speed-up is at least 85 % of the target", "speedup", ">=", 0.85 * METHOD.speedup),
        Check("the speed-ups of the batch sizes lie within 25 % of each other", "spread", "<=", 0.25),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of tuning and test windows."""
    bench = lab.bench("pocket-lm", seed, items=32)
    blocks = bench.modelmap.blocks
    balanced = METHOD.pick(bench.modelmap)
    count = len(balanced)
    picks = {"balanced": balanced, "bottom": blocks[1 : 1 + count], "top": blocks[-1 - count : -1]}
    train = bench.task.batch("calibration", STEPS * ITEMS, seed).inputs["input_ids"]
    test = bench.test.inputs["input_ids"]
    original = bench.stream().whole_model()
    found = {"loss": _loss(original, test), "skipped": float(count)}
    for name, paths in picks.items():
        model = bench.stream().whole_model()
        METHOD.rewrite(Scene(model, bench.modelmap, levels=dict.fromkeys(paths, Depth(0))))
        found[f"untuned_{name}"] = _loss(model, test)
        _tune(model, train)
        found[f"loss_{name}"] = _loss(model, test)
        if name == "balanced":
            ratios = [_seconds(original, test[:n, :LENGTH]) / _seconds(model, test[:n, :LENGTH]) for n in BATCHES]
            found |= {f"speedup_{n}": ratio for n, ratio in zip(BATCHES, ratios, strict=True)}
            found["speedup"] = sum(ratios) / len(ratios)
            found["spread"] = (max(ratios) - min(ratios)) / found["speedup"]
    return found


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor) -> float:
    parts = [
        nn.functional.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        for x in ids.split(8)
    ]
    return float(torch.stack(parts).mean())


def _tune(model: nn.Module, ids: Tensor) -> None:
    parameters = [p.requires_grad_() for p in model.parameters()]
    adam = torch.optim.AdamW(parameters, RATE)
    for step in range(STEPS):
        x = ids[step * ITEMS % len(ids) :][:ITEMS, :LENGTH]
        adam.zero_grad()
        nn.functional.cross_entropy(model(input_ids=x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()


@torch.no_grad()
def _seconds(model: Any, ids: Tensor) -> float:
    return seconds_of(lambda: model.model(input_ids=ids, use_cache=False), repeats=9)
