"""Iterative Feature Merging: above removing channels of small norm, without data; wider networks have more to merge."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from trimtab.core.claim import Check, Claim
from trimtab.core.level import Width
from trimtab.core.method import Rewriter, Scene
from trimtab.core.modelmap import ModelMap, trace
from trimtab.models.pocket.cnn import PocketCNN, PocketCNNConfig
from trimtab.prune.channels import ChannelNorm
from trimtab.prune.iterative_feature_merging import IterativeFeatureMerging, fold_batch_norm
from trimtab.tasks import domains as d

KEPT = {"90": 0.9, "75": 0.75}
ALIKE = 0.4

CLAIM = Claim(
    method="iterative-feature-merging",
    statement="Merging the most similar features keeps more accuracy than removing the channels of smallest norm, at "
    "equal width, without data or training; of a wider network a smaller share of features is distinct.",
    source="Chen et al. 2023, arXiv:2310.06756, sections 5.2 and 5.4",
    setting="Small residual networks trained on digits for 12 epochs, with stages of 8 and 16 channels and inner ones "
    "of 16 and 32, and twice as wide; all convolutions cut to 90 and 75 % of their channels; 300 test images. The "
    "baseline is the best of norms of first and second order, of weights as they are and with batch norms folded in.",
    metric="accuracy; distinct: share of features left at threshold 0.4; lossless: accuracy lost at threshold 0.3",
    checks=(
        Check("90 % of the channels: above removal by norm", "merged_90", ">", "norm_90"),
        Check("75 % of the channels: above removal by norm", "merged_75", ">", "norm_75"),
        Check("wider, 90 %: above removal by norm", "wide_merged_90", ">", "wide_norm_90"),
        Check("wider, 75 %: above removal by norm", "wide_merged_75", ">", "wide_norm_75"),
        Check("of the wider network a smaller share is distinct", "wide_distinct", "<", "distinct"),
        Check("at threshold 0.3 less than a point of accuracy is lost", "wide_lossless", "<", 0.01),
    ),
    seeds=(0, 1, 2, 3, 4),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one training of both networks."""
    return _numbers(seed, 1, "") | _numbers(seed, 2, "wide_")


def _numbers(seed: int, times: int, name: str) -> dict[str, float]:
    config = PocketCNNConfig(widths=(8 * times, 16 * times), inner=((16 * times,), (32 * times,)))
    model = trained(config, seed)
    modelmap = trace(model, d.data("plain", "test")[0][:1])
    folded = copy.deepcopy(model)
    for path, norm in modelmap.batch_norms.items():
        fold_batch_norm(folded.get_submodule(path), folded.get_submodule(norm))
    found = {f"{name}accuracy": accuracy(model)}
    for text, share in KEPT.items():
        found[f"{name}merged_{text}"] = accuracy(cut(model, modelmap, IterativeFeatureMerging(), share))
        removed = [cut(m, modelmap, ChannelNorm(p=p), share) for m in (model, folded) for p in (1, 2)]
        found[f"{name}norm_{text}"] = max(map(accuracy, removed))
    alike, strict = (cut(model, modelmap, IterativeFeatureMerging(threshold=t), 0.01) for t in (ALIKE, 0.3))
    found[f"{name}distinct"] = channels(alike) / channels(model)
    return found | {f"{name}lossless": accuracy(model) - accuracy(strict)}


def trained(config: PocketCNNConfig, seed: int, epochs: int = 12, rate: float = 3e-3) -> nn.Module:
    """A network trained on digits."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = PocketCNN(config).train()
    images, labels = d.data("plain", "train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = rate * (1 - epoch / epochs)
        for picked in torch.randperm(len(images), generator=rng).split(64):
            loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return model.eval().requires_grad_(False)


def cut(model: nn.Module, modelmap: ModelMap, method: Rewriter, share: float) -> nn.Module:
    """A copy with that share of the channels of every convolution."""
    result = copy.deepcopy(model)
    method.rewrite(Scene(result, modelmap, levels={s.path: Width(share) for s in modelmap.where("conv")}))
    return result


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the test images that are named rightly."""
    images, labels = d.data("plain", "test")
    return float((model(images).argmax(1) == labels).float().mean())


def channels(model: nn.Module) -> int:
    """Output channels of all convolutions."""
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
