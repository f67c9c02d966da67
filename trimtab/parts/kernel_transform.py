"""Smaller kernels as learnt functions of larger ones (Cai et al. 2020, arXiv:1908.09791, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def smaller_kernel(kernel: Tensor, size: Sequence[int], matrix: Tensor) -> Tensor:
    """The middle of a kernel, times a matrix that all of its channels share: w' = M vec(middle(w)).

    Args:
        kernel: `[out, in, *larger]`.
        size: of what is wanted, no larger in any dimension.
        matrix: `[n, n]`, n the product of `size`; the identity gives the middle as it is.

    >>> import torch
    >>> smaller_kernel(torch.arange(25.0).reshape(1, 1, 5, 5), (3, 3), torch.eye(9))[0, 0, 0].tolist()
    [6.0, 7.0, 8.0]
    """
    for dim, n in enumerate(size, start=2):
        kernel = kernel.narrow(dim, (kernel.shape[dim] - n) // 2, n)
    return (kernel.flatten(2) @ matrix.T).unflatten(2, tuple(size))
