"""PLeaS: two models of different origin, above permuting and averaging at equal width, and better the wider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trimtab.core.claim import Check, Claim
from trimtab.engine.joining import Batch, join, settle
from trimtab.merge.pleas import PLeaS
from trimtab.models.pocket.cnn import PocketCNN, PocketCNNConfig
from trimtab.tasks import domains as d

DOMAINS = ("plain", "turned")
WIDTHS = {"wide_25": 0.25, "wide_50": 0.5, "wide_100": 1.0}

CLAIM = Claim(
    method="pleas",
    statement="PLeaS merges two networks trained from different initial weights on different data; at the width of "
    "one it is above permuting and averaging, and it rises with the width up to both side by side.",
    source="Nasery et al. 2024, arXiv:2407.02447, abstract and tables 1 and 2",
    figure="up to 15 points above the state of the art at equal compute, DomainNet and fine-grained tasks, ResNets",
    setting="Two small residual networks with batch norms, one trained on digits as they are and one on digits that "
    "are turned by 40 degrees, each from its own initial weights; moments and batch norms from 300 unlabelled training "
    "images of each; 300 test images, mean over both ways to show them.",
    metric="accuracy; wide_25, wide_50, wide_100: with that share of units kept apart; blend_50: as wide_50, without "
    "least squares; least_squares: without matching; single: the better of the two networks",
    checks=(
        Check("equal width: above permuting and averaging", "pleas", ">", "permuted"),
        Check("equal width: above least squares without matching", "pleas", ">", "least_squares"),
        Check("equal width: above the better of the two networks", "pleas", ">", "single"),
        Check("a quarter wider is better", "wide_25", ">", "pleas"),
        Check("half wider is better still", "wide_50", ">", "wide_25"),
        Check("twice as wide is best", "wide_100", ">", "wide_50"),
        Check("half wider: least squares help", "wide_50", ">", "blend_50"),
    ),
    seeds=(0, 1, 2, 3),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of two networks."""
    models = [trained(domain, 10 * seed + i) for i, domain in enumerate(DOMAINS)]
    images = torch.cat([d.data(domain, "train")[0][:300] for domain in DOMAINS])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches: list[Batch] = [{"pixel_values": part} for part in images[order].split(150)]

    def made(method: PLeaS) -> float:
        joined = join(method, models, batches)
        settle(joined, batches)
        return mean_accuracy([joined])

    return {
        "average": made(PLeaS(permute=False, refit=False)),
        "permuted": made(PLeaS(refit=False)),
        "least_squares": made(PLeaS(permute=False)),
        "pleas": made(PLeaS()),
        "blend_50": made(PLeaS(extra=0.5, refit=False)),
        **{name: made(PLeaS(extra=extra)) for name, extra in WIDTHS.items()},
        "single": max(mean_accuracy([model]) for model in models),
        "ensemble": mean_accuracy(models),
    }


def trained(domain: str, seed: int, epochs: int = 12, rate: float = 3e-3) -> nn.Module:
    """A network trained on one domain from its own initial weights."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = PocketCNN(PocketCNNConfig(widths=(16, 32), inner=((32,), (64,)))).train()
    images, labels = d.data(domain, "train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = rate * (1 - epoch / epochs)
        for picked in torch.randperm(len(images), generator=rng).split(64):
            loss = nn.functional.cross_entropy(model(images[picked]), labels[picked], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return model.eval()


@torch.no_grad()
def mean_accuracy(models: Sequence[nn.Module]) -> float:
    """Of the mean of the models' logits, over both domains' test images."""
    found = 0.0
    for domain in DOMAINS:
        images, labels = d.data(domain, "test")
        logits = torch.stack([model(images) for model in models]).sum(0)
        found += float((logits.argmax(1) == labels).float().mean()) / len(DOMAINS)
    return found
