"""SlimFit: the layers that a step would move least are frozen for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Policy
from trimtab.core.view import Turn


@dataclass(frozen=True)
class SlimFit(Policy):
    """Train the layers with the largest d_i = mean |W_t - W_t-1| / mean |W_t-1|, freeze the others, at every step.

    d_i is that of the last step that trained layer i, and infinite before: each layer has its turn, and one that is
    frozen comes back once those that are trained have settled below it.

    Args:
        frozen: share of the layers that are frozen (0.9; paper: up to 0.95).

    Raises:
        UserError: a share below 0, or 1 and more.

    Reference: Ardakani et al. 2023, arXiv:2305.18513, section 3 and algorithm 1.
    Departures: d_i is a ratio of means and not a mean of ratios, which single weights near zero would decide. What
        cannot be given up by freezing is quantised by the training's codec, for all layers alike, and nothing is
        pruned; there is no balancing of which layers' activations go.

    >>> from trimtab.core.view import Layer
    >>> layers = tuple(Layer(f"layers.{i}.mlp", i, 10) for i in range(4))
    >>> turn = Turn(7, 100, layers, ())
    >>> SlimFit(frozen=0.5).decide(turn, changes={"layers.0.mlp": 0.1, "layers.2.mlp": 0.3, "layers.3.mlp": 0.2})
    ('layers.1.mlp', 'layers.2.mlp')
    """

    frozen: float = 0.9

    card = Card(
        "slimfit",
        catalogue=(316,),
        paper="arXiv:2305.18513",
        claim="Layers chosen by how far they move lose less to freezing than layers chosen at random.",
        keeps=frozenset({"deterministic"}),
    )

    def decide(self, view: Turn, *, changes: Mapping[str, float]) -> tuple[str, ...]:
        """Paths of the layers that the step trains."""
        if not 0 <= self.frozen < 1:
            raise UserError(f"slimfit was asked to freeze a share of {self.frozen} of the layers; it is 0 to below 1")
        most = max(1, round((1 - self.frozen) * len(view.layers)))
        moved = sorted(view.layers, key=lambda layer: -changes.get(layer.path, float("inf")))
        chosen = {layer.path for layer in moved[:most]}
        return tuple(layer.path for layer in view.layers if layer.path in chosen)
