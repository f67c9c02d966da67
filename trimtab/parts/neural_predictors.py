"""Small neural predictors of what a network scores: one learns free statistics first, one learns an order."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Array = NDArray[np.float64]
Loss = Literal["kendall", "mse"]


def diff_kendall(predicted: Tensor, target: Tensor, alpha: float = 1.0) -> Tensor:
    """One less a smooth Kendall's tau: 1 - mean over pairs of tanh(alpha (p_i - p_j)(t_i - t_j)).

    >>> bool(diff_kendall(torch.tensor([0.0, 5.0]), torch.tensor([0.0, 5.0])) < 1e-6)
    True
    """
    i, j = torch.triu_indices(len(target), len(target), 1)
    return 1 - torch.tanh(alpha * (predicted[i] - predicted[j]) * (target[i] - target[j])).mean()


def standard(values: Array) -> Array:
    """Columns of mean 0 and deviation 1; those that do not vary are 0."""
    deviation = values.std(0)
    return (values - values.mean(0)) / np.where(deviation > 0, deviation, 1.0)


class Pretrained:
    """Scores from rows of a genome's places through an encoder that first learned statistics that cost nothing.

        statistics ~ V f(x),   then   score ~ w f(x) + b,   f two layers

    The encoder rests for the first half of the second fit, so that a new last layer does not undo what it learned.

    Args:
        free: rows `[many, places]` and their statistics `[many, statistics]`, or None: the encoder starts as drawn.
        rows, values: of the few that were evaluated.
        seed: of the first weights.
    """

    WIDTH, STEPS = 48, 200

    def __init__(self, free: tuple[Array, Array] | None, rows: Array, values: Array, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            places, width = rows.shape[1], self.WIDTH
            self._encoder = nn.Sequential(nn.Linear(places, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self._last = nn.Linear(width, 1)
            if free is not None:
                first = nn.Linear(width, free[1].shape[1])
                self._fit(free[0], standard(free[1]), first, [self._encoder, first], self.STEPS, 1e-2)
            self._middle, self._spread = float(values.mean()), float(values.std()) or 1.0
            target = ((values - self._middle) / self._spread)[:, None]
            self._fit(rows, target, self._last, [self._last], self.STEPS // 2, 1e-2)
            self._fit(rows, target, self._last, [self._encoder, self._last], self.STEPS // 2, 3e-3)

    def _fit(
        self, rows: Array, target: Array, last: nn.Module, trained: list[nn.Module], steps: int, rate: float
    ) -> None:
        x, y = (torch.as_tensor(part, dtype=torch.float32) for part in (rows, target))
        parameters = [p for module in trained for p in module.parameters()]
        optimiser = torch.optim.AdamW(parameters, rate, weight_decay=1e-2)
        for _ in range(steps):
            optimiser.zero_grad()
            functional.huber_loss(last(self._encoder(x)), y).backward()
            optimiser.step()

    @torch.no_grad()
    def mean(self, rows: Array) -> Array:
        """What is expected of rows."""
        found = self._last(self._encoder(torch.as_tensor(rows, dtype=torch.float32)))[:, 0]
        return np.asarray(found.double().numpy() * self._spread + self._middle)


class _Uncertain(nn.Module):
    """A linear layer whose weights are drawn: w = mean + softplus(rho) noise."""

    def __init__(self, entry: int, exit: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(exit, entry) / entry**0.5)
        self.rho = nn.Parameter(torch.full((exit, entry), -3.0))
        self.bias = nn.Parameter(torch.zeros(exit))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(self.mean)
        return functional.linear(x, self.mean + functional.softplus(self.rho) * noise, self.bias)


class Mixer:
    """An order of networks from what is known of their nodes: nodes are mixed by layers with uncertain weights.

        score = w2 relu(norm(W1 z)) + linear(z),   z the standardised logarithms of the nodes' statistics

    Args:
        nodes: statistics of each node `[networks, nodes]`, none negative.
        values: what the networks scored; small is good.
        loss: `kendall`, the smooth tau, or `mse`.
        seed: of the first weights and their noise.
    """

    WIDTH, STEPS, DRAWS = 32, 150, 8

    def __init__(self, nodes: Array, values: Array, loss: Loss = "kendall", seed: int = 0) -> None:
        logs = np.log10(np.maximum(nodes, 0) + 1e-12)
        self._middle, self._spread = logs.mean(0), np.where(logs.std(0) > 1e-9, logs.std(0), 1.0)
        self._seed = seed
        x = self._input(nodes)
        # ranks, so that a few failures do not decide
        order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
        y = torch.as_tensor(standard(order[:, None].astype(float))[:, 0], dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            width = self.WIDTH
            self._mix = nn.Sequential(
                _Uncertain(x.shape[1], width), nn.LayerNorm(width), nn.ReLU(), _Uncertain(width, 1)
            )
            self._line = nn.Linear(x.shape[1], 1)
            parameters = [*self._mix.parameters(), *self._line.parameters()]
            optimiser = torch.optim.AdamW(parameters, 1e-2, weight_decay=1e-2)
            for _ in range(self.STEPS):
                optimiser.zero_grad()
                predicted = (self._mix(x) + self._line(x))[:, 0]
                error = diff_kendall(predicted, y) if loss == "kendall" else functional.mse_loss(predicted, y)
                error.backward()
                optimiser.step()

    def _input(self, nodes: Array) -> Tensor:
        logs = np.log10(np.maximum(nodes, 0) + 1e-12)
        return torch.as_tensor((logs - self._middle) / self._spread, dtype=torch.float32)

    @torch.no_grad()
    def mean(self, nodes: Array) -> Array:
        """Scores, whose order counts; means over drawn weights."""
        x = self._input(nodes)
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            drawn = torch.stack([(self._mix(x) + self._line(x))[:, 0] for _ in range(self.DRAWS)])
        return np.asarray(drawn.mean(0).double().numpy())
