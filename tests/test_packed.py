"""Packed weights: exact bytes for every level, exact bits, minifloat grids against torch's own types, and rotations."""

from __future__ import annotations

from math import ceil, log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import UserError
from trimtab.core.level import NM, Codebook, Dense, Float, Int, Level, Plus, Rank, Shape, Sparse, parse_level, rows_cols
from trimtab.formats.bitstream import pack_bits, unpack_bits
from trimtab.formats.minifloat import encode_magnitude, magnitudes
from trimtab.formats.packed import (
    Packed,
    hadamard_blocks,
    load_scale,
    pack_codebook,
    pack_dense,
    pack_float,
    pack_int,
    pack_nm,
    pack_plus,
    pack_rank,
    pack_sparse,
    spread,
    store_scale,
    tensor_names,
)

settings.register_profile("steady", deadline=None)  # a busy machine is not a failure
settings.load_profile("steady")

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 70)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)
TEXTS = [
    *("fp32", "bf16", "fp16", "mxint8", "mxint4", "nvint4", "mxfp8", "mxfp6", "mxfp4", "nvfp4", "mxfp4/h", "nvint4/h"),
    *("4b/g64", "3b/g7", "4b/row", "8b/row/sym", "1b/g5/sym", "5b/g8/sym/h", "2b/g16/e8m0", "6b/g16/sym/e4m3"),
    *("e2m1/row", "e3m2/g6", "e1m2/g5/e8m0", "e5m2/row/e4m3", "e4m3/g16/h"),
    *("vq/d1/k2", "vq/d4/k16", "vq/d3/k8/r4", "vq/d8/k256/r16", "0%", "37.5%", "90%", "2:4", "1:4", "3:7", "5:16"),
    *("r1", "r3/bias", "4b/g64+r2", "mxfp4/h+r2/bias", "vq/d4/k16/r4+r1", "50%+r1", "2:4+r3/bias"),
]


def stored(level: Level, shape: Shape, rng: torch.Generator) -> tuple[Packed, torch.Tensor]:
    """Random stored contents at a level, and the matrix that they stand for by the level's own words."""
    rows, cols = rows_cols(shape)
    weight = torch.randn(rows, cols, generator=rng)
    if isinstance(level, Dense):
        packed = pack_dense(weight.reshape(shape), level)
        return packed, weight.to(packed.tensors["weight"].dtype).float()
    if isinstance(level, Int | Float):
        groups = 1 if level.group is None else ceil(cols / level.group)
        scale, tensors = store_scale(0.01 + torch.rand(rows, groups, generator=rng), level.scale)
        steps = spread(scale, level.group, cols)
        if isinstance(level, Int):
            codes = torch.randint(2**level.bits, (rows, cols), generator=rng)
            zero = None if level.symmetric else torch.randint(2**level.bits, (rows, groups), generator=rng)
            middle = 2 ** (level.bits - 1) if zero is None else spread(zero, level.group, cols)
            packed, value = pack_int(codes, tensors, zero, level, shape), (codes - middle) * steps
        else:
            grid, width = magnitudes(level.e, level.m), level.e + level.m
            codes, sign = (torch.randint(n, (rows, cols), generator=rng) for n in (len(grid), 2))
            packed = pack_float(codes | sign << width, tensors, level, shape)
            value = grid[codes] * (1 - 2 * sign) * steps
        return packed, hadamard_blocks(value, level.group) if level.hadamard and level.group else value
    if isinstance(level, Codebook):
        vectors, total, indices, books = ceil(cols / level.dim), 0, [], []
        for size in (level.size, level.residual):
            if size:
                indices.append(torch.randint(size, (rows, vectors), generator=rng))
                books.append(torch.randn(size, level.dim, generator=rng))
                total = total + books[-1].half().float()[indices[-1]].reshape(rows, -1)[:, :cols]
        return pack_codebook(indices, books, level, shape), total
    if isinstance(level, Sparse):
        mask = torch.rand(rows, cols, generator=rng).argsort(dim=1) < level.kept(shape) // rows
        return pack_sparse(weight, mask, level, shape), weight.half().float() * mask
    if isinstance(level, NM):
        mask = torch.zeros(rows, cols, dtype=torch.bool)
        for j in range(0, cols, level.m):
            part = torch.rand(rows, min(level.m, cols - j), generator=rng)
            mask[:, j : j + level.m] = part.argsort(dim=1).argsort(dim=1) < level.n
        return pack_nm(weight, mask, level, shape), weight.half().float() * mask
    if isinstance(level, Rank):
        left, right = torch.randn(rows, level.rank, generator=rng), torch.randn(level.rank, cols, generator=rng)
        bias = torch.randn(rows, generator=rng) if level.bias else None
        return pack_rank(left, right, bias, level, shape), left.half().float() @ right.half().float()
    assert isinstance(level, Plus)
    (base, a), (extra, b) = stored(level.base, shape, rng), stored(level.extra, shape, rng)
    return pack_plus(base, extra, level), a + b


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=12)
@given(shape=SHAPES, seed=st.integers(0, 9))
def test_bytes_names_and_values_are_those_of_the_level(text: str, shape: Shape, seed: int) -> None:
    level = parse_level(text)
    packed, expected = stored(level, shape, torch.Generator().manual_seed(seed))
    assert packed.nbytes == level.bytes(shape)
    assert set(tensor_names(level)) == set(packed.tensors) and len(tensor_names(level)) == len(packed.tensors)
    dense = packed.dense()
    assert dense.shape == shape and dense.dtype == torch.float32
    torch.testing.assert_close(dense, expected.reshape(shape), rtol=1e-5, atol=1e-5)
    bias = packed.bias()
    assert (bias is not None) == ("bias" in text)
    assert bias is None or bias.shape == shape[:1]


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=70))
def test_bits_are_exact(bits: int, values: list[int]) -> None:
    values = [v % 2**bits for v in values]
    packed = pack_bits(torch.tensor(values, dtype=torch.int64), bits)
    number = sum(v << (i * bits) for i, v in enumerate(values))
    assert packed.dtype == torch.uint8
    assert bytes(packed.tolist()) == number.to_bytes(ceil(len(values) * bits / 8), "little")
    assert unpack_bits(packed, bits, len(values)).tolist() == values


