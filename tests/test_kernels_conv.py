"""Sparse convolutions in every compiled variant, beside torch's."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import variants
from torch import nn

from trimtab.core.level import Sparse
from trimtab.formats.packed import Packed, pack_sparse
from trimtab.kernels.conv import reference
from trimtab.kernels.sparse.module import SparseConv2d

TOLERANCE = 4e-6  # of the sum of magnitudes: only the order of the fp32 additions differs


def pruned(conv: nn.Conv2d, ratio: float, seed: int) -> tuple[Packed, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    weight = conv.weight.detach()
    flat = torch.rand(weight.shape, generator=rng).flatten(1)
    mask = (flat >= flat.sort(1).values[:, int(ratio * flat.shape[1])][:, None]).reshape(weight.shape)
    return pack_sparse(weight, mask, Sparse(ratio), tuple(weight.shape)), mask


@pytest.mark.parametrize("module", variants())
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_sparse_conv(module: ModuleType, data: st.DataObject) -> None:
    groups, inside, outside = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride, dilation = (data.draw(st.tuples(st.integers(1, 3), st.integers(1, 2))) for _ in range(2))
    padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in (0, 1)]
    size = data.draw(st.tuples(st.integers(least[0], 20), st.integers(least[1], 20)))
    images, ratio = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    seed = data.draw(st.integers(0, 99))
    torch.manual_seed(seed)
    where = (stride, padding, dilation, groups)
    conv = nn.Conv2d(groups * inside, groups * outside, kernel, *where, bias=seed % 2 == 0)
    x = torch.randn(images, groups * inside, *size)
    packed, mask = pruned(conv, ratio, seed)
    found = SparseConv2d(packed, conv).kernel(module, size).apply(x.numpy())
    values = packed.tensors["values"]
    bias = None if conv.bias is None else conv.bias.detach()
    keywords = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    expected = reference.sparse_conv(mask, values, bias, x, **keywords)
    room = reference.sparse_conv(mask, values.abs(), None if bias is None else bias.abs(), x.abs(), **keywords)
    assert found.shape == expected.shape
    assert ((torch.from_numpy(found) - expected).abs() <= TOLERANCE * room + 1e-30).all()


@pytest.mark.parametrize("module", variants())
def test_what_does_not_fit_is_refused(module: ModuleType) -> None:
    bits, values, one = np.full((2, 1), 255, np.uint8), np.zeros(16, np.uint16), (1, 1)
    with pytest.raises(ValueError, match="larger than the padded input"):
        module.sparse_conv(bits, values, None, 2, 1, (2, 2), one, (0, 0), one, one)
    with pytest.raises(ValueError, match="groups must divide"):
        module.sparse_conv(bits, values, None, 8, 3, one, one, (0, 0), one, one)
    with pytest.raises(ValueError, match="must be"):
        module.sparse_conv(bits, values, None, 8, 1, one, one, (0, 0), one, (4, 4)).apply(
            np.zeros((1, 8, 4, 5), np.float32)
        )
