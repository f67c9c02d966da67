"""RD layer-adaptive pruning: distortions of single layers add up, and dynamic programming over them picks ratios."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.alloc.rd_prune import RDPrune
from trimtab.core.claim import Check, Claim
from trimtab.core.table import Row
from trimtab.tasks.digits import digits

RATIOS = tuple(step / 50 for step in range(50))
SPARSITIES = (60, 80)  # per cent of all weights
PEERS = ("uniform", "global")

CLAIM = Claim(
    method="rd-prune",
    statement="The distortions of single pruned layers add up to the joint one, and ratios from dynamic programming "
    "over them beat uniform and global-magnitude ratios at equal sparsity.",
    source="Xu et al. 2023, arXiv:2308.10438, abstract",
    figure="up to +1.0 % (ResNet-32), +0.5 % (VGG-16), +0.7 % (DenseNet-121) on CIFAR-10",
    setting="A plain network of six convolutions and one linear, trained here on 1,197 of scikit-learn's 8x8 digits; "
    "magnitude pruning in one shot without retraining, 60 % and 80 % of all weights gone; judged on 300 other images.",
    metric="distortion: mean squared change of the logits; loss: cross-entropy in nats; accuracy: share of images",
    checks=(
        Check("sum of single distortions and joint distortion correlate (log-log)", "correlation", ">=", 0.8),
        *(
            Check(f"{metric} at {gone} % below {peer}", f"{metric}_dp_{gone}", "<", f"{metric}_{peer}_{gone}")
            for gone in SPARSITIES
            for metric in ("distortion", "loss")
            for peer in PEERS
        ),
        *(
            Check(f"accuracy at {gone} % not below {peer}", f"accuracy_dp_{gone}", ">=", f"accuracy_{peer}_{gone}")
            for gone in SPARSITIES
            for peer in PEERS
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one trained network; a row's `bytes` are the weights that it keeps."""
    model, layers = train(seed)
    images, _ = digits("search")
    test, labels = digits("test")
    dense = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    with torch.no_grad():
        before = {"search": model(images), "test": model(test)}

    def outputs(weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(weights.get(name, dense[name]))
            return model(inputs)

    def pruned(name: str, ratio: float) -> Tensor:
        weight = dense[name]
        gone = round(ratio * weight.numel())
        return weight.flatten().scatter(0, weight.abs().flatten().argsort()[:gone], 0.0).view_as(weight)

    def distortion(weights: dict[str, Tensor]) -> float:
        return float((outputs(weights, images) - before["search"]).square().mean())

    rows = []
    for name, weight in dense.items():
        for ratio in RATIOS:
            left = weight.numel() - round(ratio * weight.numel())
            rows.append(Row(name, f"{ratio}", left, 0.0, distortion({name: pruned(name, ratio)}), weight.numel()))
    total = sum(weight.numel() for weight in dense.values())
    sizes = torch.cat([weight.abs().flatten() for weight in dense.values()])
    table = {(row.unit, row.choice): row for row in rows}

    rng = torch.Generator().manual_seed(seed)
    summed, joint = [], []
    for _ in range(40):
        pick = {name: RATIOS[int(torch.randint(1, len(RATIOS), (1,), generator=rng))] for name in dense}
        summed.append(sum(table[name, str(ratio)].damage for name, ratio in pick.items()))
        joint.append(distortion({name: pruned(name, ratio) for name, ratio in pick.items()}))
    found = {"correlation": float(torch.corrcoef(torch.tensor([summed, joint]).log())[0, 1])}

    for gone in SPARSITIES:
        away = round(gone / 100 * total)
        chosen = RDPrune().allocate(rows, {"bytes": total - away})
        threshold = sizes.kthvalue(away).values
        plans = {
            "dp": {name: pruned(name, float(row.choice)) for name, row in chosen.items()},
            "uniform": {name: pruned(name, gone / 100) for name in dense},
            "global": {name: weight * (weight.abs() > threshold) for name, weight in dense.items()},
        }
        for name, weights in plans.items():
            after = outputs(weights, test)
            found[f"distortion_{name}_{gone}"] = float((after - before["test"]).square().mean())
            found[f"loss_{name}_{gone}"] = float(nn.functional.cross_entropy(after, labels))
            found[f"accuracy_{name}_{gone}"] = float((after.argmax(1) == labels).float().mean())
            found[f"kept_{name}_{gone}"] = sum(int((w != 0).sum()) for w in weights.values()) / total
    return found


def train(seed: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The network of that seed, trained, and its layers by name."""
    rng = torch.Generator().manual_seed(seed)
    images, labels = digits("train")
    parts: list[nn.Module] = []
    for at, (wide, out) in enumerate(((1, 16), (16, 16), (16, 32), (32, 32), (32, 48), (48, 48))):
        parts += [nn.Conv2d(wide, out, 3, padding=1, stride=2 if at in (2, 4) else 1), nn.ReLU()]
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
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
