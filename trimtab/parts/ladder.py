"""A ladder beside a frozen network: rungs read what its blocks give, and no gradient goes back through a block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimtab.parts.lowrank_delta import gaussian
from trimtab.parts.norms import rms_norm
from trimtab.parts.shared import Shared

SHARPNESS = 10.0  # of a gate: sigmoid(10 a), a being trained


class Rung(nn.Module):
    """A frozen block, and beside it a step of the side network; the last one adds what the side network found.

    With b the block's output, s the side network's state before, m = sigmoid(10 a) and d the projection to its width:
    s <- m d(b) + (1 - m) s, then s <- s + f(s), token by token. The state at first is a projection of what the first
    block reads, and the last block's output becomes b + up(s), up being zero at first.

    Args:
        block: it takes the residual as its first argument, and gives it back, alone or first in a tuple.
        width: of the side network.
        shared: the places of the ladder; shapes are `(residual, residual)`.
        rng: draws the first weights.
    """

    def __init__(self, block: nn.Module, width: int, shared: Shared, rng: torch.Generator) -> None:
        super().__init__()
        size = self.out_features = self.in_features = shared.shape[0]
        self.base, self.state = block.requires_grad_(False), shared.held.setdefault("ladder", {})
        self.down = nn.Parameter(gaussian(width, size, rng))
        self.gate = nn.Parameter(torch.zeros(()))
        self.inner = nn.Parameter(gaussian(2 * width, width, rng))
        self.outer = nn.Parameter(torch.zeros(width, 2 * width))
        self.first = nn.Parameter(gaussian(width, size, rng)) if shared.place == 0 else None
        self.up = nn.Parameter(torch.zeros(size, width)) if shared.place == len(shared.shapes) - 1 else None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)  # what a model asks of its blocks

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block gives; the last one's residual with the side network's contribution."""
        out = self.base(hidden, *args, **kwargs)
        residual = out[0] if isinstance(out, tuple) else out
        side = self.state.pop("side", None) if self.first is None else _even(hidden) @ self.first.to(hidden.dtype).T
        gate = torch.sigmoid(SHARPNESS * self.gate).to(residual.dtype)
        side = gate * (_even(residual) @ self.down.to(residual.dtype).T) + (1 - gate) * side
        inner = nn.functional.silu(_even(side) @ self.inner.to(side.dtype).T)
        side = side + inner @ self.outer.to(side.dtype).T
        if self.up is None:
            self.state["side"] = side
            return out
        residual = residual + side @ self.up.to(side.dtype).T
        return (residual, *out[1:]) if isinstance(out, tuple) else residual

    def factored(self) -> None:
        """A ladder is no change of a matrix."""

    def merged(self) -> nn.Module:
        """A ladder cannot be merged."""
        raise NotImplementedError


def _even(x: Tensor) -> Tensor:
    return rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype), 1e-6)
