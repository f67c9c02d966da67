"""What an input gets depends on nothing beside it: every kind of weight, in every compiled variant, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
from kernel_variants import variants

from trimtab.core.level import NM, Codebook, Dense, Plus, Rank, Sparse, parse_level
from trimtab.core.method import method
from trimtab.formats.packed import Packed, pack_codebook, pack_plus, pack_rank
from trimtab.kernels.weight import MAKERS, weight_of

ROWS, COLS = 136, 2100  # beyond the columns that any kernel takes at once, and no multiple of its lanes
COUNTS = {1: (*range(1, 41), 64, 200), 2: (2, 5, 17, 200)}  # inputs, for each number of threads
EXACT = (
    *("fp32", "bf16", "fp16", "4b/g32", "3b/g128", "8b/row", "nvfp4", "mxfp4"),
    *("2:4", "1:4", "3:4", "4:8", "2:16", "30%", "50%", "r8", "r100"),
    *(
        "vq/d4/k16",
        "vq/d4/k256",
        "vq/d8/k256",
        "vq/d8/k256/r256",
        "vq/d2/k1024",
        "4b/g32+r8",
        "50%+r8",
        "2:4+r8",
        "bf16+r8",
    ),
)
# Kinds with two ways that add in different orders, and the number of inputs from which on the second is taken: what one
# order would cost is in docs/design.md. Tables of codewords are looked up by the best variant alone.
TWO_WAYS = {"70%": 16, "90%": 6, "vq/d2/k256": 7, "vq/d4/k256/r256": 7}


def packed(text: str, rng: torch.Generator, rows: int = ROWS, cols: int = COLS) -> Packed:
    """Random weights at a level."""
    level, weight = parse_level(text), torch.randn(rows, cols, generator=rng)
    if isinstance(level, Codebook):
        sizes = [k for k in (level.size, level.residual) if k]
        indices = [torch.randint(k, (rows, -(-cols // level.dim)), generator=rng) for k in sizes]
        books = [torch.randn(k, level.dim, generator=rng) for k in sizes]
        return pack_codebook(indices, books, level, (rows, cols))
    if isinstance(level, Rank):
        return pack_rank(weight[:, : level.rank], weight[: level.rank], None, level, (rows, cols))
    if isinstance(level, Plus):
        parts = [packed(str(part), rng, rows, cols) for part in (level.base, level.extra)]
        return pack_plus(*parts, level)
    if isinstance(level, Dense):
        return Packed(
            level,
            (rows, cols),
            {
                "weight": weight.to(
                    getattr(torch, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[level.dtype])
                )
            },
        )
    return method("magnitude" if isinstance(level, Sparse | NM) else "rtn").solve(weight, level)


def alone(weight: object, x: np.ndarray) -> np.ndarray:
    return np.concatenate([weight.apply(x[i : i + 1]) for i in range(len(x))])  # type: ignore[attr-defined]


def test_no_kind_is_left_out() -> None:
    assert {type(parse_level(text)) for text in EXACT} == set(MAKERS)


@pytest.mark.parametrize("module", variants())
@pytest.mark.parametrize("text", EXACT)
def test_an_input_gets_the_same_in_any_company(module: ModuleType, text: str) -> None:
    rng = torch.Generator().manual_seed(len(text))
    weight = weight_of(module, [packed(text, rng)])
    x = torch.randn(200, COLS, generator=rng).numpy()
    before = module.threads()
    try:
        expected: dict[int, np.ndarray] = {}
        for threads, counts in COUNTS.items():
            module.set_threads(threads)
            expected[threads] = alone(weight, x if threads == 1 else x[-5:])
            assert np.array_equal(expected[threads], expected[1][-len(expected[threads]) :])
            wrong = [m for m in counts if not np.array_equal(weight.apply(x[-m:]), expected[1][-m:])]
            assert not wrong, f"with {threads} threads and {wrong} inputs"
    finally:
        module.set_threads(before)


@pytest.mark.parametrize("module", variants())
@pytest.mark.parametrize("text", TWO_WAYS)
def test_few_inputs_get_the_same_in_the_company_of_few(module: ModuleType, text: str) -> None:
    rng = torch.Generator().manual_seed(len(text))
    weight, x = weight_of(module, [packed(text, rng)]), torch.randn(64, COLS, generator=rng).numpy()
    expected, many = alone(weight, x), weight.apply(x)
    for m in range(1, TWO_WAYS[text]):
        assert np.array_equal(weight.apply(x[:m]), expected[:m])
    two = text.endswith("%") or module.__name__.endswith("_vnni")
    assert np.array_equal(many, expected) != two, "there is one way now: it belongs to those that are exact"
    assert np.allclose(many, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("module", variants())
@pytest.mark.parametrize("text", ["fp32", "fp16", "bf16", "kivi4/g32/r64"])
def test_attention_gives_the_same_however_a_text_is_cut_and_what_runs_beside_it(module: ModuleType, text: str) -> None:
    heads, group, size, length = 2, 3, 24, 150
    queries, keys = heads * group * size, heads * size
    table = torch.randn(2 * length, queries + 2 * keys, generator=torch.Generator().manual_seed(0))

    def read(ends: Sequence[int], beside: bool) -> np.ndarray:
        program = module.Program(2 * length, 2 * length, 2, length)
        x, out, picked = program.buffer(table.shape[1]), program.buffer(queries), program.buffer(queries, True)
        program.embed(x, weight_of(module, [table]))
        index = program.cache(heads, size, text)
        program.append(x.part(queries, keys), x.part(queries + keys, keys), index)
        program.attend(x.part(0, queries), out, index, size**-0.5)
        program.select(out, picked)
        found, first = [], 0
        for last in ends:
            rows, sequences = [np.arange(first, last, dtype=np.int32)], [0]
            if beside:
                rows, sequences = [rows[0] + np.int32(length), *rows], [1, *sequences]
            counts, starts = ([n] * len(rows) for n in (last - first, first))
            given = (np.array(n, np.int32) for n in (sequences, starts, counts))
            found.append(np.array(program.run(picked, np.concatenate(rows), *given, True))[first - last :])
            first = last
        return np.concatenate(found)

    before = module.threads()
    try:
        module.set_threads(1)
        expected = read(range(1, length + 1), False)
        for threads in (1, heads):  # with more threads than heads of keys a text's keys are divided
            module.set_threads(threads)
            for ends in ((64, 128, length), (1, 40, 64, 100, 128, 149, length)):
                for beside in (False, True):
                    assert np.array_equal(read(ends, beside), expected), (threads, ends, beside)
    finally:
        module.set_threads(before)
