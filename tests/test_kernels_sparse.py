"""Sparse weights in every compiled variant, beside plain torch."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import variants

from trimtab.core.level import NM, Sparse
from trimtab.formats.bitstream import unpack_bits
from trimtab.formats.packed import Packed, pack_nm, pack_sparse
from trimtab.kernels.sparse import reference
from trimtab.kernels.weight import weight_of

TOLERANCE = 2e-6  # of the sum of magnitudes: only the order of the fp32 additions differs


def sparse(rows: int, cols: int, ratio: float, seed: int) -> tuple[Packed, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=rng)
    score = torch.rand(rows, cols, generator=rng)
    mask = score >= score.sort(1).values[:, int(ratio * cols)][:, None]
    return pack_sparse(weight, mask, Sparse(ratio), (rows, cols)), mask


def nm(rows: int, cols: int, level: NM, seed: int) -> Packed:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=rng)
    groups = -(-cols // level.m)
    score = torch.nn.functional.pad(torch.rand(rows, cols, generator=rng), (0, groups * level.m - cols), value=-1.0)
    top = score.reshape(rows, groups, level.m).topk(level.n).indices
    mask = torch.zeros(rows, groups, level.m, dtype=torch.bool).scatter_(2, top, True).reshape(rows, -1)[:, :cols]
    return pack_nm(weight, mask, level, (rows, cols))


def close(found: np.ndarray, expected: torch.Tensor, dense: torch.Tensor, x: torch.Tensor) -> bool:
    room = TOLERANCE * (x.abs() @ dense.abs().T) + 1e-30
    return bool(((torch.from_numpy(found) - expected).abs() <= room).all())


@pytest.mark.parametrize("module", variants())
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 200),
    m=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 40, 129, 150]),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95]),
    seed=st.integers(0, 999),
)
def test_masked(module: ModuleType, rows: int, cols: int, m: int, ratio: float, seed: int) -> None:
    packed, mask = sparse(rows, cols, ratio, seed)
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(seed + 1))
    weight = weight_of(module, [packed])
    assert close(weight.apply(x.numpy()), reference.masked(mask, packed.tensors["values"], x), packed.dense(), x)
    rebuilt = np.stack([weight.row(r) for r in range(rows)])
    assert np.array_equal(rebuilt, packed.dense().numpy())


@pytest.mark.parametrize("module", variants())
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 200),
    m=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33]),
    level=st.sampled_from(
        [NM(2, 4), NM(1, 4), NM(3, 4), NM(1, 2), NM(4, 8), NM(2, 16), NM(9, 16), NM(2, 5), NM(1, 32)]
    ),
    seed=st.integers(0, 999),
)
def test_nm(module: ModuleType, rows: int, cols: int, m: int, level: NM, seed: int) -> None:
    packed = nm(rows, cols, level, seed)
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(seed + 1))
    weight = weight_of(module, [packed])
    values = packed.tensors["values"].reshape(rows, -1, level.n)
    width = max(1, (level.m - 1).bit_length())
    places = unpack_bits(packed.tensors["places"], width, values.numel()).reshape(values.shape)
    expected = reference.nm(values, places, level.m, x)
    assert close(weight.apply(x.numpy()), expected, packed.dense(), x)
    rebuilt = np.stack([weight.row(r) for r in range(rows)])
    assert np.array_equal(rebuilt, packed.dense().numpy())


@pytest.mark.parametrize("module", variants())
def test_what_does_not_fit_is_refused(module: ModuleType) -> None:
    bits, values = np.full((2, 2), 255, np.uint8), np.zeros(32, np.uint16)
    with pytest.raises(ValueError, match="need 1 bytes of mask"):
        module.masked(bits, values, 8)
    with pytest.raises(ValueError, match="another number"):
        module.masked(bits, values[:31], 16)
    with pytest.raises(ValueError, match="another number"):
        module.masked(bits, values, 15)
    with pytest.raises(ValueError, match="outside its group"):
        module.nm(np.zeros((1, 2), np.uint16), np.full((1, 2), 4, np.uint8), 4, 2, 4)
    with pytest.raises(ValueError, match="not a pattern"):
        module.nm(np.zeros((1, 2), np.uint16), np.zeros((1, 2), np.uint8), 5, 2, 5)
