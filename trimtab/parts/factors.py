"""Low-rank factors of a weight: the truncated SVD, and the same with a second moment of the inputs as the metric.

Every function takes and returns tensors; the decompositions run in double precision on the smaller of the two Gram
matrices, so that a wide weight costs its short side only.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this many rows or columns the exact decomposition is faster than a randomised one.
EXACT = 512
OVERSAMPLE = 16


def truncated_svd(matrix: Tensor, rank: int, rng: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """The best approximation of a given rank in the Frobenius norm, as two factors of equal norms: W ~ L R.

    W = U S V^T, L = U_k S_k^(1/2), R = S_k^(1/2) V_k^T. With `rng`, a matrix much larger than the rank is decomposed by
    a randomised range finder with power iterations; without, always exactly.

    Args:
        matrix: W `[out, in]`.
        rank: k; beyond min(out, in) the factors are padded with zeros.
        rng: draws the test matrix of the randomised path.

    Returns:
        L `[out, rank]` and R `[rank, in]`, in the dtype of the matrix.

    Reference: Eckart and Young 1936; Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.

    >>> left, right = truncated_svd(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    >>> (left @ right).round(decimals=4)
    tensor([[3., 0.],
            [0., 0.]])
    """
    wide = matrix.double()
    short = min(wide.shape)
    if rng is not None and short > EXACT and 4 * (rank + OVERSAMPLE) < short:
        basis = _range(wide, rank + OVERSAMPLE, rng)
        small = basis.T @ wide
        left = basis @ top_eigenvectors(small @ small.T, min(rank, len(small)))
    elif wide.shape[0] <= wide.shape[1]:
        left = top_eigenvectors(wide @ wide.T, min(rank, short))
    else:
        right = top_eigenvectors(wide.T @ wide, min(rank, short)).T
        return balanced(wide @ right.T, right, rank, matrix.dtype)
    return balanced(left, left.T @ wide, rank, matrix.dtype)


def output_basis(weight: Tensor, moment: Tensor, rank: int, damp: float = 1e-6) -> Tensor:
    """Orthonormal basis U_k of the directions in which the outputs y = W x vary most.

    U_k = the leading eigenvectors of W M W^T, where M is the inputs' second moment (or covariance); U_k U_k^T W is the
    best weight of rank k for those inputs. Where W is tall, the eigenvectors come from the Gram matrix of W M^(1/2),
    which has the size of the inputs.

    Args:
        weight: W `[out, in]`.
        moment: M `[in, in]`, symmetric and positive semi-definite.
        rank: k, at most min(out, in).
        damp: share of M's mean diagonal added to it: it orders directions that no sample has seen by the weight.

    Returns:
        U_k `[out, rank]` in double precision.
    """
    w, m = weight.double(), moment.double()
    m = (m + m.T) / 2
    ridge = (damp * m.diagonal().mean()).clamp_min(torch.finfo(m.dtype).tiny)
    m = m + ridge * torch.eye(len(m), dtype=m.dtype, device=m.device)
    rows, cols = w.shape
    assert rank <= min(rows, cols), "more directions than the outputs have"
    if rows <= cols:
        return top_eigenvectors(w @ m @ w.T, rank)
    values, vectors = torch.linalg.eigh(m)
    seen = w @ (vectors * values.clamp_min(0).sqrt())
    # Dividing by the singular values would lose orthogonality in weak directions; QR keeps it, and the leading spans.
    return torch.linalg.qr(seen @ top_eigenvectors(seen.T @ seen, rank)).Q


def balanced(left: Tensor, right: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Give each component's column of `left` and row of `right` equal norms, and pad with zeros to `rank` components.

    Equal norms keep both factors far from the ends of the range of 16-bit floats.
    """
    a, b = left.norm(dim=0), right.norm(dim=1)
    tiny = torch.finfo(left.dtype).tiny
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp_min(tiny)).sqrt(), torch.ones_like(a)).clamp_min(tiny**0.5)
    left, right = left * scale, right / scale[:, None]
    extra = rank - left.shape[1]
    if extra > 0:
        left = torch.nn.functional.pad(left, (0, extra))
        right = torch.nn.functional.pad(right, (0, 0, 0, extra))
    return left.to(dtype), right.to(dtype)


def top_eigenvectors(moment: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the `rank` largest eigenvalues of a symmetric matrix, largest first: `[n, rank]`.

    The largest entry of each is positive, so that the result does not depend on how the library breaks the sign's tie.
    """
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank]
    peak = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(peak < 0, -1.0, 1.0).to(vectors.dtype)


def _range(matrix: Tensor, width: int, rng: torch.Generator) -> Tensor:
    """Orthonormal basis of the approximate range of a matrix; power iterations, for weights' spectra decay slowly."""
    test = torch.randn(matrix.shape[1], width, generator=rng, dtype=torch.float32).to(matrix)
    basis = torch.linalg.qr(matrix @ test).Q
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis
