"""Weighted k-means over short vectors, and the nearest codeword of each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_CELLS = 1 << 19  # distances held at a time: 2 MiB, so that they are still in the cache when the least is sought


def nearest(vectors: Tensor, weights: Tensor, book: Tensor) -> tuple[Tensor, Tensor]:
    """The codeword of least weighted error of each vector, and that error: sum_j h_j (v_j - c_j)^2.

    Args:
        vectors: `[n, dim]`.
        weights: `[n, dim]`, or `[dim]` where all vectors weigh alike.
        book: `[size, dim]`.

    Returns:
        Indices `[n]` (int64) and errors `[n]`.

    >>> book = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    >>> index, error = nearest(torch.tensor([[0.0, 0.9]]), torch.tensor([1.0, 2.0]), book)
    >>> index.tolist(), round(float(error), 3)
    ([1], 0.02)
    """
    weights = weights.expand_as(vectors)
    index = torch.empty(len(vectors), dtype=torch.int64)
    error = torch.empty(len(vectors))
    square = torch.cat((-2 * book, book.square()), dim=1).t().contiguous()
    for part in _parts(len(vectors), len(book)):
        v, h = vectors[part], weights[part]
        weighed = v * h
        least, index[part] = (torch.cat((weighed, h), dim=1) @ square).min(dim=1)
        error[part] = (weighed * v).sum(dim=1) + least
    return index, error.clamp_min_(0)


def weighted_kmeans(
    vectors: Tensor,
    weights: Tensor,
    size: int,
    *,
    rng: torch.Generator,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Tensor:
    """A codebook that lowers the weighted error sum_i sum_j h_ij (v_ij - c_j)^2 of vectors to their nearest codewords.

    Lloyd's iteration: each vector goes to its nearest codeword, each codeword to the weighted mean of its vectors,
    c_j = sum_i h_ij v_ij / sum_i h_ij. It starts from vectors drawn without replacement; codewords that lose all their
    vectors move to the vectors of largest error.

    Args:
        vectors: `[n, dim]`.
        weights: `[n, dim]`, not negative.
        size: number of codewords.
        rng: draws the start.
        iterations: at most so many.
        tolerance: stops when the error falls by a smaller share of itself.

    Returns:
        The codebook `[size, dim]`; with fewer vectors than codewords, the vectors and then zeros.

    Reference: Lloyd 1982, IEEE Transactions on Information Theory 28(2).
    """
    n, dim = vectors.shape
    if n <= size:
        return torch.cat((vectors, torch.zeros(size - n, dim)))
    book = vectors[torch.randperm(n, generator=rng)[:size]].clone()
    before = torch.inf
    for _ in range(iterations):
        index, error = nearest(vectors, weights, book)
        total = float(error.double().sum())
        if total >= before * (1 - tolerance):
            break
        before = total
        mass = torch.zeros(size, dim).index_add_(0, index, weights)
        moment = torch.zeros(size, dim).index_add_(0, index, weights * vectors)
        book = torch.where(mass > 0, moment / mass.clamp_min(torch.finfo(torch.float32).tiny), book)
        empty = (torch.bincount(index, minlength=size) == 0).nonzero()[:, 0]
        if len(empty):
            book[empty] = vectors[error.topk(len(empty)).indices]
    return book


def _parts(n: int, size: int) -> Iterator[slice]:
    step = max(1, _CELLS // size)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))
