"""A classifier's head for other classes than those that it knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from trimtab.core.site import Site


def give_head(model: nn.Module, sites: Sequence[Site], names: Sequence[str], seed: int) -> str:
    """Put a fresh linear with an output for each name in the place of a classifier's head; its path.

    The weights are drawn as transformers draws them, with a deviation of 0.02; biases begin at zero. The model's
    configuration names the new classes.

    Raises:
        UserError: the model has no head, or several.
    """
    import torch
    from torch import nn

    heads = [site for site in sites if site.kind == "head"]
    if len(heads) != 1:
        raise UserError(
            f"a fresh head was asked for, and this model has {len(heads)} heads; a classifier with one linear behind "
            "all else can be given another"
        )
    path = heads[0].path
    old: Any = model.get_submodule(path)
    head = nn.Linear(old.in_features, len(names), dtype=old.weight.dtype)
    with torch.no_grad():
        rng = torch.Generator().manual_seed(seed)
        head.weight.copy_(torch.randn(head.weight.shape, generator=rng) * 0.02)
        head.bias.zero_()
    model.set_submodule(path, head.requires_grad_(False))
    config: Any = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and hasattr(config, "classes"):
        model.config = dataclasses.replace(config, classes=len(names))  # type: ignore[type-var, assignment]
    elif config is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: place for place, name in enumerate(names)}
    return path