@pytest.mark.parametrize("bits", [3, 11, 16])
def test_bits_are_exact_across_chunks(bits: int) -> None:
    codes = torch.randint(2**bits, ((1 << 20) + 13,), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack_bits(pack_bits(codes, bits), bits, codes.numel()), codes.int())


def test_a_code_too_wide_is_an_error() -> None:
    with pytest.raises(AssertionError):
        pack_bits(torch.tensor([8]), 3)


@pytest.mark.parametrize(("e", "m", "dtype"), [(4, 3, torch.float8_e4m3fn), (5, 2, torch.float8_e5m2)])
def test_fp8_grids_are_torch_s(e: int, m: int, dtype: torch.dtype) -> None:
    every = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    assert torch.equal(magnitudes(e, m), every[torch.isfinite(every)])


def test_fp4_and_fp6_grids_are_the_ocp_tables() -> None:
    assert magnitudes(2, 1).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert magnitudes(3, 2).tolist() == [
        *(0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75),
        *(2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28),
    ]
    assert magnitudes(2, 3)[-1] == 7.5 and magnitudes(2, 3)[1] == 0.125
    assert magnitudes(1, 2).tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]


@pytest.mark.parametrize(("e", "m"), [(e, m) for e in range(1, 8) for m in range(8 - e)])
def test_every_grid_rises_and_holds_its_code(e: int, m: int) -> None:
    grid = magnitudes(e, m)
    assert bool((grid[1:] > grid[:-1]).all()) and grid[0] == 0
    assert torch.equal(encode_magnitude(-grid, e, m), torch.arange(len(grid)))


@settings(max_examples=40)
@given(
    st.sampled_from([(e, m) for e in range(1, 6) for m in range(8 - e)]),
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30),
)
def test_encode_picks_the_nearest(shape: tuple[int, int], shares: list[float]) -> None:
    e, m = shape
    grid = magnitudes(e, m)
    value = torch.tensor(shares) * grid[-1] * 1.2
    code = encode_magnitude(value, e, m)
    wide = (grid.double()[None, :] - value.double()[:, None]).abs()
    best = wide.min(dim=1).values
    assert torch.equal(wide.gather(1, code[:, None])[:, 0], best)
    tie = (wide == best[:, None]).sum(dim=1) > 1
    assert bool((code[tie] % 2 == 0).all())


