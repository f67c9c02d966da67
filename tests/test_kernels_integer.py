"""Grouped integers: every compiled variant against plain torch, over levels and odd shapes."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.level import Float, Int, parse_level
from trimtab.formats.packed import Packed
from trimtab.kernels.integer.pack import grouped
from trimtab.kernels.integer.reference import Spans, exact_step, integers, linear, quantise
from trimtab.kernels.native import VARIANTS
from trimtab.parts.grids import grid_for

TOLERANCE = 2e-6  # of the sum of the products' magnitudes: fp32 sums over the groups, in another order


def variants() -> list[str]:
    try:
        plain = importlib.import_module("trimtab.kernels._generic")
    except ModuleNotFoundError:
        return []
    return [v for v in VARIANTS if v in {"generic", *plain.features()}]


@pytest.fixture(params=variants() or [pytest.param(None, marks=pytest.mark.skip("no kernels were compiled"))])
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"trimtab.kernels._{request.param}")


def packed_of(level: Int | Float, rows: int, cols: int, seed: int = 0) -> Packed:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.1
    grid = grid_for(weight, level)
    return grid.pack(grid.round(weight)[0], (rows, cols))


def inputs(m: int, cols: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(m, cols, generator=torch.Generator().manual_seed(seed + 1))
    x[:, :: max(1, cols // 5)] *= 20
    return x


def check(module: ModuleType, packed: Packed, m: int) -> None:
    rows, cols = packed.shape
    weight = grouped(module, [packed])
    x = inputs(m, cols)
    y = torch.from_numpy(weight.apply(x.numpy()))
    bound = x.abs() @ packed.dense().abs().T + 1e-30
    level = packed.level
    assert isinstance(level, Int | Float)
    if level.hadamard:
        bound = bound.amax(1, keepdim=True) * cols**0.5
    assert ((y - linear(packed, x)).abs() / bound).max() < TOLERANCE
    for r in {0, rows // 2, rows - 1}:
        assert torch.equal(torch.from_numpy(weight.row(r)), packed.dense()[r])


LEVELS = [
    *(f"{bits}b/{group}{sym}" for bits in range(1, 9) for group in ("g32", "g128", "row") for sym in ("", "/sym")),
    *("4b/g16", "3b/g16", "2b/g8/sym", "5b/g5", "4b/g20", "4b/g256", "3b/g300", "6b/g512/sym", "1b/g1", "8b/g257"),
    *("mxint8", "mxint4", "nvint4", "mxfp4", "nvfp4", "mxfp6", "e2m0/g32", "e3m0/g64", "e2m2/row", "e2m4/g128"),
    *("e1m2/g64", "e1m6/g32", "4b/g32/h", "8b/g128/sym/h", "nvfp4/h", "4b/g512/h", "mxint8/h", "2b/g64/e8m0"),
]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level(module: ModuleType, level: str) -> None:
    parsed = parse_level(level)
    assert isinstance(parsed, Int | Float)
    for rows, cols, m in ((32, 512, 1), (48, 768, 7), (33, 650, 41)):
        check(module, packed_of(parsed, rows, cols), m)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([v for v in variants()] or ["none"]),
    *(st.integers(1, 8), st.none() | st.integers(1, 400), st.booleans(), st.sampled_from(["f16", "e8m0", "e4m3"])),
    *(st.integers(1, 70), st.integers(1, 700), st.integers(1, 60)),
)
def test_odd_shapes(
    variant: str, bits: int, group: int | None, symmetric: bool, scale: str, rows: int, cols: int, m: int
) -> None:
    if variant == "none":
        pytest.skip("no kernels were compiled")
    module = importlib.import_module(f"trimtab.kernels._{variant}")
    check(module, packed_of(Int(bits, group, symmetric, scale), rows, cols), m)


@pytest.mark.parametrize("m", [2, 17, 50])
@pytest.mark.parametrize("level", ["4b/g64", "3b/g16", "8b/row"])
def test_wide_rows(module: ModuleType, level: str, m: int) -> None:
    """More columns than are expanded at once."""
    parsed = parse_level(level)
    assert isinstance(parsed, Int | Float)
    check(module, packed_of(parsed, 37, 4500), m)


def test_timing_runs(module: ModuleType) -> None:
    weights = [grouped(module, [packed_of(Int(4, 32), 20, 96, seed)]) for seed in range(2)]
    assert len(module.seconds(weights, inputs(3, 96).numpy(), 5)) == 5
    with pytest.raises(ValueError, match="differ in their columns"):
        module.seconds(weights, inputs(3, 95).numpy(), 5)


@pytest.mark.parametrize("level", ["4b/g64", "3b/g32/sym", "nvfp4", "5b/row"])
def test_parts_are_stacked(module: ModuleType, level: str) -> None:
    parsed = parse_level(level)
    assert isinstance(parsed, Int | Float)
    parts = [packed_of(parsed, rows, 150, seed) for seed, rows in enumerate((33, 5, 18))]
    x = inputs(4, 150)
    y = torch.from_numpy(grouped(module, parts).apply(x.numpy()))
    alone = torch.cat([torch.from_numpy(grouped(module, [p]).apply(x.numpy())) for p in parts], 1)
    assert torch.equal(y, alone)


def test_extreme_codes_do_not_saturate(module: ModuleType) -> None:
    """All inputs at 127 and all codes at their ends: the sums of pairs that narrow instructions keep in 16 bits."""
    for bits in range(1, 9):
        packed = packed_of(Int(bits, 64, True), 16, 128)
        for byte in (0, 255):
            full = Packed(
                packed.level, packed.shape, {**packed.tensors, "codes": torch.full_like(packed.tensors["codes"], byte)}
            )
            for x in (torch.ones(13, 128), -torch.ones(1, 128)):
                y = torch.from_numpy(grouped(module, [full]).apply(x.numpy()))
                assert torch.allclose(y, linear(full, x), rtol=1e-5)
    for level in (Float(3, 0, 64), Float(2, 4, 64)):
        full = packed_of(level, 16, 128)
        value = torch.full((16, 128), 1000.0)
        grid = grid_for(value, level)
        full = grid.pack(grid.round(value)[0], (16, 128))
        y = torch.from_numpy(grouped(module, [full]).apply(torch.ones(2, 128).numpy()))
        assert torch.allclose(y, linear(full, torch.ones(2, 128)), rtol=1e-5)


def test_special_inputs(module: ModuleType) -> None:
    """Zeros give zeros; a NaN reaches its row's outputs and no other row's; tiny inputs stay in range."""
    packed = packed_of(Int(4, 32), 20, 96)
    weight = grouped(module, [packed])
    x = inputs(3, 96)
    x[0] = 0
    x[1, 5] = float("nan")
    y = torch.from_numpy(weight.apply(x.numpy()))
    assert (y[0] == 0).all() and y[1].isnan().all() and not y[2].isnan().any()
    tiny = torch.full((1, 96), 190 * 2.0**-149)
    assert (torch.from_numpy(weight.apply(tiny.numpy())) - linear(packed, tiny)).abs().max() < 1e-40


def test_which_minifloats_are_integers() -> None:
    exact = {(e, m) for e in range(1, 6) for m in range(0, 7) if 1 + e + m <= 8 and exact_step(e, m) is not None}
    assert exact == {*((1, m) for m in range(7)), *((2, m) for m in range(5)), (3, 0)}


@given(st.integers(1, 900), st.none() | st.integers(1, 900))
def test_spans_hold_every_column_once(cols: int, group: int | None) -> None:
    spans = Spans.of(cols, group)
    places = spans.places(cols)
    assert sorted(places[places < cols].tolist()) == list(range(cols))
    assert spans.block % 4 == 0 and spans.join * spans.block <= 256
    first = places[..., :1].expand_as(places)
    assert ((places // spans.group == first // spans.group) | (places == cols)).all()


def test_the_reference_is_the_equation() -> None:
    packed, x = packed_of(Int(4, 64), 8, 192), torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    weight, s_w = integers(packed)
    y = torch.zeros(5, 8, dtype=torch.float64)
    for g in range(3):
        here = slice(64 * g, 64 * g + 64)
        q, s_x = quantise(x[:, here])
        y += s_x * s_w[:, g] * (q.double() @ weight[:, here].double().T)
    assert torch.allclose(linear(packed, x).double(), y, rtol=1e-5, atol=1e-6)
    assert float((y - x @ packed.dense().T).norm() / y.norm()) < 0.02


def test_what_does_not_fit_is_refused(module: ModuleType) -> None:
    packed = packed_of(Int(4, 32), 4, 64)
    assert grouped(module, [packed_of(Float(4, 3, 32), 4, 64)]) is None
    assert grouped(module, [packed, packed_of(Int(4, 32), 4, 96)]) is None
    short = Packed(packed.level, packed.shape, {**packed.tensors, "codes": packed.tensors["codes"][:-1]})
    with pytest.raises(ValueError, match="4 rows of 64 codes of 4 bits do not fill 127 bytes"):
        grouped(module, [short])
    with pytest.raises(ValueError, match="has 64 columns"):
        grouped(module, [packed]).apply(inputs(1, 65).numpy())


@pytest.mark.parametrize("level", ["4b/g32", "4b/g32/sym", "2b/g64", "3b/g128", "8b/g128", "4b/g200"])
def test_an_output_depends_on_its_own_inputs_alone(level: str, module: ModuleType) -> None:
    for rows, cols in ((40, 512), (33, 5000)):
        found = parse_level(level)
        assert isinstance(found, Int)
        weight, x = grouped(module, [packed_of(found, rows, cols)]), inputs(70, cols).numpy()
        alone = torch.cat([torch.from_numpy(weight.apply(x[i : i + 1])) for i in range(70)])
        for count in (2, 5, 8, 31, 33, 47, 70):
            assert torch.equal(torch.from_numpy(weight.apply(x[:count])), alone[:count])
