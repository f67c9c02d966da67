"""NetAdapt: shrinking where it hurts least beats shrinking everywhere alike."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from trimtab.core.claim import Check, Claim
from trimtab.core.knob import Domain, Knob
from trimtab.core.method import Hunt, Trial
from trimtab.nas.netadapt import NetAdapt
from trimtab.parts.protocol import beside, improvement
from trimtab.tasks.digits import digits

FULL, SHARES, LIMIT = (16, 24, 32), (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0), 0.35
DOMAIN = Domain(tuple(Knob(f"layer {i}", tuple(round(w * s) for s in SHARES), "width") for i, w in enumerate(FULL)))
LONG, SHORT, RANDOMS = 150, 12, 8

CLAIM = Claim(
    method="netadapt",
    statement="Shrinking one layer at a time, where the error grows least for the cost that is saved, meets a budget "
    "with less error than narrowing all layers alike.",
    source="Howard et al. 2019, arXiv:1905.02244, section 5.2",
    figure="accuracy change per latency saved in place of accuracy alone; no separate figure",
    setting="Three convolutions of 16, 24 and 32 channels, trained on 300 digits, shrunk to 35 % of the products; "
    "channels of the least weights go, a proposal is trained for 12 steps, the result for 150. Uniform: the widest "
    "network with one share of channels everywhere within the limit, its channels chosen and trained likewise.",
    metric="error on unseen images, in percent; multiplications as a share of the largest; improvement on the mean of "
    "eight random networks between two thirds of the limit and the limit, in percent of its accuracy; drawing: the "
    "best of these by the search images",
    checks=(
        Check("less error than uniform narrowing", "netadapt", "<", "uniform"),
        Check("within the limit", "cost", "<=", LIMIT),
        *beside(),
    ),
    seeds=tuple(range(6)),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one seed."""
    torch.manual_seed(seed)
    start = trained(net(FULL), LONG, seed)
    nets = {DOMAIN.largest(): start}
    price = lambda genomes: {"macs": np.array([cost(widths(genome)) for genome in genomes])}  # noqa: E731
    trials: tuple[Trial, ...] = ()
    searcher = NetAdapt(saving=0.06)
    while new := searcher.ask(Hunt(DOMAIN, trials, ("error",), {"macs": LIMIT}), 99, rng=Random(0), price=price):
        for genome in new:
            if genome != DOMAIN.largest():
                parent = min(
                    nets,
                    key=lambda g: (sum(a != b for a, b in zip(g, genome, strict=True)), -sum(g) * all_le(genome, g)),
                )
                nets[genome] = trained(narrowed(nets[parent], widths(genome)), SHORT, seed)
            trials += (Trial(genome, {"error": wrong(nets[genome], "search"), "macs": cost(widths(genome))}),)
    met = [trial for trial in trials if trial.values["macs"] <= LIMIT]
    best = min(met, key=lambda trial: trial.values["error"])
    alike = max(share for share in np.linspace(0.1, 1, 91) if cost([round(w * share) for w in FULL]) <= LIMIT)
    uniform = trained(narrowed(start, [round(w * alike) for w in FULL]), LONG, seed)
    chosen = trained(narrowed(start, widths(best.genome)), LONG, seed)
    drawn, draws = [], Random(seed)
    while len(drawn) < RANDOMS:
        genome = DOMAIN.random(draws)
        if LIMIT * 2 / 3 <= cost(widths(genome)) <= LIMIT:
            other = trained(narrowed(start, widths(genome)), LONG, seed)
            drawn.append((wrong(other, "search"), wrong(other, "test")))
    found = {"netadapt": wrong(chosen, "test"), "uniform": wrong(uniform, "test"), "cost": best.values["macs"]}
    for name, error in (("", found["netadapt"]), ("random_", min(drawn)[1])):
        found[f"{name}improvement"] = improvement(100 - error, [100 - unseen for _, unseen in drawn])
    return found


def widths(genome: tuple[int, ...]) -> list[int]:
    """Channels of each layer."""
    return [knob.options[place] for knob, place in zip(DOMAIN.knobs, genome, strict=True)]


def all_le(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether no knob of one is above that of the other."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def net(channels: Any) -> nn.Sequential:
    """Three convolutions, the second behind a pooling, and a linear layer."""
    a, b, c = channels
    first = [nn.Conv2d(1, a, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *first, nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * c, 10)
    )


def cost(channels: Any) -> float:
    """Multiplications as a share of the largest network's."""

    def count(a: int, b: int, c: int) -> int:
        return 64 * 9 * a + 16 * 9 * a * b + 16 * 9 * b * c + 40 * c

    return count(*channels) / count(*FULL)


def narrowed(model: nn.Sequential, channels: Any) -> nn.Sequential:
    """The network with fewer channels: those of the largest weights stay."""
    small = net(channels)
    convs = [[part for part in m if isinstance(part, nn.Conv2d | nn.Linear)] for m in (model, small)]
    kept = torch.arange(1)
    with torch.no_grad():
        for i, (old, new) in enumerate(zip(*convs, strict=True)):
            weight = old.weight
            if isinstance(old, nn.Linear):
                new.weight.copy_(weight.reshape(10, -1, 4)[:, kept].flatten(1))
                new.bias.copy_(old.bias)
                break
            rows = weight.abs().sum((1, 2, 3)).topk(channels[i]).indices.sort().values
            new.weight.copy_(weight[rows][:, kept])
            new.bias.copy_(old.bias[rows])
            kept = rows
    return small


def trained(model: nn.Sequential, steps: int, seed: int) -> nn.Sequential:
    """The network after some steps on 300 digits."""
    images, labels = (part[:300] for part in digits("train"))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        items = torch.randint(300, (32,), generator=rng)
        optimiser.zero_grad()
        functional.cross_entropy(model(images[items]), labels[items]).backward()
        optimiser.step()
    return model


@torch.no_grad()
def wrong(model: nn.Sequential, split: str) -> float:
    """Errors on a split, in percent."""
    images, labels = digits(split)
    return 100 - 100 * float((model(images).argmax(1) == labels).double().mean())
