"""Adam's moments, and the projections that make them small."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import UserError

State = dict[str, Any]


def at_least_one(name: str, param: Tensor, **numbers: int) -> None:
    """Refuse numbers of a method below 1.

    Raises:
        UserError: it names the method, the numbers and the parameter's shape.
    """
    if min(numbers.values()) < 1:
        said = " and ".join(f"{key}={value}" for key, value in numbers.items())
        raise UserError(
            f"{name} was given {said} for a parameter of shape {tuple(param.shape)}; "
            f"{'both are' if len(numbers) > 1 else 'it is'} 1 or more"
        )


def begin(shape: tuple[int, ...], like: Tensor) -> State:
    """Moments of a tensor of this shape, all zero."""
    return {"step": 0, "mean": like.new_zeros(shape), "square": like.new_zeros(shape)}


def moment_bytes(shape: tuple[int, ...], width: int = 4) -> int:
    """Bytes of both moments."""
    return 2 * width * prod(shape)


def adam(grad: Tensor, state: State, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's direction with bias correction: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    d = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps).

    >>> state = begin((2,), torch.zeros(2))
    >>> adam(torch.tensor([0.5, -3.0]), state, (0.9, 0.999), 0.0).round(decimals=4)
    tensor([ 1., -1.])
    """
    state["step"] += 1
    first, second = betas
    state["mean"].lerp_(grad, 1 - first)
    state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
    root = (1 - second ** state["step"]) ** 0.5
    divisor = state["square"].sqrt().div_(root).add_(eps)
    return state["mean"].div(divisor).div_(1 - first ** state["step"])


def narrowed(shape: tuple[int, ...], rank: int) -> tuple[int, ...] | None:
    """Shape of a matrix's gradient projected to a rank, along its shorter side; None where that would not be smaller.

    >>> narrowed((8, 100), 4), narrowed((100, 8), 4), narrowed((100, 8), 8), narrowed((100,), 4)
    ((4, 100), (100, 4), None, None)
    """
    if len(shape) != 2 or min(shape) <= rank:
        return None
    return (rank, shape[1]) if shape[0] < shape[1] else (shape[0], rank)


def project(grad: Tensor, basis: Tensor) -> Tensor:
    """`grad` along its shorter side by `basis [shorter side, rank]`."""
    if basis.shape[1] == 1:  # read once, where a product of matrices takes three times as long
        found = (grad.T if grad.shape[0] < grad.shape[1] else grad).mv(basis[:, 0])
        return found[None] if grad.shape[0] < grad.shape[1] else found[:, None]
    return basis.T @ grad if grad.shape[0] < grad.shape[1] else grad @ basis


def lift(narrow: Tensor, basis: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Back from the rank to the shape."""
    return basis @ narrow if shape[0] < shape[1] else narrow @ basis.T


@lru_cache(maxsize=4)
def gaussian(side: int, rank: int, seed: int) -> Tensor:
    """A random basis `[side, rank]` that keeps squared lengths in the mean: entries of variance 1 / rank. Not to be
    written to: the last few are kept.
    """
    return torch.randn(side, rank, generator=torch.Generator().manual_seed(seed)).div_(rank**0.5)


@lru_cache(maxsize=4)
def signs(side: int, seed: int) -> Tensor:
    """Random signs `[side]`. Not to be written to: the last few are kept."""
    return torch.randint(0, 2, (side,), generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1).float()


def bucketed(grad: Tensor, rank: int, sign: Tensor) -> Tensor:
    """`grad` along its shorter side in r sums of every r-th row (or column), each row with its sign: a projection that
    keeps squared lengths in the mean, for one pass over the gradient in place of a product (Charikar, Chen and
    Farach-Colton 2002, a count sketch whose buckets are of equal size).

    >>> bucketed(torch.tensor([[1.0], [2.0], [5.0]]).expand(3, 4), 2, torch.tensor([1.0, 1.0, -1.0]))[:, 0]
    tensor([-4.,  2.])
    """
    wide = grad.shape[0] < grad.shape[1]
    side, sign = min(grad.shape), sign.to(grad.dtype)
    out = grad[:rank] * sign[:rank, None] if wide else grad[:, :rank] * sign[:rank]
    for start in range(rank, side, rank):
        stop = min(start + rank, side)
        part = sign[start:stop]
        if wide:
            out[: stop - start].addcmul_(grad[start:stop], part[:, None])
        else:
            out[:, : stop - start].addcmul_(grad[:, start:stop], part)
    return out


GROWTH = 1.01  # by which the length of a direction may exceed that of the one before


def scaled(
    grad: Tensor, narrow: Tensor, state: State, by_tensor: bool, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor]:
    """A gradient and the factors by which Adam would stretch it, seen in a random projection R of it (APOLLO): of each
    channel along the longer side, or of the tensor.

    s = |Adam(R)| / |R|; a sudden growth of |s G| is cut (Chen et al. 2024, arXiv:2410.01623).
    """
    stretched = adam(narrow, state, betas, eps)
    along = (0, 1) if by_tensor else 0 if grad.shape[0] < grad.shape[1] else 1
    norm = torch.linalg.vector_norm
    factor = norm(stretched, dim=along, keepdim=True) / (norm(narrow, dim=along, keepdim=True) + 1e-8)
    length = float(norm(factor * norm(grad, dim=along, keepdim=True)))
    if state["length"] >= 0:
        cut = max(length / (state["length"] + 1e-8), GROWTH) / GROWTH
        factor, length = factor / cut, length / cut
    state["length"] = length
    return grad, factor


def leading(grad: Tensor, rank: int, rng: torch.Generator, rounds: int = 1, more: int = 8) -> Tensor:
    """About the leading singular vectors of the shorter side, `[side, rank]`, by a randomised range finder (Halko,
    Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4): a few thin products in place of a whole decomposition.

    >>> rng = torch.Generator().manual_seed(0)
    >>> low = torch.randn(30, 3, generator=rng) @ torch.randn(3, 50, generator=rng)
    >>> basis = leading(low, 3, rng)
    >>> bool(torch.allclose(basis @ (basis.T @ low), low, atol=1e-3))
    True
    """
    matrix = (grad if grad.shape[0] < grad.shape[1] else grad.T).float()
    wide = min(matrix.shape[0], rank + more)
    span = matrix @ torch.randn(matrix.shape[1], wide, generator=rng)
    for _ in range(rounds):
        span = matrix @ (matrix.T @ torch.linalg.qr(span).Q)
    basis = torch.linalg.qr(span).Q
    rotation = torch.linalg.svd(basis.T @ matrix, full_matrices=False).U
    return (basis @ rotation[:, :rank]).contiguous().to(grad.dtype)
