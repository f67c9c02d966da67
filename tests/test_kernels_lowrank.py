"""Low-rank weights and corrections in every compiled variant, beside plain torch."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import variants

from trimtab.core.level import Plus, Rank, Sparse
from trimtab.formats.packed import Packed, pack_plus, pack_rank, pack_sparse
from trimtab.kernels.lowrank import reference
from trimtab.kernels.weight import weight_of

TOLERANCE = 4e-6  # of the sum of magnitudes: only the order of the fp32 additions differs


def factors(rows: int, cols: int, rank: int, bias: bool, seed: int) -> Packed:
    rng = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=rng), torch.randn(rank, cols, generator=rng)
    return pack_rank(left, right, torch.randn(rows, generator=rng), Rank(rank, bias), (rows, cols))


def magnitudes(left: torch.Tensor, right: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return reference.low_rank(left.abs(), right.abs(), x.abs())


@pytest.mark.parametrize("module", variants())
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 150),
    rank=st.integers(1, 20),
    m=st.integers(1, 20),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_low_rank(module: ModuleType, rows: int, cols: int, rank: int, m: int, bias: bool, seed: int) -> None:
    packed = factors(rows, cols, rank, bias, seed)
    left, right = packed.tensors["left"], packed.tensors["right"]
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(seed + 1))
    weight = weight_of(module, [packed])
    found = torch.from_numpy(weight.apply(x.numpy()))
    assert ((found - reference.low_rank(left, right, x)).abs() <= TOLERANCE * magnitudes(left, right, x) + 1e-30).all()
    rebuilt = np.stack([weight.row(r) for r in range(rows)])
    assert np.allclose(rebuilt, packed.dense().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", variants())
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(2, 100),
    rank=st.integers(1, 12),
    m=st.sampled_from([1, 2, 5, 9, 20, 150]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_plus(module: ModuleType, rows: int, cols: int, rank: int, m: int, bias: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, cols, generator=rng).argsort(1) >= cols // 2
    base = pack_sparse(torch.randn(rows, cols, generator=rng), mask, Sparse(0.5), (rows, cols))
    extra = factors(rows, cols, rank, bias, seed)
    packed = pack_plus(base, extra, Plus(base.level, extra.level))  # type: ignore[arg-type]
    left, right = extra.tensors["left"], extra.tensors["right"]
    x = torch.randn(m, cols, generator=rng)
    weight = weight_of(module, [packed])
    found = torch.from_numpy(weight.apply(x.numpy()))
    room = TOLERANCE * (magnitudes(left, right, x) + x.abs() @ base.dense().abs().T)
    assert ((found - reference.plus(base.dense(), left, right, x)).abs() <= room + 1e-30).all()
    rebuilt = np.stack([weight.row(r) for r in range(rows)])
    assert np.allclose(rebuilt, packed.dense().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", variants())
def test_what_does_not_fit_is_refused(module: ModuleType) -> None:
    ones = np.ones((3, 3), np.uint16)
    with pytest.raises(ValueError, match="left has 3 columns"):
        module.low_rank(ones, ones[:2])
    with pytest.raises(ValueError, match="its correction 2 x 3"):
        module.plus(module.low_rank(ones, ones), module.low_rank(ones[:2].copy(), ones))
