"""What a program does between its products, in every compiled variant, beside plain torch.

A program reads its inputs from a table: token `i` is row `i` of it, so that any numbers can be put into its buffers.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_variants import variants
from torch import Tensor

from trimtab.engine.cache import Caching, PackedLayer
from trimtab.formats.cache import CacheFormat
from trimtab.kernels.attention import reference
from trimtab.kernels.dense.make import dense_weight
from trimtab.kernels.dense.reference import apply
from trimtab.kernels.step.reference import activate, norm, rotate
from trimtab.kv.kivi import KIVI

TOLERANCE = 2e-6  # fp32 sums in another order, as a share of the largest magnitude that goes into them
PACKED = 1e-3  # of the largest value: factors are rounded to 16 bits; in every variant alike, 5.4e-4 is the most seen
CACHES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Any, expected: Tensor, room: float = TOLERANCE, size: float | None = None) -> bool:
    found = found if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    size = float(expected.abs().max()) if size is None else size
    return found.shape == expected.shape and float((found - expected).abs().max()) <= room * max(size, 1e-6)


class Bench:
    """A program of one sequence whose first buffer holds rows of a table, and whose outputs are one buffer."""

    def __init__(self, module: ModuleType, table: Tensor, context: int = 1) -> None:
        self.table = table
        self.program = module.Program(len(table), len(table), 1, max(context, len(table)))
        self.x = self.program.buffer(table.shape[1])
        self.program.embed(self.x, dense_weight(module, table))

    def run(self, out: Any) -> np.ndarray:
        picked = self.program.buffer(out.width, True)
        self.program.select(out, picked)
        tokens = np.arange(len(self.table), dtype=np.int32)
        return np.array(self.program.run(picked, tokens, ints(0), ints(0), ints(len(tokens)), True))


# ---- products


@pytest.mark.parametrize("module", variants())
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 150),
    cols=st.one_of(st.integers(1, 70), st.integers(500, 1100)),
    m=st.sampled_from([1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 24, 37]),
    kind=st.sampled_from(list(CACHES.values())),
)
def test_dense(module: ModuleType, rows: int, cols: int, m: int, kind: torch.dtype) -> None:
    weight, x = random(rows, cols).to(kind), random(m, cols, seed=1)
    made = dense_weight(module, weight)
    room = apply(weight.abs(), x.abs())
    assert made.nbytes == weight.numel() * weight.element_size()
    assert ((torch.from_numpy(made.apply(x.numpy())) - apply(weight, x)).abs() <= TOLERANCE * room).all()
    assert np.array_equal(np.stack([made.row(r) for r in range(rows)]), weight.float().numpy())


@pytest.mark.parametrize("module", variants())
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_dense_with_any_number_of_threads(module: ModuleType, threads: int) -> None:
    weight, before = random(70, 33), module.threads()
    module.set_threads(threads)
    try:
        for m in (1, 4, 30):
            x = random(m, 33, seed=m)
            assert close(dense_weight(module, weight).apply(x.numpy()), apply(weight, x))
    finally:
        module.set_threads(before)


# ---- rows


@pytest.mark.parametrize("module", variants())
@settings(max_examples=30, deadline=None)
@given(
    rms=st.booleans(),
    width=st.integers(1, 70),
    groups=st.integers(1, 3),
    m=st.integers(1, 5),
    vectors=st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_norm(module: ModuleType, rms: bool, width: int, groups: int, m: int, vectors: tuple[bool, bool]) -> None:
    table = random(m, width * groups) + 0.5
    weight, bias = (random(width, seed=i + 1) if there else None for i, there in enumerate(vectors))
    bench = Bench(module, table)
    out = bench.program.buffer(table.shape[1])
    numbers = [None if v is None else v.numpy() for v in (weight, bias)]
    bench.program.norm(bench.x, out, None, rms, *numbers, 1e-3, groups)
    assert close(bench.run(out), norm(table, rms, weight, bias, 1e-3, groups), 1e-5)


@pytest.mark.parametrize("module", variants())
def test_norm_adds_first(module: ModuleType) -> None:
    table = random(3, 40)
    bench = Bench(module, table)
    left, right = bench.x.part(0, 20), bench.x.part(20, 20)
    bench.program.norm(left, right, right, True, None, None, 1e-5)
    total = table[:, :20] + table[:, 20:]
    assert close(bench.run(bench.x), torch.cat((total, norm(total, True, None, None, 1e-5)), 1), 1e-5)


@pytest.mark.parametrize("module", variants())
@pytest.mark.parametrize("heads, size, pairs", [(1, 2, 1), (3, 10, 5), (2, 64, 32), (2, 80, 10), (4, 256, 128)])
def test_rotate(module: ModuleType, heads: int, size: int, pairs: int) -> None:
    table, angle = random(7, heads * size), random(7, pairs, seed=1)
    bench = Bench(module, table)
    index = bench.program.angles(angle.cos().numpy(), angle.sin().numpy())
    bench.program.rotate(bench.x, heads, index)
    expected = rotate(table.reshape(7, heads, size), angle.cos(), angle.sin())
    assert close(bench.run(bench.x), expected.reshape(table.shape))


@pytest.mark.parametrize("module", variants())
@pytest.mark.parametrize("kind", ["none", "relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_activation(module: ModuleType, kind: str, gated: bool) -> None:
    width = 37
    table = torch.cat((torch.linspace(-90, 90, 8 * width).reshape(8, width), random(8, width) * 3))
    table = torch.cat((table, random(16, width, seed=1)), 1)
    bench = Bench(module, table)
    x, times = bench.x.part(0, width), bench.x.part(width, width)
    bench.program.activate(kind, x, times if gated else None, x)
    expected = activate(kind, table[:, :width], table[:, width:] if gated else None)
    found = bench.run(x)
    size = 1 + table[:, :width].abs() * (table[:, width:].abs() if gated else 1)
    assert ((torch.from_numpy(found) - expected).abs() <= 4e-7 * size).all()


# ---- attention


def heads_of(table: Tensor, heads: int, size: int) -> Tensor:
    return table.reshape(len(table), heads, size)


@pytest.mark.parametrize("module", variants())
@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4, 7, 50]),
    size=st.sampled_from([1, 8, 16, 40, 64, 80, 128]),
    cuts=st.sampled_from([[1], [1, 1, 1], [5], [64], [65, 1, 1], [3, 130], [200, 1]]),
    window=st.sampled_from([0, 1, 3, 70]),
    cache=st.sampled_from(list(CACHES)),
    threads=st.sampled_from([1, 2, 5]),
)
def test_attention(
    module: ModuleType, kv_heads: int, group: int, size: int, cuts: list[int], window: int, cache: str, threads: int
) -> None:
    tokens, heads = sum(cuts), kv_heads * group
    table = random(tokens, (heads + 2 * kv_heads) * size) * 2
    bench = Bench(module, table)
    p, queries, keys = bench.program, heads * size, kv_heads * size
    q, k, v = bench.x.part(0, queries), bench.x.part(queries, keys), bench.x.part(queries + keys, keys)
    index, out, picked = p.cache(kv_heads, size, cache), p.buffer(queries), p.buffer(queries, True)
    p.append(k, v, index)
    p.attend(q, out, index, size**-0.5, window)
    p.select(out, picked)
    before, found, start = module.threads(), [], 0
    module.set_threads(threads)
    try:
        for count in cuts:
            some = np.arange(start, start + count, dtype=np.int32)
            found.append(np.array(p.run(picked, some, ints(0), ints(start), ints(count), True)))
            start += count
    finally:
        module.set_threads(before)
    stored = table[:, queries:].to(CACHES[cache]).float()
    parts = (heads_of(table[:, :queries], heads, size), *(heads_of(t, kv_heads, size) for t in stored.split(keys, 1)))
    expected = reference.attend(*parts, 0, size**-0.5, window).reshape(tokens, queries)
    assert close(np.concatenate(found), expected, 1e-5, float(stored.abs().max()))


@pytest.mark.parametrize("module", variants())
def test_sequences_of_different_lengths_keep_to_themselves(module: ModuleType) -> None:
    heads, size, lengths = 2, 16, (70, 3, 1)
    tables = [random(n + 1, 3 * heads * size, seed=n) for n in lengths]
    table, width = torch.cat(tables), heads * size
    program = module.Program(100, 100, 3, 80)
    x, out, picked = program.buffer(3 * width), program.buffer(width), program.buffer(width, True)
    program.embed(x, dense_weight(module, table))
    index = program.cache(heads, size, "fp32")
    program.append(x.part(width, width), x.part(2 * width, width), index)
    program.attend(x.part(0, width), out, index, 0.25)
    program.select(out, picked)
    firsts = np.cumsum([0, *[n + 1 for n in lengths]])[:3]
    tokens = np.concatenate([np.arange(f, f + n) for f, n in zip(firsts, lengths, strict=True)]).astype(np.int32)
    # All prompts in one step, the longest last; then one more token of each.
    order = [1, 2, 0]
    chunks = [np.arange(firsts[i], firsts[i] + lengths[i]) for i in order]
    tokens = np.concatenate(chunks).astype(np.int32)
    program.run(picked, tokens, ints(*order), ints(0, 0, 0), ints(*(lengths[i] for i in order)))
    last = np.array([firsts[i] + lengths[i] for i in order], np.int32)
    found = program.run(picked, last, ints(*order), ints(*(lengths[i] for i in order)), ints(1, 1, 1))
    for row, i in zip(found, order, strict=True):
        q, k, v = (heads_of(t, heads, size) for t in tables[i].split(width, 1))
        assert close(np.array(row), reference.attend(q[-1:], k, v, lengths[i], 0.25).reshape(-1), 1e-5)


# ---- packed caches


def packed_layer(form: CacheFormat) -> PackedLayer:
    """What the cache of one sequence holds, by plain torch."""
    return PackedLayer(Caching(KIVI(form.bits, form.group, form.window), form.window).new(), 0)


@pytest.mark.parametrize("module", variants())
@settings(max_examples=40, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4, 7, 50]),
    size=st.sampled_from([1, 8, 16, 40, 64, 80, 128]),
    text=st.sampled_from(["kivi2", "kivi4", "kivi2/g64", "kivi4/g64/r64", "kivi2/g32/r64"]),
    moves=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=5),
    window=st.sampled_from([0, 1, 70]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_packed_attention(
    module: ModuleType,
    kv_heads: int,
    group: int,
    size: int,
    text: str,
    moves: list[tuple[int, int, int]],
    window: int,
    threads: int,
) -> None:
    """Two sequences that grow, in steps of up to 50 tokens, and are cut back to where they please."""
    form, heads, context = CacheFormat.parse(text), kv_heads * group, 400
    table, queries, keys = random(context, (heads + 2 * kv_heads) * size), heads * size, kv_heads * size
    table[:, queries + 1] *= 10  # a channel of keys that needs a grid of its own
    program = module.Program(50, 50, 2, context)
    x, out = program.buffer(table.shape[1]), program.buffer(queries)
    picked = program.buffer(queries, True)
    program.embed(x, dense_weight(module, table))
    index = program.cache(kv_heads, size, text)
    program.append(x.part(queries, keys), x.part(queries + keys, keys), index)
    program.attend(x.part(0, queries), out, index, size**-0.5, window)
    program.select(out, picked)
    assert program.window == form.window and program.cache_bytes == form.bytes(kv_heads, size, context, 2)
    layers, before = [packed_layer(form) for _ in range(2)], module.threads()
    module.set_threads(threads)
    try:
        for sequence, added, left in moves:
            layer = layers[sequence]
            start = layer.get_seq_length()
            for first, last in form.cuts(start, min(added, context - start), 50):
                rows = np.arange(start + first, start + last, dtype=np.int32)
                found = program.run(picked, rows, ints(sequence), ints(start + first), ints(last - first), True)
                q, k, v = table[start + first : start + last].split((queries, keys, keys), 1)
                seen = layer.update(*(heads_of(t, kv_heads, size).transpose(0, 1)[None] for t in (k, v)))
                parts = (heads_of(q, heads, size), *(t[0].transpose(0, 1) for t in seen))
                expected = reference.attend(*parts, start + first, size**-0.5, window).reshape(last - first, queries)
                assert close(np.array(found), expected, PACKED, float(parts[2].abs().max()))
            layer.crop(min(0, left - layer.get_seq_length()))
    finally:
        module.set_threads(before)


@pytest.mark.parametrize("module", variants())
def test_packed_caches_are_refused_where_they_make_no_sense(module: ModuleType) -> None:
    program = module.Program(100, 1, 1, 400)
    for text in ("kivi3", "kivi", "kivi2/g48", "kivi2/r100", "kivi2/r0", "kivi2/g32/x", "int8", "kivi2/g32/r128/g32"):
        with pytest.raises(ValueError, match=r"a cache holds|groups of|a window of"):
            program.cache(1, 8, text)
    x, picked = program.buffer(24), program.buffer(8, True)
    program.embed(x, dense_weight(module, random(4, 24)))
    index = program.cache(1, 8, "kivi2")
    with pytest.raises(ValueError, match="pack as many tokens"):
        program.cache(1, 8, "kivi2/r64")
    program.append(x.part(8, 8), x.part(16, 8), index)
    program.select(x.part(0, 8), picked)
    with pytest.raises(ValueError, match="one window of 128 tokens"):
        program.run(picked, np.zeros(100, np.int32), ints(0), ints(100), ints(100))


# ---- what the door refuses


@pytest.mark.parametrize("module", variants()[:1])
def test_what_does_not_fit_is_refused_before_it_runs(module: ModuleType) -> None:
    program = module.Program(4, 2, 2, 8)
    x, y, out = program.buffer(16), program.buffer(8), program.buffer(16, True)
    weight = dense_weight(module, random(5, 16))
    with pytest.raises(ValueError, match="5 x 16 does not take 16 channels to 8"):
        program.linear(x, y, weight)
    with pytest.raises(ValueError, match="a part lies within its slice"):
        x.part(8, 9)
    with pytest.raises(ValueError, match="row for each token"):
        program.linear(x, out.part(0, 5), weight)
    with pytest.raises(ValueError, match="width of the cache"):
        program.append(x, x, program.cache(3, 4))
    with pytest.raises(ValueError, match="no such cache"):
        program.attend(x, x, 7, 1.0)
    with pytest.raises(ValueError, match="activation is none"):
        program.activate("tanh", x, None, x)
    with pytest.raises(ValueError, match="every position"):
        program.angles(np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32))
    program.embed(x, weight)
    program.select(x, out)

    def run(tokens: list[int], sequences: list[int], starts: list[int], counts: list[int], every: bool = False) -> None:
        program.run(out, ints(*tokens), ints(*sequences), ints(*starts), ints(*counts), every)

    run([4, 0], [1, 0], [7, 0], [1, 1])
    for bad, message in [
        (([5], [0], [0], [1]), "token 5 is not among the 5"),
        (([-1], [0], [0], [1]), "token -1"),
        (([0], [2], [0], [1]), "numbered from 0 to 1"),
        (([0, 0], [1, 1], [0, 1], [1, 1]), "each at most once"),
        (([0], [0], [8], [1]), "not within the context of 8"),
        (([0], [0], [-1], [1]), "not within the context"),
        (([0, 0], [0], [0], [1]), "fewer tokens"),
        (([0, 0], [0], [0], [3]), "context|more tokens"),
        (([0] * 5, [0], [0], [5]), "between 1 and 4 tokens"),
        (([0] * 3, [0], [0], [3], True), "at most 2 tokens"),
        (([], [0], [0], [1]), "between 1 and 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*bad)
    with pytest.raises(ValueError, match="takes no more"):
        program.buffer(3)
