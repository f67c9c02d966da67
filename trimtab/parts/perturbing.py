"""Directions that are drawn again from a seed and never kept: losses along them, and steps along them.

Noise is made in pieces, so that no tensor of a parameter's size is there beside the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError

PIECE = 1 << 16  # numbers that are drawn at a time, a multiple of 8
Losses = Sequence[Callable[[], Tensor]]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name.

    Raises:
        UserError: one of them has no memory of its own, such as a weight that is kept in 8 bits.
    """
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, param in found.items():
        if not param.is_contiguous():
            raise UserError(f"{name} is kept as codes or as a view, and cannot be moved to and fro; hold it in fp32")
    return found


@torch.no_grad()
def mean_loss(losses: Losses) -> float:
    """Mean loss of all items, without a graph."""
    parts = [part() for part in losses]
    return float(torch.cat([p.double() for p in parts]).mean())


def noise(param: Tensor, rng: torch.Generator, mask: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of a parameter, flat, and standard normal numbers for each; zero where the mask's bit is.

    Args:
        mask: one bit a number, as `bits` packs them.
    """
    flat = param.detach().view(-1)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE]
        drawn = torch.randn(len(piece), generator=rng)
        if mask is not None:
            drawn *= unpacked(mask[start // 8 : (start + PIECE) // 8], len(piece))
        yield piece, drawn.to(piece.dtype)


@torch.no_grad()
def shift(params: Sequence[Tensor], seed: int, by: float, masks: Sequence[Tensor] | None = None) -> None:
    """Move parameters along the direction of a seed, in place."""
    rng = torch.Generator().manual_seed(seed)
    for i, param in enumerate(params):
        for piece, drawn in noise(param, rng, masks[i] if masks else None):
            piece.add_(drawn, alpha=by)


def slope(
    losses: Losses, params: Sequence[Tensor], seed: int, eps: float, masks: Sequence[Tensor] | None = None
) -> tuple[float, float]:
    """The mean loss, and its slope along a seed's direction, by two losses eps to either side.

    (L(w + eps z) - L(w - eps z)) / (2 eps)
    """
    shift(params, seed, eps, masks)
    above = mean_loss(losses)
    shift(params, seed, -2 * eps, masks)
    below = mean_loss(losses)
    shift(params, seed, eps, masks)
    return (above + below) / 2, (above - below) / (2 * eps)


@torch.no_grad()
def along(
    params: dict[str, Tensor], found: Sequence[tuple[int, float]], masks: Sequence[Tensor] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The mean of slope times direction over pairs of a seed and a slope, parameter by parameter."""
    streams = [torch.Generator().manual_seed(seed) for seed, _ in found]
    for i, (name, param) in enumerate(params.items()):
        grad = torch.zeros_like(param.detach())
        for rng, (_, steep) in zip(streams, found, strict=True):
            for piece, drawn in noise(grad, rng, masks[i] if masks else None):
                piece.add_(drawn, alpha=steep / len(found))
        yield name, grad
        del grad


def draw(rng: torch.Generator) -> int:
    """A seed."""
    return int(torch.randint(0, 1 << 62, (1,), generator=rng))


_POWERS = 2 ** torch.arange(8, dtype=torch.uint8)


def bits(mask: Tensor) -> Tensor:
    """A mask `[n]` in n / 8 bytes.

    >>> unpacked(bits(torch.tensor([True, False, True])), 3)
    tensor([1., 0., 1.])
    """
    padded = nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8))
    return (padded.view(-1, 8) * _POWERS).sum(1, dtype=torch.uint8)


def unpacked(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits as 0 and 1 in fp32."""
    return ((packed[:, None] & _POWERS) != 0).view(-1)[:count].float()