@pytest.mark.parametrize(("e", "m", "dtype"), [(4, 3, torch.float8_e4m3fn), (5, 2, torch.float8_e5m2)])
def test_encode_rounds_as_torch_casts(e: int, m: int, dtype: torch.dtype) -> None:
    top = float(magnitudes(e, m)[-1])
    value = torch.cat((torch.rand(4000, generator=torch.Generator().manual_seed(0)) * top, torch.linspace(0, 1, 999)))
    assert torch.equal(magnitudes(e, m)[encode_magnitude(value, e, m)], value.to(dtype).float())


def test_encode_saturates() -> None:
    assert encode_magnitude(torch.tensor([1e9, -1e9, float("inf")]), 4, 3).tolist() == [126] * 3
    assert encode_magnitude(torch.tensor([7.0]), 2, 1).tolist() == [7]


@settings(max_examples=30)
@given(st.sampled_from(["f16", "e8m0", "e4m3"]), st.integers(0, 99), st.floats(-8, 4))
def test_a_stored_scale_is_read_back(kind: str, seed: int, power: float) -> None:
    scale = torch.rand(5, 3, generator=torch.Generator().manual_seed(seed)).clamp_min(1e-3) * 2.0**power
    held, tensors = store_scale(scale, kind)
    assert torch.equal(load_scale(tensors, kind), held)
    assert bool((held > 0).all())
    if kind == "f16":
        torch.testing.assert_close(held, scale, rtol=2**-11, atol=2.0**-25)
    elif kind == "e8m0":
        assert bool((held >= scale * (1 - 1e-6)).all() and (held < 2 * scale * (1 + 1e-6)).all())
        assert torch.equal(held.log2(), held.log2().round())
        assert torch.equal(store_scale(held, kind)[0], held)
    else:
        assert float(tensors["matrix_scale"]) == pytest.approx(float(scale.max()) / 448)
        normal = scale > float(tensors["matrix_scale"]) * 2**-6
        torch.testing.assert_close(held[normal], scale[normal], rtol=1 / 16 + 1e-6, atol=0)


