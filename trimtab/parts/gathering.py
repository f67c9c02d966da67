"""What linears read and what comes back to them, as means over rows, for update rules that ask for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Means:
    """Means over rows of the inputs of a model's linears and of the gradients of their outputs, since the last `take`.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> means = Means(model)
    >>> model(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    >>> means.take(model.weight)
    (tensor([2., 3.]), tensor([1.]))
    """

    def __init__(self, model: nn.Module) -> None:
        self._sums: dict[Tensor, list[Any]] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Linear, args: tuple[Any, ...], out: Tensor) -> None:
        if not out.requires_grad or out.shape[-1] != len(module.weight):  # a head that the loss bypasses
            return
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        mean_x, rows = x.sum(0, dtype=torch.float32), len(x)

        def back(grad: Tensor) -> None:
            mean_g = grad.detach().reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
            entry = self._sums.setdefault(module.weight, [torch.zeros_like(mean_x), torch.zeros_like(mean_g), 0])
            entry[0] += mean_x
            entry[1] += mean_g
            entry[2] += rows

        out.register_hook(back)

    def take(self, weight: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Mean input `[in]` and mean gradient of the output `[out]` of the linear of this weight; begins anew."""
        entry = self._sums.pop(weight, None)
        return (None, None) if entry is None else (entry[0] / entry[2], entry[1] / entry[2])
