"""MoS: an eighth of LoRA's trained numbers, against LoRA and against sharing without differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Card, Wrapper
from trimtab.models.adapter import frames
from trimtab.parts.frozen import Frame
from trimtab.parts.lowrank_delta import delta_linear, gaussian
from trimtab.parts.shared import Shared

SETTING = (
    "The shipped language model of Python code, adapted in 24 steps of 4 windows of 64 tokens to the prose of Python's "
    "reference; AdamW, the better of two rates by windows that the training leaves out"
)

CLAIM = Claim(
    method="mos",
    statement="Shards chosen from shared pools learn as much as LoRA with eight times the numbers, and more than pools "
    "that all matrices use alike.",
    source="Wang et al. 2025, arXiv:2410.00938, abstract, tables 1 and 2",
    figure="about 8 times fewer parameters than LoRA at its quality",
    setting=f"{SETTING}; all linears of the blocks, MoS of as many numbers as LoRA of rank 1, LoRA of ranks 8 and 1, "
    "and one pair of factors for all matrices of a shape, of as many numbers.",
    metric="nats a token on held-out windows of the new domain; behind: less LoRA's of rank 8; share: of its trained "
    "numbers; merging: largest difference of a merged matrix's outputs, as a share of the largest output",
    checks=(
        Check("the loss is within 0.05 nats of LoRA's with eight times the numbers", "behind", "<", 0.05),
        Check("an eighth of LoRA's numbers is trained", "share", "<=", 1 / 8),
        Check("the loss is below that of LoRA with as many numbers", "mos", "<", "narrow"),
        Check("the loss is below that of pure sharing", "mos", "<", "pure"),
        Check("merged is unmerged", "merging", "<", 1e-4),
    ),
)


@dataclass(frozen=True)
class Pure(Wrapper):
    """One pair of factors for all matrices of a shape, of rank e times their number."""

    card = Card("pure", levels=("r1",))

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator, shared: Shared) -> nn.Module:
        rank, (rows, cols) = level.rank * shared.alike, shared.shape
        if shared.shape not in shared.held:
            pair = nn.Parameter(gaussian(rank, cols, rng)), nn.Parameter(torch.zeros(rows, rank))
            shared.held[shared.shape] = pair
        return _Pair(module, *shared.held[shared.shape], 16.0 / rank)


class _Pair(Frame):
    def __init__(self, module: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float) -> None:
        super().__init__(module)
        self.a, self.b, self.scale = a, b, scale

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.frozen, self.a, self.b, None, self.scale)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one order of the data."""
    shift = lab.shift(seed)
    ours, lora = shift.run("mos", "r1"), shift.run("lora", "r8")
    narrow, pure = shift.run("lora", "r1"), shift.run(Pure(), "r1")
    merging = 0.0
    with torch.no_grad():
        for frame in frames(ours.model).values():
            x = torch.randn(4, frame.in_features, generator=torch.Generator().manual_seed(seed))
            there, here = frame.merged()(x), frame(x)
            merging = max(merging, float((there - here).abs().max() / here.abs().max()))
    return {
        **{"mos": ours.loss, "lora": lora.loss, "behind": ours.loss - lora.loss, "narrow": narrow.loss},
        **{"pure": pure.loss, "share": ours.trained / lora.trained, "merging": merging},
    }