def test_zero_weights_have_scales_that_can_be_stored() -> None:
    for kind in ("f16", "e8m0", "e4m3"):
        held, tensors = store_scale(torch.zeros(3, 2), kind)
        assert bool(torch.isfinite(held).all() and (held > 0).all())
        assert torch.equal(load_scale(tensors, kind), held)


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([None, 1, 2, 3, 4, 8]))
def test_spread_gives_each_column_its_group(rows: int, cols: int, group: int | None) -> None:
    groups = 1 if group is None else ceil(cols / group)
    values = torch.arange(rows * groups).reshape(rows, groups)
    wide = spread(values, group, cols)
    assert wide.shape == (rows, cols)
    assert all(wide[i, j] == values[i, j // (group or cols)] for i in range(rows) for j in range(cols))


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 6))
def test_hadamard_is_orthonormal_and_its_own_inverse(rows: int, cols: int, power: int) -> None:
    block = 2**power
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * cols))
    turned = hadamard_blocks(weight, block)
    torch.testing.assert_close(hadamard_blocks(turned, block), weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned @ turned.T, weight @ weight.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(turned[:, cols // block * block :], weight[:, cols // block * block :])


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_hadamard_is_sylvester_s(block: int) -> None:
    matrix = np.ones((1, 1))
    for _ in range(int(log2(block))):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    ours = hadamard_blocks(torch.eye(block), block)
    torch.testing.assert_close(ours, torch.from_numpy(matrix / block**0.5).float(), rtol=1e-6, atol=1e-6)


# ---- damage


def damaged(text: str, name: str, value: float, shape: Shape = (8, 70)) -> Packed:
    """A weight at a level with one number of a stored tensor overwritten."""
    packed, _ = stored(parse_level(text), shape, torch.Generator().manual_seed(0))
    tensors = {k: t.clone() for k, t in packed.tensors.items()}
    tensors[name].reshape(-1)[3 if tensors[name].numel() > 3 else 0] = value
    return Packed(packed.level, packed.shape, tensors)


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=5)
@given(shape=SHAPES)
def test_what_is_packed_has_no_flaw(text: str, shape: Shape) -> None:
    assert stored(parse_level(text), shape, torch.Generator().manual_seed(0))[0].flaw() is None


@pytest.mark.parametrize(
    ("text", "name", "value", "words"),
    [
        ("mxfp8", "codes", 127, "NaN or infinity in `codes` (e4m3)"),
        ("mxfp8", "codes", 255, "NaN or infinity in `codes` (e4m3)"),
        ("e5m2/g32", "codes", 0b1_11111_00, "NaN or infinity in `codes` (e5m2)"),
        ("mxfp8", "scale", 255, "NaN in `scale` (e8m0)"),
        ("nvfp4", "scale", 127, "NaN in `scale` (e4m3)"),
        ("nvfp4+r2", "scale", 200, "NaN in `scale` (e4m3)"),
        ("nvfp4", "matrix_scale", float("inf"), "infinite values in `matrix_scale`"),
        ("nvfp4", "matrix_scale", -1.7e38, "a `matrix_scale` of -1.7e+38"),
        ("nvfp4", "matrix_scale", 1e38, "a `matrix_scale` of 1e+38"),
        ("4b/g32", "scale", float("nan"), "NaN or infinite values in `scale`"),
        ("4b/g32+r2", "extra_left", float("inf"), "NaN or infinite values in `extra_left`"),
        ("vq/d4/k16", "book", float("nan"), "NaN or infinite values in `book`"),
        ("2:5", "places", 255, "places beyond 5 in `places`"),
        ("2:4", "places", 0, "not in order in `places`"),
        ("50%", "mask", 255, "where 50% keeps 280"),
        ("r4/bias", "bias", float("nan"), "NaN or infinite values in `bias`"),
        ("bf16", "weight", float("nan"), "NaN or infinite values in `weight`"),
    ],
)
def test_damage_is_seen_before_it_is_decoded(text: str, name: str, value: float, words: str) -> None:
    assert words in (damaged(text, name, value).flaw() or "")


def test_a_tensor_of_another_shape_or_type_is_seen() -> None:
    packed, _ = stored(parse_level("4b/g32"), (8, 70), torch.Generator())
    for changed in (packed.tensors["scale"].T, packed.tensors["scale"].bfloat16()):
        flaw = Packed(packed.level, packed.shape, {**packed.tensors, "scale": changed}).flaw()
        assert flaw and "`scale`, where 4b/g32 takes torch.float16 [8, 3]" in flaw


def test_a_damaged_artifact_says_which_weight_and_what_to_do(tmp_path: Path) -> None:
    from trimtab.models.artifact import open_artifact, write_artifact

    weights = {"a.weight": damaged("mxfp8", "codes", 1), "b.weight": damaged("mxfp8", "codes", 127)}
    manifest = {"task": "causal-lm", "edits": [], "source": {}}
    shapes = {name: (list(p.shape), False) for name, p in weights.items()}
    write_artifact(tmp_path / "artifact", iter(weights.items()), shapes, manifest, [])
    contents = open_artifact(tmp_path / "artifact")
    assert contents.packed["a.weight"]().dense().shape == (8, 70)
    with pytest.raises(UserError, match=r"artifact is damaged: b\.weight holds codes of NaN.*fit the model again"):
        contents.packed["b.weight"]()


@pytest.mark.parametrize("text", ["3b/g16", "4b/row/sym", "mxfp6", "nvfp4", "mxint8/h", "4b/g32+r2"])
def test_rows_are_decoded_in_tiles_as_the_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = stored(parse_level(text), (45, 33), torch.Generator().manual_seed(0))
    whole = packed.dense()
    monkeypatch.setattr("trimtab.formats.packed._TILE", 300)
    assert torch.equal(packed.dense(), whole)


@pytest.mark.parametrize("text", ["4b/g32", "3b/g64/sym", "2b/row", "nvfp4", "mxfp6", "50%", "r4", "vq/d4/k16"])
@pytest.mark.parametrize("shape", [(24, 64), (21, 70), (40, 96)])
def test_parts_and_rows_are_those_of_the_whole(text: str, shape: Shape) -> None:
    packed, _ = stored(parse_level(text), shape, torch.Generator().manual_seed(0))
    whole = packed.dense()
    for most in (1, 8 * shape[1], 9 * shape[1], 10**6):
        parts = list(packed.parts(most))
        assert [first for first, _ in parts] == [0, *torch.tensor([len(p) for _, p in parts]).cumsum(0).tolist()[:-1]]
        assert torch.equal(torch.cat([part for _, part in parts]), whole)
    rows = torch.tensor([5, 0, 5, shape[0] - 1])
    assert torch.equal(packed.take(rows), whole[rows])
