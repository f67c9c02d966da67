"""Levels: text that round-trips, bytes that order as they should, and hostile texts that are refused politely."""

from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.core.level import (
    NAMED,
    NM,
    Codebook,
    Dense,
    Depth,
    Float,
    Int,
    Level,
    Plus,
    Rank,
    Sparse,
    Width,
    packed_bytes,
    parse_level,
    rows_cols,
)

settings.register_profile("steady", deadline=None)  # a busy machine is not a failure
settings.load_profile("steady")

SHAPES = st.one_of(
    st.tuples(st.integers(1, 70), st.integers(1, 150)),
    st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
)
SCALES = st.sampled_from(["f16", "e8m0", "e4m3"])


@st.composite
def grouped(draw: st.DrawFn) -> Int | Float:
    """An integer or minifloat level with any group, scale and, where the group is a power of two, a rotation."""
    group = draw(st.one_of(st.none(), st.integers(1, 300), st.sampled_from([2, 4, 16, 32, 64, 128])))
    turned = draw(st.booleans()) if group is not None and not group & (group - 1) else False
    scale = draw(SCALES)
    if draw(st.booleans()):
        return Int(draw(st.integers(1, 8)), group, draw(st.booleans()), scale, turned)
    e = draw(st.integers(1, 7))
    return Float(e, draw(st.integers(0, 7 - e)), group, scale, turned)


@st.composite
def nm(draw: st.DrawFn) -> NM:
    """Any N:M pattern."""
    m = draw(st.integers(2, 256))
    return NM(draw(st.integers(1, m - 1)), m)


POWERS = st.integers(1, 16).map(lambda p: 2**p)
RANKS = st.builds(Rank, st.integers(1, 9999), st.booleans())
BASES = st.one_of(
    st.sampled_from([Dense("fp32"), Dense("bf16"), Dense("fp16")]),
    grouped(),
    st.builds(Codebook, st.integers(1, 64), POWERS, st.one_of(st.just(0), POWERS)),
    st.builds(Sparse, st.floats(0, 1, exclude_max=True)),
    nm(),
)
LEVELS: st.SearchStrategy[Level] = st.one_of(
    BASES,
    RANKS,
    st.builds(Plus, BASES, RANKS),
    st.builds(Width, st.floats(0, 1, exclude_min=True)),
    st.sampled_from([Depth(0), Depth(1)]),
)


@given(LEVELS)
def test_text_round_trips(level: Level) -> None:
    assert parse_level(str(level)) == level


@given(LEVELS)
def test_text_forgives_case_and_space(level: Level) -> None:
    assert parse_level(f"  {str(level).upper()}\n") == level


def test_every_named_level_is_its_own_text() -> None:
    for name, level in NAMED.items():
        assert str(level) == name


