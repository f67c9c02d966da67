"""What the router of a mixture of experts does on data: how often each expert is chosen, and which are chosen alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from trimtab.core.modelmap import ModelMap
from trimtab.engine.watching import watched

ROUTING = frozenset({"usage", "likeness"})


@torch.no_grad()
def routing(
    model: nn.Module, modelmap: ModelMap, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Statistics of every stack of experts over batches, by the stack's path.

    Args:
        modelmap: of the model.
        batches: forward arguments by name.

    Returns:
        `usage`: shares of the choices `[experts]`; `likeness`: cosines between the experts' router logits
        `[experts, experts]`.
    """
    stacks = {s.path.rpartition(".")[0]: (s.shape[0], s.block) for s in modelmap.sites if s.kind == "experts"}
    routers = {s.block: s.path for s in modelmap.where("router")}
    counts = {path: torch.zeros(size) for path, (size, _) in stacks.items()}
    products = {path: torch.zeros(size, size, dtype=torch.double) for path, (size, _) in stacks.items()}

    def chosen(path: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        places = next(v for v in given if not v.is_floating_point())
        counts[path] += torch.bincount(places.flatten(), minlength=len(counts[path]))

    def routed(path: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        logits = nn.functional.linear(given[0], module.get_parameter("weight")).flatten(0, -2).double()
        products[path] += logits.T @ logits

    sees = {path: partial(chosen, path) for path in stacks}
    sees |= {routers[block]: partial(routed, path) for path, (_, block) in stacks.items()}
    with watched(model, sees):
        for batch in batches:
            model(**batch)
    lengths = {path: product.diagonal().clamp_min(1e-12).sqrt() for path, product in products.items()}
    return {
        "usage": {path: count / count.sum().clamp_min(1) for path, count in counts.items()},
        "likeness": {path: product / torch.outer(lengths[path], lengths[path]) for path, product in products.items()},
    }


def sensitivity(model: nn.Module, modelmap: ModelMap, losses: Sequence[Callable[[], Tensor]]) -> dict[str, Tensor]:
    """Mean size of the gradient of some losses by each weight of every stack of experts, by its path."""
    found = {s.path: model.get_parameter(s.path) for s in modelmap.sites if s.kind == "experts"}
    frozen = {path: p for path, p in found.items() if not p.requires_grad}
    sums = {path: torch.zeros_like(p) for path, p in found.items()}
    try:
        for p in frozen.values():
            p.requires_grad_(True)
        for loss in losses:
            for path, grad in zip(found, torch.autograd.grad(loss(), list(found.values())), strict=True):
                sums[path] += grad.abs() / len(losses)
    finally:
        for p in frozen.values():
            p.requires_grad_(False)
    return sums
