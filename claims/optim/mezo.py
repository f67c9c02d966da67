"""MeZO and its family at equal numbers of forward passes: the table of ZO-Bench."""

from __future__ import annotations

from typing import Any

from trimtab.core.claim import Check, Claim
from trimtab.pretraining import MOVED, loss_of

PASSES = 240
TABLE: dict[str, tuple[str, str, int, tuple[float, ...]]] = {
    "sgd": ("sgd", "mezo", 2, (3e-4, 1e-3)),
    "momentum": ("sgd(momentum=0.9)", "mezo", 2, (1e-4,)),
    "sign": ("sgd(sign=True)", "mezo", 2, (1e-4,)),
    "adam": ("adamw", "mezo", 2, (5e-4,)),
    "conservative": ("sgd", "zo-conservative", 5, (1e-3,)),
    "forward": ("sgd", "forward-gradient", 2, (1e-3,)),
    "blockwise": ("sgd", "mezo(blockwise=True)", 6, (1e-3, 3e-3)),
    "hybrid": ("sgd", "zo-hybrid(gain=300)", 4, (3e-4, 1e-3)),
}

CLAIM = Claim(
    method="mezo",
    statement="Forward passes alone fine-tune; block-wise and hybrid estimates do better for as many of them.",
    source="Zhang et al. 2024, arXiv:2402.11592, sections 4 and 5; Malladi et al. 2023, arXiv:2305.17333",
    figure="a benchmark of five models, three tasks and five schemes, without one figure",
    setting=f"{MOVED}. {PASSES} forward passes each: two a step for plain estimates, six block by block, five for a "
    "conservative step, four for a hybrid one (a backward pass through the last block counts as two) and for a tangent "
    "two; backward: AdamW, a third of as many steps.",
    metric="nats a byte of held-out text (loss); bytes kept for the backward pass (saved)",
    checks=(
        Check("ZO-SGD learns: the loss falls", "loss_sgd", "<", "loss_before"),
        Check("block by block the loss is below ZO-SGD's", "loss_blockwise", "<", "loss_sgd"),
        Check("the hybrid's loss is below ZO-SGD's", "loss_hybrid", "<", "loss_sgd"),
        Check("nothing is kept for a backward pass", "saved_sgd", "<=", 0.0),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    bench = lab.pretraining(seed).moved(100)
    found = {"loss_before": loss_of(bench.fresh(), bench.judging), "loss_backward": bench.run("adamw", (1e-3,)).loss}
    for name, (optimizer, gradient, passes, rates) in TABLE.items():
        bench.steps = PASSES // passes
        result = bench.run(optimizer, rates, gradient=gradient)
        found |= {f"loss_{name}": result.loss, f"saved_{name}": float(result.saved)}
    return found