def test_named_formats_are_the_standard_ones() -> None:
    shape = (8, 96)
    assert parse_level("mxfp4").bytes(shape) == 8 * (96 // 2 + 96 // 32)
    assert parse_level("mxfp6").bytes(shape) == 8 * (96 * 6 // 8 + 96 // 32)
    assert parse_level("mxint8").bytes(shape) == parse_level("mxfp8").bytes(shape) == 8 * (96 + 96 // 32)
    assert parse_level("nvfp4").bytes(shape) == parse_level("nvint4").bytes(shape) == 8 * (96 // 2 + 96 // 16) + 4
    assert parse_level("mxfp4/h").bytes(shape) == parse_level("mxfp4").bytes(shape)


LONG = "9" * 5000
HOSTILE = [
    *("", " ", "b", "0b/g64", "9b/g64", "4b", "4b/g0", "4b/g-1", "4b/g6.5", "4b/g64/sym/sym", "4b/g48/h", "4b/row/h"),
    *("e0m3/g32", "e5m3/g32", "e9m0/row", "e2m1/g32/sym", "4b/g64/e5m2", "mxfp5", "bf16/h", "keep/h", "drop+r8"),
    *("w50%+r8", "r8+r8", "4b/g64+r0", "4b/g64+4b/g64", "4b/g64+r8+r8", "+r8", "4b/g64+", "r0", "r-1", "r1.5", "r"),
    *("vq/d0/k256", "vq/d4/k3", "vq/d4/k0", "vq/d4/k1", "vq/d4/k131072", "vq/d4/k256/r0", "vq/d4/k256/r3"),
    *("100%", "101%", "-1%", "%", "nan%", "inf%", "1e999%", "w0%", "w101%", "w%", "1e-9999%", "keep+r8"),
    *("0:4", "4:4", "5:4", "2:257", "2:", ":4", "\x00", "\N{ARABIC-INDIC DIGIT FOUR}b/g64", "\N{SUPERSCRIPT TWO}:4"),
    *("4b/g64\n+r8", "__import__('os')", f"4b/g{LONG}", f"r{LONG}", f"{LONG}%", f"2:{LONG}", f"vq/d{LONG}/k2"),
    *("4b/g64" + "+r1" * 3000, "(" * 5000),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t)[:24])
def test_hostile_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_level(text)
    assert len(str(refusal.value)) < 600


@given(st.one_of(st.text(max_size=40), st.text("0123456789bgrvqdkwehmx/%:+. snyfp", max_size=30)))
def test_any_text_is_a_level_or_a_user_error(text: str) -> None:
    try:
        level = parse_level(text)
    except UserError:
        return
    assert parse_level(str(level)) == level
    assert level.bytes((4, 32)) >= 0


@given(SHAPES, st.integers(1, 7), st.integers(1, 64), st.booleans(), SCALES)
def test_more_bits_cost_no_less(shape: tuple[int, ...], bits: int, group: int, symmetric: bool, scale: str) -> None:
    rows, cols = rows_cols(shape)
    low, high = (Int(b, group, symmetric, scale).bytes(shape) for b in (bits, bits + 1))
    assert high - low == packed_bytes(rows * cols, bits + 1) - packed_bytes(rows * cols, bits) >= 0


@given(SHAPES, st.integers(1, 64), st.integers(1, 64))
def test_finer_groups_cost_no_less(shape: tuple[int, ...], a: int, b: int) -> None:
    fine, coarse = sorted((a, b))
    assert Int(4, fine).bytes(shape) >= Int(4, coarse).bytes(shape) >= Int(4, None).bytes(shape)
    assert Float(2, 1, fine).bytes(shape) >= Float(2, 1, coarse).bytes(shape) >= Float(2, 1, None).bytes(shape)


@given(SHAPES, st.floats(0, 0.99), st.floats(0, 0.99))
def test_sparser_costs_no_more(shape: tuple[int, ...], a: float, b: float) -> None:
    less, more = sorted((a, b))
    assert Sparse(more).bytes(shape) <= Sparse(less).bytes(shape)
    assert Sparse(more).flops(shape) <= Sparse(less).flops(shape)


@given(SHAPES, st.integers(1, 6), st.integers(8, 16), st.integers(1, 16))
def test_more_of_anything_costs_more(shape: tuple[int, ...], n: int, m: int, power: int) -> None:
    assert NM(n, m).bytes(shape) < NM(n + 1, m).bytes(shape)
    assert Rank(n).bytes(shape) < Rank(n + 1).bytes(shape) < Rank(n + 1, bias=True).bytes(shape)
    assert Codebook(n, 2**power).bytes(shape) < Codebook(n, 2**power, 2).bytes(shape)
    if power > 1:
        assert Codebook(n, 2 ** (power - 1)).bytes(shape) < Codebook(n, 2**power).bytes(shape)
    base = Int(4, 64)
    assert Plus(base, Rank(n)).bytes(shape) == base.bytes(shape) + Rank(n).bytes(shape)
    assert Depth(0).bytes(shape) == 0 < Depth(1).bytes(shape) == Dense("bf16").bytes(shape)


@given(SHAPES, st.floats(0.01, 1), st.floats(0.01, 1))
def test_wider_costs_no_less(shape: tuple[int, ...], a: float, b: float) -> None:
    narrow, wide = sorted((a, b))
    assert Width(narrow).bytes(shape) <= Width(wide).bytes(shape) <= Dense("bf16").bytes(shape)


@given(SHAPES, grouped())
def test_grouped_bytes_count_codes_scales_and_zeros(shape: tuple[int, ...], level: Int | Float) -> None:
    """An independent count, group by group."""
    rows, cols = rows_cols(shape)
    width = level.bits if isinstance(level, Int) else 1 + level.e + level.m
    groups = len(range(0, cols, level.group or cols))
    scale = {"f16": 2, "e8m0": 1, "e4m3": 1}[level.scale]
    zero = 1 if isinstance(level, Int) and not level.symmetric else 0
    expected = ceil(rows * cols * width / 8) + rows * groups * (scale + zero) + (4 if level.scale == "e4m3" else 0)
    assert level.bytes(shape) == expected
    assert level.bits_per_weight(shape) == 8 * expected / (rows * cols)
