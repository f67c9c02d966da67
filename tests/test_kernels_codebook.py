"""Codebook weights in every compiled variant, beside plain torch."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import variants

from trimtab.core.level import Codebook
from trimtab.formats.packed import Packed, pack_codebook
from trimtab.kernels.codebook import reference
from trimtab.kernels.weight import weight_of

EXACT = 4e-6  # of the sum of magnitudes: only the order of the fp32 additions differs
ROUNDED = 0.5 / 32767  # of the largest entry of a table, for each entry that is added up


def coded(rows: int, cols: int, level: Codebook, seed: int) -> tuple[Packed, list[torch.Tensor], list[torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    sizes = [k for k in (level.size, level.residual) if k]
    vectors = -(-cols // level.dim)
    indices = [torch.randint(k, (rows, vectors), generator=rng) for k in sizes]
    books = [torch.randn(k, level.dim, generator=rng).half() for k in sizes]
    return pack_codebook(indices, books, level, (rows, cols)), indices, books


@pytest.mark.parametrize("module", variants())
@settings(max_examples=80, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 80), st.sampled_from([256, 257, 300, 383, 400])),
    cols=st.integers(1, 300),
    m=st.sampled_from([1, 2, 3, 4, 5, 9, 17]),
    dim=st.integers(1, 9),
    size=st.sampled_from([2, 16, 128, 256, 1024]),
    residual=st.sampled_from([0, 0, 8, 256]),
    seed=st.integers(0, 999),
)
def test_codebook(
    module: ModuleType, rows: int, cols: int, m: int, dim: int, size: int, residual: int, seed: int
) -> None:
    packed, indices, books = coded(rows, cols, Codebook(dim, size, residual), seed)
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(seed + 1))
    weight = weight_of(module, [packed])
    found = torch.from_numpy(weight.apply(x.numpy()))
    entries = sum(i.shape[1] for i in indices)
    most = max(float(book.float().norm(dim=1).max()) for book in books) * float(
        torch.nn.functional.pad(x, (0, -cols % dim)).reshape(m, -1, dim).norm(dim=2).max()
    )
    room = EXACT * (x.abs() @ packed.dense().abs().T) + 1e-30
    room = room * (1 + len(books)) + ROUNDED * entries * most
    assert ((found - reference.codebook(indices, books, x)).abs() <= room).all()
    rebuilt = np.stack([weight.row(r) for r in range(rows)])
    assert np.array_equal(rebuilt, packed.dense().numpy())


@pytest.mark.parametrize("module", variants())
def test_rounded_tables_lose_little(module: ModuleType) -> None:
    packed, indices, books = coded(512, 1024, Codebook(4, 256, 256), 0)
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(1))
    x[:, 5] = 60.0  # an outlier coarsens the tables of its block alone
    expected = reference.codebook(indices, books, x)
    found = torch.from_numpy(weight_of(module, [packed]).apply(x.numpy()))
    assert (found - expected).norm() <= 3e-4 * expected.norm()


@pytest.mark.parametrize("module", variants())
def test_what_does_not_fit_is_refused(module: ModuleType) -> None:
    words = np.zeros((4, 2), np.uint16)
    with pytest.raises(ValueError, match="outside its codebook of 4"):
        module.codebook([np.full((3, 5), 4, np.uint16)], [words], 10)
    with pytest.raises(ValueError, match="need 5 indices a row"):
        module.codebook([np.zeros((3, 4), np.uint16)], [words], 10)
    with pytest.raises(ValueError, match="one or two codebooks"):
        module.codebook([], [], 10)
