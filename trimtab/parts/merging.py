"""What methods that merge share: changes from the base, what is kept of them, and the election of signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.core.errors import UserError


def changes(tensors: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """What each parent changed: task vectors."""
    return [tensor - base for tensor in tensors]


def kept(change: Tensor, threshold: float) -> Tensor:
    """A change without the entries whose magnitude is below the threshold.

    >>> kept(torch.tensor([0.5, -2.0, 1.0]), 1.0)
    tensor([ 0., -2.,  1.])
    """
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0))  # hardshrink drops what is equal, too
    return torch.nn.functional.hardshrink(change, float(below))


def combine(
    parts: Sequence[Tensor], weight: Sequence[float], *, elect: bool = False, normalise: bool = False
) -> Tensor:
    """The weighted sum of changes or, with `elect`, of those alone whose sign is that of the sum.

    Args:
        parts: changes from the base, which are not yet weighted.
        weight: one a part.
        elect: leave out, element by element, the parts of the other sign; where all cancel out, the sign is plus.
        normalise: divide by the weights of the parts that went in; by one where these cancel out.
    """
    scaled = [part * w for part, w in zip(parts, weight, strict=True)]
    total = scaled[0].clone()
    for part in scaled[1:]:
        total += part
    if not elect:
        whole = sum(weight)
        return total / whole if normalise and abs(whole) >= 1e-8 else total
    sign = total.sign_().add_(0.5).sign_()
    result, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, w in zip(scaled, weight, strict=True):
        agreeing = part.mul_(sign).relu_()
        result += agreeing
        if normalise:
            divisor.add_(agreeing.sign_(), alpha=w)
    result *= sign
    if normalise:
        divisor += 1 - divisor.abs().sign_().abs()
    return result.div_(divisor) if normalise else result


def average(tensors: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    """The weighted mean, written so that equal tensors give exactly that tensor.

    Raises:
        UserError: the weights cancel out.

    >>> average([torch.tensor([1.0]), torch.tensor([3.0])], (1.0, 3.0))
    tensor([2.5000])
    """
    whole = sum(weight)
    if abs(whole) < 1e-8:
        raise UserError(f"the weights {tuple(weight)} add up to {whole:g}, and a mean divides by that; change one")
    result = tensors[0].clone()
    for tensor, w in zip(tensors[1:], weight[1:], strict=True):
        result.add_(tensor - tensors[0], alpha=w / whole)
    return result


def coin(shape: torch.Size, density: float, rng: torch.Generator) -> Tensor:
    """A mask in which each element stays with that probability, to 16 bits; four elements a draw.

    >>> mask = coin(torch.Size((1000, 100)), 0.3, torch.Generator().manual_seed(0))
    >>> abs(float(mask.float().mean()) - 0.3) < 0.01
    True
    """
    count = shape.numel()
    draws = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=rng)
    limit = round(density * 65536) - 32768
    mask = draws.view(torch.int16)[:count].reshape(shape)
    return torch.ones(shape, dtype=torch.bool) if limit > 32767 else mask < limit


def greedy_members(scores: Sequence[float], score_of: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The members of a greedy soup: each model, the best first, stays if the score does not fall.

    Args:
        scores: of each model alone, higher is better.
        score_of: the score of the mean of some of them.

    >>> greedy_members([0.5, 0.7, 0.6], lambda members: {(1, 2): 0.65}.get(members, 0.8))
    (0, 1)
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    members: tuple[int, ...] = (order[0],)
    best = scores[order[0]]
    for i in order[1:]:
        tried = tuple(sorted((*members, i)))
        if (score := score_of(tried)) >= best:
            members, best = tried, score
    return members
