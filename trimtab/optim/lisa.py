"""LISA: a few blocks drawn at random are trained for a while, the others are frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Policy
from trimtab.core.view import Turn


@dataclass(frozen=True)
class LISA(Policy):
    """Every K steps, thaw gamma blocks drawn at random and freeze the rest; what lies outside of blocks always trains.

    Args:
        blocks: gamma (2).
        every: K (20).

    Raises:
        UserError: fewer than one block, more than there are, or K below 1.

    Reference: Pan et al. 2024, arXiv:2403.17919, section 3.2 and algorithm 1.
    Departures: none. As in the authors' code a block's moments begin at zero whenever it is thawed.

    >>> from trimtab.core.view import Layer
    >>> layers = tuple(Layer(f"layers.{i}.mlp", i, 10) for i in range(4))
    >>> turn = Turn(0, 100, layers, tuple(layer.path for layer in layers))
    >>> len(LISA().decide(turn, rng=torch.Generator().manual_seed(0)))
    2
    """

    blocks: int = 2
    every: int = 20

    card = Card(
        "lisa",
        catalogue=(258,),
        paper="arXiv:2403.17919",
        claim="A loss below LoRA's for the same bytes of gradients and state, near full fine-tuning's.",
        keeps=frozenset({"deterministic"}),
    )

    def decide(self, view: Turn, *, rng: torch.Generator) -> tuple[str, ...]:
        """Paths of the layers that the step trains."""
        known = sorted({layer.block for layer in view.layers})
        if not 1 <= self.blocks <= len(known) or self.every < 1:
            raise UserError(
                f"lisa was asked for {self.blocks} of {len(known)} blocks every {self.every} steps; "
                f"1 to {len(known)} blocks and 1 step or more can be had"
            )
        if view.step % self.every:
            return view.active
        drawn = {known[i] for i in torch.randperm(len(known), generator=rng)[: self.blocks].tolist()}
        return tuple(layer.path for layer in view.layers if layer.block in drawn)
