"""Augmented Hessian: an order of layers that knows of pairs, and a bisection that needs few measurements."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.alloc.augmented_hessian import AugmentedHessian
from trimtab.core.claim import Check, Claim
from trimtab.core.level import Int
from trimtab.core.table import Row
from trimtab.quant.rtn import RTN
from trimtab.tasks.digits import digits

LOW, HIGH = 2, 8

CLAIM = Claim(
    method="augmented-hessian",
    statement="At equal mean bits, ordering layers by Hessian trace and pairwise dependence keeps at least the "
    "accuracy of Hessian-only and random orders, and bisection meets a bound on quality in O(log layers) measurements.",
    source="Schaefer et al. 2023, arXiv:2306.04879, abstract",
    figure="latency -25.48, -21.69, -33.28 % (ResNet50, MobileNetV2, BERT) at 99.99 % of the baseline's accuracy",
    setting="A plain network of nine convolutions and one linear, trained here on 1,197 of scikit-learn's digits; "
    f"round-to-nearest with one scale a row, {LOW} or {HIGH} bits; every number of low layers from 1 to 9; "
    "sensitivities from 256 training images, the bound on 300 search images, judged on 300 others. Traces by "
    "Hutchinson's estimate, 16 draws.",
    metric="loss: mean over the numbers of low layers of cross-entropy in nats; accuracy: likewise, share of images",
    checks=(
        Check("loss not above the Hessian-only order", "loss_augmented", "<=", "loss_hessian"),
        Check("loss not above random orders", "loss_augmented", "<=", "loss_random"),
        Check("accuracy not below the Hessian-only order", "accuracy_augmented", ">=", "accuracy_hessian"),
        Check("accuracy not below random orders", "accuracy_augmented", ">=", "accuracy_random"),
        Check("bisection keeps the bound on damage", "damage", "<=", "bound"),
        Check("at most 1 + ceil(log2(n + 1)) measurements", "measurements", "<=", "allowed"),
        Check("more low layers than a random order within the same bound", "low_layers", ">", "low_layers_random"),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one trained network."""
    model, layers = train(seed)
    names = list(layers)
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    packed = {
        name: {bits: RTN().solve(weight.flatten(1), Int(bits, None)) for bits in (LOW, HIGH)}
        for name, weight in dense.items()
    }
    rounded = {name: {b: p.dense().view_as(dense[name]) for b, p in by.items()} for name, by in packed.items()}

    def logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(weights[name])
            return model(images)

    def plan(low: set[str]) -> dict[str, Tensor]:
        return {name: rounded[name][LOW if name in low else HIGH] for name in names}

    def loss(weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> float:
        return float(nn.functional.cross_entropy(logits(weights, images), labels))

    images, labels = (x[:256] for x in digits("train"))
    base = loss(dense, images, labels)
    rng = torch.Generator().manual_seed(seed)
    traces = {
        name: value * float((rounded[name][LOW] - dense[name]).square().mean()) / 2
        for name, value in zip(names, hutchinson(model, list(layers.values()), images, labels, rng), strict=True)
    }
    alone = {name: loss({**dense, name: rounded[name][LOW]}, images, labels) - base for name in names}
    pairs = {
        (a, b): loss({**dense, a: rounded[a][LOW], b: rounded[b][LOW]}, images, labels) - base - alone[a] - alone[b]
        for a, b in combinations(names, 2)
    }

    rows = [
        Row(name, f"{bits}b", packed[name][bits].nbytes, 0.0, alone[name] if bits == LOW else 0.0, dense[name].numel())
        for name in names
        for bits in (HIGH, LOW)
    ]
    method = AugmentedHessian(levels=(f"{HIGH}b", f"{LOW}b"))
    augmented = {a: traces[a] + sum(v for pair, v in pairs.items() if a in pair) * method.coupling for a in names}
    orders = {
        "augmented": [sorted(names, key=augmented.__getitem__)],
        "hessian": [sorted(names, key=traces.__getitem__)],
    }
    orders["random"] = [[names[i] for i in torch.randperm(len(names), generator=rng).tolist()] for _ in range(8)]
    test, answers = digits("test")
    found = {}
    for kind, several in orders.items():
        after = [logits(plan(set(order[:k])), test) for order in several for k in range(1, len(names))]
        found[f"loss_{kind}"] = sum(float(nn.functional.cross_entropy(x, answers)) for x in after) / len(after)
        found[f"accuracy_{kind}"] = sum(float((x.argmax(1) == answers).float().mean()) for x in after) / len(after)

    look, truth = digits("search")
    floor = loss(dense, look, truth)
    calls = 0

    def damage(choice: dict[str, Row], samples: int | None = None) -> float:
        nonlocal calls
        calls += 1
        return loss(plan({name for name, row in choice.items() if row.choice == f"{LOW}b"}), look, truth) - floor

    bound = 0.1
    chosen = method.allocate(rows, {"damage": bound}, trace=traces, pairs=pairs, measure=damage)
    found |= {
        "measurements": calls,
        "allowed": 1 + ceil(log2(len(names) + 1)),
        "damage": damage(chosen),
        "bound": bound,
    }
    found["low_layers"] = sum(row.choice == f"{LOW}b" for row in chosen.values())
    counts = []
    for order in orders["random"]:
        ranks = {name: float(at) for at, name in enumerate(order)}
        other = method.allocate(rows, {"damage": bound}, trace=ranks, measure=damage)
        counts.append(sum(row.choice == f"{LOW}b" for row in other.values()))
    return {**found, "low_layers_random": sum(counts) / len(counts)}


def hutchinson(
    model: nn.Module, layers: list[nn.Module], images: Tensor, labels: Tensor, rng: torch.Generator, draws: int = 16
) -> list[float]:
    """Traces of the loss's Hessian by layer: the mean of v' H v over random signs v."""
    weights = [layer.weight for layer in layers]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), weights, create_graph=True)
    sums = [0.0] * len(layers)
    for _ in range(draws):
        for at, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            signs = torch.randint(2, weight.shape, generator=rng) * 2.0 - 1
            (product,) = torch.autograd.grad((gradient * signs).sum(), weight, retain_graph=True)
            sums[at] += float((product * signs).sum())
    return [value / draws for value in sums]


def train(seed: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The network of that seed, trained, and its layers by name."""
    rng = torch.Generator().manual_seed(seed)
    images, labels = digits("train")
    parts: list[nn.Module] = []
    widths = (1, 12, 12, 12, 24, 24, 24, 32, 32, 32)
    for at, (wide, out) in enumerate(pairwise(widths)):
        parts += [nn.Conv2d(wide, out, 3, padding=1, stride=2 if at in (3, 6) else 1), nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    layers = {name: part for name, part in model.named_children() if isinstance(part, nn.Conv2d | nn.Linear)}
    with torch.no_grad():
        for layer in layers.values():
            fan = layer.weight[0].numel()
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=rng) * (2 / fan) ** 0.5)
            layer.bias.zero_()
    steps = 25 * (len(images) // 64)
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(images), (64,), generator=rng)
        adam.zero_grad()
        nn.functional.cross_entropy(model(images[pick]), labels[pick]).backward()
        adam.step()
        schedule.step()
    return model.eval(), layers
