"""What is known of an untrained network's layers from one batch: how much the loss hangs on what they give, and on
their weights.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def saliency(tensor: Tensor) -> float:
    """Sum of |t dL/dt|; 0 where no gradient came back."""
    return 0.0 if tensor.grad is None else float((tensor.detach() * tensor.grad).abs().sum())


def saliencies(model: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Of each linear and convolution, by path: the saliency of its output and of its weight under cross entropy.

    The model's gradients are lost, and its norms see the batch.

    Reference: Lee et al. 2019, arXiv:1810.02340, section 4.1 (weights); Tanaka et al. 2020, arXiv:2006.05467, for sums
        over layers.

    >>> import torch
    >>> layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> sorted(saliencies(layers, torch.ones(5, 3), torch.zeros(5, dtype=torch.long)))
    ['0', '2']
    """
    outputs: dict[str, Tensor] = {}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}

    def keep(path: str, out: Tensor) -> None:
        out.retain_grad()
        outputs[path] = out

    hooks = [
        layer.register_forward_hook(lambda module, given, out, path=path: keep(path, out))
        for path, layer in layers.items()
    ]
    model.zero_grad()
    functional.cross_entropy(model(inputs), labels).backward()
    for hook in hooks:
        hook.remove()
    found = {path: (saliency(outputs[path]), saliency(layer.weight)) for path, layer in layers.items()}
    model.zero_grad()
    return found
