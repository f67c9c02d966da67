"""A low-rank predictor of which neurons a token makes active."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Deciding:
    """Scores of neurons, above zero where one is taken for active: s = U (D x) + b, or s = U x + b without D.

    Fields:
        up: U, `[neurons, rank]`, or `[neurons, inputs]` without D.
        down: D, `[rank, inputs]`, or None.
        bias: b, `[neurons]`, or None.
    """

    up: Tensor
    down: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Scores `[..., neurons]` for inputs `[..., inputs]`."""
        return nn.functional.linear(x if self.down is None else x @ self.down.T, self.up, self.bias)

    @property
    def nbytes(self) -> int:
        """Bytes of its matrices."""
        return self.up.nbytes + sum(t.nbytes for t in (self.down, self.bias) if t is not None)


def predictor(
    inputs: Tensor, active: Tensor, rank: int, *, epochs: int = 8, rate: float = 1e-2, batch: int = 64, seed: int = 0
) -> Deciding:
    """Learn from tokens which neurons are active, missed ones and needless ones in balance:

        loss = mean over active of -log p / 2 + mean over silent of -log (1 - p) / 2,   p = 1 / (1 + exp(-s))

    Args:
        inputs: what the layer reads, `[tokens, inputs]`.
        active: bools `[tokens, neurons]`.
        rank: of D and U (paper: 128, and 1,024 in the last four of 32 layers of width 4,096).
        epochs, rate, batch: of Adam (paper: 2 epochs over 10,000 samples; the others are not given).
        seed: of the first matrices and of the order.

    Reference: Alizadeh et al. 2023, arXiv:2312.11514, section 3.1; the architecture is that of Liu et al. 2023 (Deja
        Vu), arXiv:2310.17157.

    >>> x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    >>> made = predictor(x, x > 0, 4, epochs=40)
    >>> bool(((made(x) > 0) == (x > 0)).float().mean() > 0.9)
    True
    """
    rng = torch.Generator().manual_seed(seed)
    width, neurons = inputs.shape[1], active.shape[1]
    down = torch.randn(rank, width, generator=rng).div_(width**0.5).requires_grad_(True)
    up = torch.randn(neurons, rank, generator=rng).div_(rank**0.5).requires_grad_(True)
    bias = torch.zeros(neurons, requires_grad=True)
    share = active.float().mean().clamp(1e-4, 1 - 1e-4)
    optimiser = torch.optim.Adam([down, up, bias], rate)
    with torch.enable_grad():
        for places in (p for _ in range(epochs) for p in torch.randperm(len(inputs), generator=rng).split(batch)):
            target = active[places].float()
            weight = torch.where(active[places], 0.5 / share, 0.5 / (1 - share))
            scores = Deciding(up, down, bias)(inputs[places])
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(scores, target, weight).backward()
            optimiser.step()
    return Deciding(up.detach(), down.detach(), bias.detach())
