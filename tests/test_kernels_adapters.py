"""Batches whose rows use different adapters in every compiled variant, beside plain torch."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import variants

from trimtab.kernels.dense.make import dense_weight
from trimtab.kernels.lowrank import reference

TOLERANCE = 4e-6  # of the sum of magnitudes: only the order of the fp32 additions differs


def bits(halves: torch.Tensor) -> np.ndarray:
    return halves.contiguous().numpy().view(np.uint16)


@pytest.mark.parametrize("module", variants())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_row_has_its_own_correction(module: ModuleType, data: st.DataObject) -> None:
    draw = data.draw
    cols, seed = draw(st.integers(1, 70)), draw(st.integers(0, 999))
    rows = draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))  # of matrices that are one weight
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))  # tokens of each sequence
    ranks = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    users = draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=len(counts), max_size=len(counts)))
    rng = torch.Generator().manual_seed(seed)
    table, weight = torch.randn(sum(counts), cols, generator=rng), torch.randn(sum(rows), cols, generator=rng)
    adapters = module.Adapters([(r, cols) for r in rows], 24)
    held = {}
    for number, rank in enumerate(ranks):
        parts = []
        for place, r in enumerate(rows):
            left, right = (torch.randn(n, m, generator=rng).half() for n, m in ((r, rank), (rank, cols)))
            held[number, place] = (left, right) if draw(st.booleans()) else None
            parts.append(module.low_rank(bits(left), bits(right)) if held[number, place] else None)
        adapters.put(number, parts)
    p = module.Program(sum(counts), sum(counts), len(counts), 16)
    p.adapt(adapters)
    x, y, out = p.buffer(cols), p.buffer(sum(rows)), p.buffer(sum(rows), True)
    p.embed(x, dense_weight(module, table))
    firsts = np.cumsum([0, *rows])[:-1].tolist()
    p.linear(x, y, dense_weight(module, weight), None, list(enumerate(firsts)))
    p.select(y, out)
    numbers = [np.array(n, np.int32) for n in (range(sum(counts)), range(len(counts)), [0] * len(counts), counts)]
    found = torch.from_numpy(p.run(out, *numbers, True, users).copy())
    user = [u for u, count in zip(users, counts, strict=True) for _ in range(count)]
    plain, sizes = table @ weight.T, table.abs() @ weight.abs().T
    for place, (first, r) in enumerate(zip(firsts, rows, strict=True)):
        corrections = [held[u, place] if u >= 0 else None for u in user]
        expected = reference.adapted(plain[:, first : first + r], table, corrections)
        absolute = [None if c is None else (c[0].abs(), c[1].abs()) for c in corrections]
        bound = reference.adapted(sizes[:, first : first + r], table.abs(), absolute)
        assert ((found[:, first : first + r] - expected).abs() <= TOLERANCE * bound + 1e-30).all()


@pytest.mark.parametrize("module", variants())
def test_what_does_not_fit_is_refused(module: ModuleType) -> None:
    adapters = module.Adapters([(6, 4)], 8)
    good = module.low_rank(np.zeros((6, 8), np.uint16), np.zeros((8, 4), np.uint16))
    adapters.put(3, [good])
    assert (adapters.numbers == [3] and adapters.nbytes == (16 * 8 + 8 * 4) * 2) or adapters.nbytes >= (6 + 4) * 8 * 2
    wide = module.low_rank(np.zeros((6, 9), np.uint16), np.zeros((9, 4), np.uint16))
    turned = module.low_rank(np.zeros((4, 8), np.uint16), np.zeros((8, 6), np.uint16))
    for parts in ([], [good, good], [wide], [turned]):
        with pytest.raises(ValueError):
            adapters.put(1, parts)
    with pytest.raises(ValueError):
        adapters.drop(1)
    p = module.Program(4, 4, 1, 8)
    x, y = p.buffer(4), p.buffer(12, True)
    weight = dense_weight(module, torch.zeros(6, 4))
    with pytest.raises(ValueError, match="program with adapters"):
        p.linear(x, p.buffer(6), weight, None, [(0, 0)])
    p.adapt(adapters)
    for part in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        with pytest.raises(ValueError):
            p.linear(x, p.buffer(6), weight, None, [part])
    z = p.buffer(6)
    p.embed(x, dense_weight(module, torch.ones(5, 4)))
    p.linear(x, z, weight, None, [(0, 0)])
    p.select(z, y.part(0, 6))
    numbers = [np.array(n, np.int32) for n in ([1], [0], [0], [1])]
    assert p.run(y.part(0, 6), *numbers, False, [3]).shape == (1, 6)
    for users in ([1], [3, 3]):
        with pytest.raises(ValueError):
            p.run(y.part(0, 6), *numbers, False, users)
