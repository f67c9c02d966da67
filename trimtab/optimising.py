"""Lean optimisers for any training loop: a method's update rule as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.method import Optimiser, method

if TYPE_CHECKING:
    from trimtab.parts.stepping import Stepping


def optimizer(
    params: Iterable[Any],
    rule: str | Optimiser = "apollo-mini",
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    held: Mapping[Any, Any] | None = None,
    means: Any = None,
    **config: Any,
) -> Stepping:
    """An optimiser of the family `optim` for a loop of your own, or for the Trainer of Hugging Face.

    Args:
        params: parameters, or groups of them.
        rule: name of a method, or one.
        held: parameters that stand for weights of 8 bits, as `parts.integer_weight.hold(model)` gives them.
        means: of what linears read and get back, `parts.gathering.Means(model)`, for a method that asks for them.
        config: fields of the named method, like `rank=64`.

    Raises:
        UserError: no such method or field, or one of another family.

    >>> import torch
    >>> layer = torch.nn.Linear(300, 300)
    >>> optimiser = optimizer(layer.parameters(), "apollo", lr=0.01, rank=8)
    >>> layer(torch.ones(1, 300)).sum().backward(); optimiser.step(); optimiser.state_bytes()
    21600
    """
    from trimtab.parts.stepping import Stepping

    made = method(rule, **config) if isinstance(rule, str) else rule
    if not isinstance(made, Optimiser):
        raise UserError(f"{made.card.name} updates no parameters; `trimtab methods --family optim` lists what does")
    return Stepping(params, made, lr, weight_decay, seed, held, means)
