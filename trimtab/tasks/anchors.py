"""A small image transformer beside the shipped one, and the joint training of both stitched together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trimtab.tasks import domains as d

if TYPE_CHECKING:
    from torch import nn

    from trimtab.parts.stitching import Stitched


def small_anchor(seed: int) -> nn.Module:
    """A smaller image transformer, trained on a quarter of the digits."""
    import torch
    from transformers import ViTForImageClassification

    torch.manual_seed(seed)
    config: Any = copy.deepcopy(d.base_model().config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 24, 48, 3
    model = ViTForImageClassification(config)
    train(model, seed, 15, 3e-3, None, share=4)
    return model.eval()


def train(
    model: nn.Module, seed: int, epochs: int, rate: float, draw: Callable[[], int] | None, share: int = 1
) -> None:
    """AdamW with a linear fall of the rate; of a stitched model a route a step, as `draw` says."""
    import torch
    from torch import nn

    stitched: Any = model
    images, labels = d.data("plain", "train")
    images, labels = images[::share], labels[::share]
    rng, params = torch.Generator().manual_seed(seed), [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(params, lr=rate, weight_decay=0.01)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = rate * (1 - epoch / epochs)
        for picked in torch.randperm(len(images), generator=rng).split(64):
            if draw is not None:
                stitched.place = draw()
            logits = model(pixel_values=images[picked]).logits
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(logits, labels[picked]).backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimiser.step()


def accuracies(model: Stitched) -> list[float]:
    """Share of the test images that each route names rightly."""
    import torch

    images, labels = d.data("plain", "test")
    found = []
    for place in range(len(model.routes)):
        model.place = place
        with torch.no_grad():
            logits = model(pixel_values=images).logits
        found.append(float((logits.argmax(1) == labels).float().mean()))
    return found
