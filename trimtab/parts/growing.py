"""Growth that keeps a network's function: more channels, and more layers."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError

Layer = nn.Conv2d | nn.Linear
AnyLayer = TypeVar("AnyLayer", nn.Conv2d, nn.Linear)


def wider(first: Layer, second: Layer, width: int, rng: torch.Generator, noise: float = 0.0) -> tuple[Layer, Layer]:
    """Two layers with more channels between them, of the same function where what lies between them works channel by
    channel: new channels are copies of old ones, and what reads a channel that was copied m - 1 times is divided by m.

    Args:
        width: channels of the first layer's output from now on.
        second: the layer that reads them; a linear may read several places of a channel, one channel behind the other.
        noise: deviation of what is added to the copies' weights, in shares of the weights' own, so that copies part.

    Raises:
        UserError: fewer channels than there are, or layers that do not meet.

    Reference: Chen et al. 2016, arXiv:1511.05641, section 2.2 (Net2WiderNet).

    >>> one, two, x = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(5, 3)
    >>> a, b = wider(one, two, 7, torch.Generator().manual_seed(0))
    >>> bool((b(a(x).relu()) - two(one(x).relu())).abs().max() < 1e-6)
    True
    """
    old, weight = first.weight.shape[0], second.weight
    if width < old or weight.shape[1] % old:
        raise UserError(
            f"{width} channels were asked for between layers of {old} and {weight.shape[1]}; growth takes at least "
            "as many as there are, and layers of which one reads the other"
        )
    source = torch.cat([torch.arange(old), torch.randint(old, (width - old,), generator=rng)])
    share = torch.bincount(source, minlength=old)[source].to(weight.dtype)
    with torch.no_grad():
        rows = first.weight[source].clone()
        rows[old:] += noise * first.weight.std() * torch.randn(rows[old:].shape, generator=rng)
        by_channel = weight.unflatten(1, (old, -1))
        columns = by_channel[:, source] / share.view(1, -1, *[1] * (by_channel.dim() - 2))
        bias = None if first.bias is None else first.bias[source]
        return _like(first, rows, bias), _like(second, columns.flatten(1, 2), second.bias)


def deeper(layer: nn.Conv2d) -> nn.Conv2d:
    """A convolution to put behind another one and its ReLU, which passes on what it reads; a ReLU may follow it.

    Args:
        layer: the one before; the new one has its channels and its kernel's size, which must be odd.

    Raises:
        UserError: the kernel's size is even.

    Reference: Chen et al. 2016, arXiv:1511.05641, section 2.3 (Net2DeeperNet).

    >>> old, x = nn.Conv2d(1, 4, 3, padding=1), torch.randn(2, 1, 5, 5)
    >>> bool((deeper(old)(old(x).relu()).relu() - old(x).relu()).abs().max() < 1e-6)
    True
    """
    height, width = layer.kernel_size
    if height % 2 == 0 or width % 2 == 0:
        raise UserError(f"a layer behind one with a kernel of {height}x{width} was asked for; its sides must be odd")
    weight = torch.zeros(layer.out_channels, layer.out_channels, height, width)
    nn.init.dirac_(weight)
    new = nn.Conv2d(layer.out_channels, layer.out_channels, (height, width), padding=(height // 2, width // 2))
    return _filled(new, weight, torch.zeros(layer.out_channels))


def _like(layer: Layer, weight: Tensor, bias: Tensor | None) -> Layer:
    """A layer of another width with these numbers."""
    rows, cols = weight.shape[:2]
    if isinstance(layer, nn.Linear):
        return _filled(nn.Linear(cols, rows, bias is not None), weight, bias)
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    new = nn.Conv2d(cols, rows, kernel, layer.stride, layer.padding, bias=bias is not None)  # type: ignore[arg-type]
    return _filled(new, weight, bias)


def _filled(layer: AnyLayer, weight: Tensor, bias: Tensor | None) -> AnyLayer:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer
