"""SLTrain: near full rank and below low rank alone, for fewer bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Rank
from trimtab.core.plan import parse_method
from trimtab.pretraining import SETTING

CLAIM = Claim(
    method="sltrain",
    statement="A few single entries bring low-rank pretraining near full rank, for fewer bytes of weights and state.",
    source="Han et al. 2024, arXiv:2406.02214, abstract, table 2 and figure 3",
    figure="perplexity within 1 % of full rank for 60M to 1B; up to 73 % less memory for 7B, with 8-bit state",
    setting=f"{SETTING}, 200 steps of AdamW. Linears of the blocks at rank 8 with 3 % of the entries, beside rank 10 "
    "without, which takes no fewer bytes, and the whole matrices.",
    metric="nats a byte of held-out text (loss); bytes of weights, places and the optimiser's state (bytes)",
    checks=(
        Check("the loss is below that of low rank alone", "loss_sltrain", "<", "loss_low_rank"),
        Check("the loss is at most 0.1 nats above full rank's", "behind_full", "<", 0.1),
        Check("weights and state take less than seven tenths of full rank's bytes", "share_of_bytes", "<", 0.7),
    ),
)


def formed(method: str, rank: int, seed: int, model: nn.Module) -> None:
    """Put the form in place of every linear of the blocks."""
    form: Any = parse_method(method)
    places = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    for i, path in enumerate(places):
        rng = torch.Generator().manual_seed(seed * 1009 + i)
        model.set_submodule(path, form.wrap(model.get_submodule(path), Rank(rank), rng=rng))


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    bench = lab.pretraining(seed, steps=200)
    rates = (2e-3, 4e-3)
    full = bench.run("adamw", rates)
    ours = bench.run("adamw", rates, change=partial(formed, "sltrain(density=0.03)", 8, seed))
    low = bench.run("adamw", rates, change=partial(formed, "sltrain(density=0.0)", 10, seed))
    return {
        **{"loss_full": full.loss, "loss_sltrain": ours.loss, "loss_low_rank": low.loss},
        **{"bytes_full": float(full.weights + full.state), "bytes_sltrain": float(ours.weights + ours.state)},
        "bytes_low_rank": float(low.weights + low.state),
        "behind_full": ours.loss - full.loss,
        "share_of_bytes": (ours.weights + ours.state) / (full.weights + full.state),
    }
