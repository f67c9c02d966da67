"""What a codebook weight computes, in plain torch."""

from __future__ import annotations

from torch import Tensor


def codebook(indices: list[Tensor], books: list[Tensor], x: Tensor) -> Tensor:
    """Each index brings the products of its codeword with the input's vector; several books add up.

    table_b[i, j, k] = sum_d x[i, dim j + d] books_b[k, d]
    y[i, r] = sum_b sum_j table_b[i, j, indices_b[r, j]]

    The compiled version that looks up rounds the tables of 16 vectors to 16 bits: to multiples of their largest
    magnitude / 32767.

    Args:
        indices: for each book `[rows, ceil(cols / dim)]`.
        books: for each `[size, dim]`, halves.
        x: `[m, cols]`, fp32; a short last vector is filled with zeros.

    Returns:
        `[m, rows]`, fp32.
    """
    vectors, dim = indices[0].shape[1], books[0].shape[1]
    padded = x.new_zeros(len(x), vectors * dim)
    padded[:, : x.shape[1]] = x
    total = x.new_zeros(len(x), len(indices[0]))
    for index, book in zip(indices, books, strict=True):
        table = padded.reshape(len(x), vectors, dim) @ book.float().T
        for j in range(vectors):
            total += table[:, j][:, index[:, j].long()]
    return total
