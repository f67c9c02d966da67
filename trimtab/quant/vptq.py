"""VPTQ: vectors of weights as indices into codebooks, chosen with second-order compensation."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import pad

from trimtab.core.errors import UserError
from trimtab.core.level import Codebook
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed, pack_codebook
from trimtab.parts.clusters import nearest, weighted_kmeans
from trimtab.parts.sweep import obs_sweep


@dataclass(frozen=True)
class VPTQ(Solver):
    """Vector quantisation under a second-order objective: tr(dW H dW^T) with H = gram.

    The codebook starts as Hessian-weighted k-means, min sum h_jj (w_j - c_j)^2. Then the columns are taken in order,
    `dim` of them at a time: each vector v goes to the codeword C that adds least to the objective,
    ||(v - C) U_JJ^-1||^2 with H^-1 = U^T U, and its error is spread onto the columns to come. A residual codebook is
    k-means over the errors of that sweep, and a second sweep uses both.

    Args:
        damp: share of the mean diagonal of H added for stability (paper's code: 0.01).
        iterations: k-means iterations at most (paper's code: 100).
        sample: vectors that k-means sees at most; 32 for each codeword where that is more.

    Reference: Liu et al. 2024, arXiv:2409.17066, algorithm 1, section 3.2.1 (centroids) and 3.2.2 (residual).
    Departures: vectors lie along the inputs, as the level stores them; the paper's lie along the outputs, which decides
        columns one by one under a Euclidean distance. Here `dim` columns are decided together under the exact metric
        U_JJ^-1. No codebook for outlier columns, no permutation and no column norms, for which the level has no
        place; no fine-tuning afterwards. K-means sees a sample and stops when its error falls by less than 0.01 %.

    >>> rng = torch.Generator().manual_seed(0)
    >>> weight, x = torch.randn(32, 64, generator=rng), torch.randn(256, 64, generator=rng)
    >>> packed = VPTQ().solve(weight, Codebook(4, 16), gram=x.T @ x / 256, rng=rng)
    >>> packed.nbytes == Codebook(4, 16).bytes((32, 64))
    True
    """

    damp: float = 0.01
    iterations: int = 30
    sample: int = 1 << 16

    card = Card(
        "vptq",
        catalogue=(345,),
        paper="arXiv:2409.17066",
        claim="At about two bits a weight, codebooks counted, perplexity is below GPTQ's and plain k-means codebooks'.",
        requires=frozenset({"float"}),
        leaves=frozenset({"codebook"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("vq/d4/k16", "vq/d4/k256", "vq/d4/k256/r16", "vq/d4/k256/r256"),
        kinds=frozenset({"linear", "conv", "head"}),
    )

    def solve(self, weight: Tensor, level: Codebook, *, gram: Tensor, rng: torch.Generator) -> Packed:
        """Codebooks and indices of the weight `[out, in]`.

        Raises:
            UserError: the level is not a codebook.
        """
        if not isinstance(level, Codebook):
            raise UserError(f"vptq was asked for {level}, which is not a codebook: take a level like vq/d4/k256")
        weight = weight.float()
        importance = gram.diagonal() + self.damp * gram.diagonal().mean()
        books: list[Tensor] = []
        indices: list[Tensor] = []
        error = weight
        for size in filter(None, (level.size, level.residual)):
            books.append(self._codebook(error, importance, level.dim, size, rng))
            indices, error = self._sweep(weight, gram, books)
        return pack_codebook(indices, books, level, tuple(weight.shape))

    def _codebook(self, weight: Tensor, importance: Tensor, dim: int, size: int, rng: torch.Generator) -> Tensor:
        """Hessian-weighted k-means over the vectors of a matrix, rounded to the 16 bits that are stored."""
        fill = -weight.shape[1] % dim
        vectors = pad(weight, (0, fill)).reshape(-1, dim)
        weights = pad(importance, (0, fill)).reshape(-1, dim)
        seen = torch.randperm(len(vectors), generator=rng)[: max(self.sample, 32 * size)]
        book = weighted_kmeans(vectors[seen], weights[seen % len(weights)], size, rng=rng, iterations=self.iterations)
        return book.half().float()

    def _sweep(self, weight: Tensor, gram: Tensor, books: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Indices `[out, vectors]` into each codebook, and what they leave of the compensated weight."""
        dim = books[0].shape[1]
        indices = [torch.empty(len(weight), ceil(weight.shape[1] / dim), dtype=torch.int64) for _ in books]
        error = torch.empty_like(weight)

        def choose(columns: Tensor, j: int, u: Tensor) -> Tensor:
            k = columns.shape[1]
            metric, left = torch.linalg.inv(u), columns
            for book, index in zip(books, indices, strict=True):
                picked = nearest(left @ metric, torch.ones(k), book[:, :k] @ metric)[0]
                index[:, j // dim] = picked
                left = left - book[picked, :k]
            error[:, j : j + k] = left
            return columns - left

        obs_sweep(weight, gram, choose, step=dim, damp=self.damp)
        return indices, error
