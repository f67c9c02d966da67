"""WTA-CRS: less variance than plain sampling, and fine-tuning from a share of the kept inputs."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.parts.row_sampling import chosen, sampled
from trimtab.pretraining import MOVED

CLAIM = Claim(
    method="wta-crs",
    statement="A few rows kept surely and others by chance give unbiased gradients of less variance than chance alone.",
    source="Liu et al. 2023, arXiv:2305.15265, theorems 1 and 2, table 1 and figures 5 to 7",
    figure="up to 2.7 times less peak memory at almost no loss of accuracy",
    setting=f"{MOVED}, 150 steps of AdamW; 30 % of the rows. Variance and bias: 500 draws for the gradient of a matrix "
    "of 64 x 64 by 512 rows of lengths that are spread as exp(z), z standard normal. Kept bytes: of plain autograd.",
    metric="nats a byte of held-out text (loss); squared error of the gradient; bytes kept for the backward pass",
    checks=(
        Check("the mean of 500 draws is off by what chance explains", "bias_to_chance", "<", 1.5),
        Check("the variance is below that of plain sampling", "variance", "<", "variance_plain"),
        Check("the loss is at most 0.05 nats above that of whole gradients", "behind", "<", 0.05),
        Check("the loss is at or below that of plain sampling", "loss_wta", "<=", "loss_plain"),
        Check("fewer bytes are kept for the backward pass", "share_of_kept", "<", 0.8),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 64, generator=rng) * torch.randn(512, 1, generator=rng).exp()
    g = torch.randn(512, 64, generator=rng)
    errors = {}
    for winners in (True, False):
        draws = []
        for _ in range(500):
            places, scale = chosen(x.norm(dim=1), 154, winners, rng)
            draws.append(g[places].T @ (x[places] * scale[:, None]) - g.T @ x)
        errors[winners] = torch.stack(draws)
    bench = lab.pretraining(seed).moved(150)
    exact = bench.run("adamw", (1e-3, 2e-3))
    ours = bench.run("adamw", (1e-3, 2e-3), gradient="wta-crs(share=0.3)")
    plain = bench.run("adamw", (1e-3, 2e-3), gradient="wta-crs(share=0.3, winners=False)")
    kept = bench.kept(lambda model: sampled(model, 0.3, True, torch.Generator().manual_seed(seed)))
    spread = errors[True].var(0)
    return {
        "bias_to_chance": float((errors[True].mean(0).square() / (spread / 500)).mean()),
        **{"variance": float(spread.sum()), "variance_plain": float(errors[False].var(0).sum())},
        **{"loss_wta": ours.loss, "loss_plain": plain.loss, "loss_exact": exact.loss, "behind": ours.loss - exact.loss},
        **{"kept_wta": float(kept), "share_of_kept": kept / bench.kept()},
    }
