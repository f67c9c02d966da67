"""Lean optimisers for any training loop: a method's update rule as a `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import UserError
from trimtab.core.method import Optimiser, method

if TYPE_CHECKING:
    from torch import nn

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


def optimiser_of(
    model: nn.Module, rule: Optimiser, rate: float, decay: float = 0.0, seed: int = 0
) -> tuple[Stepping, list[nn.Parameter]]:
    """The optimiser of all that a model trains, and these parameters.

    What the rule asks for is put on the model: weights of 8 bits in the places of its linears, and means of what these
    read and get back.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
    >>> optimiser, trained = optimiser_of(model, method("q-galore"), 0.01)
    >>> [type(m).__name__ for m in model], len(trained), len(optimiser.held)
    (['Held', 'Held'], 4, 2)
    """
    from trimtab.parts.gathering import Means
    from trimtab.parts.integer_weight import hold
    from trimtab.parts.stepping import Stepping

    held = hold(model, rule.rounding) if rule.integers else {}  # type: ignore[attr-defined]
    trained = [p for p in model.parameters() if p.requires_grad]
    means = Means(model) if "inputs" in rule.needs() else None
    return Stepping(trained, rule, rate, decay, seed, held, means), trained
