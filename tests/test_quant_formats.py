"""Block formats, minifloats, MR-GPTQ and VPTQ against slow implementations written another way."""

from __future__ import annotations

from math import ceil, log2, log10

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Codebook, Float, Int, parse_level
from trimtab.formats.packed import hadamard_blocks
from trimtab.parts.clusters import nearest, weighted_kmeans
from trimtab.parts.grids import grid_for
from trimtab.quant.blockformat import BlockFormat
from trimtab.quant.minifloat import Minifloat
from trimtab.quant.mr_gptq import MRGPTQ
from trimtab.quant.rtn import RTN
from trimtab.quant.vptq import VPTQ

FORMATS = ["mxint8", "mxfp8", "mxfp6", "mxfp4", "mxint4", "nvfp4", "nvint4"]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
VALUES = {
    "mxint8": list(range(128)),
    "mxint4": list(range(8)),
    "nvint4": list(range(8)),
    "mxfp8": torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist(),
    "mxfp6": [0.125 * i for i in range(8)] + [1 + 0.125 * i for i in range(8)] + [2 + 0.25 * i for i in range(8)]
    + [4 + 0.5 * i for i in range(8)],
    "mxfp4": E2M1,
    "nvfp4": E2M1,
}  # fmt: skip


def problem(rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, the gram of correlated inputs whose sizes differ by column, and their mean."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=rng) * (0.5 * torch.randn(rows, cols, generator=rng)).exp()
    mixed = torch.randn(2048, cols // 4 + 1, generator=rng) @ torch.randn(cols // 4 + 1, cols, generator=rng)
    x = mixed / (cols / 4) ** 0.5 + 0.5 * torch.randn(2048, cols, generator=rng)
    x = x.relu() * (0.5 * torch.randn(cols, generator=rng)).exp()
    return weight, x.T @ x / 2048, x.mean(dim=0)


def loss(weight: Tensor, quantised: Tensor, gram: Tensor) -> float:
    """tr(dW G dW^T), as a share of that of the weight."""
    d = (quantised - weight).double()
    w, g = weight.double(), gram.double()
    return float(((d @ g) * d).sum() / ((w @ g) * w).sum())


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- block formats


def cast_slowly(weight: Tensor, name: str) -> Tensor:
    """Each block, each number, one after another, in double precision."""
    values = VALUES[name]
    block = 16 if name.startswith("nv") else 32
    matrix = torch.tensor(float(weight.abs().max()) / values[-1] / 448, dtype=torch.float32)
    out = torch.zeros_like(weight)
    for i, row in enumerate(weight.tolist()):
        for j in range(0, len(row), block):
            part = row[j : j + block]
            scale = max(map(abs, part)) / values[-1]
            if name.startswith("nv"):
                scale = float((torch.tensor(scale) / matrix).to(torch.float8_e4m3fn).float() * matrix)
            else:
                scale = 2.0 ** ceil(log2(scale))
            for k, w in enumerate(part):
                best = min(values, key=lambda v: abs(abs(w) / scale - v))
                out[i, j + k] = best * scale * (1 if w > 0 else -1)
    return out


@pytest.mark.parametrize("cols", [64, 70, 7])
@pytest.mark.parametrize("name", FORMATS)
def test_a_cast_is_the_nearest_value_under_the_block_s_scale(name: str, cols: int) -> None:
    weight = problem(5, cols)[0]
    packed = BlockFormat().solve(weight, parse_level(name))
    torch.testing.assert_close(packed.dense(), cast_slowly(weight, name), rtol=1e-6, atol=1e-7)
    turned = BlockFormat().solve(weight, parse_level(f"{name}/h"))
    block = parse_level(name).group
    expected = hadamard_blocks(cast_slowly(hadamard_blocks(weight, block), name), block)
    torch.testing.assert_close(turned.dense(), expected, rtol=1e-5, atol=1e-6)


def test_symmetric_clipping_uses_no_lower_code_than_the_highest() -> None:
    """A scale that FP8 rounds down leaves its block's largest weight beyond 127 steps."""
    weight = -torch.rand(64, 64, generator=rng()) - 0.1
    level = parse_level("8b/g16/sym/e4m3")
    both = [BlockFormat(symmetric_clip=clip).solve(weight, level) for clip in (True, False)]
    assert [int(p.tensors["codes"].min()) for p in both] == [1, 0]


@pytest.mark.parametrize("name", ["nvint4", "mxint8"])
def test_noise_is_what_the_paper_s_theorem_says(name: str) -> None:
    """Theorem 1: 4.78 + 6.02 b - 20 log10(rho) - 20 log10(kappa) dB, and 10 log10(g / (g - 1)) more for e4m3 scales."""
    level = parse_level(name)
    assert isinstance(level, Int) and level.group
    weight = torch.randn(256, 512, generator=rng())
    blocks = weight.reshape(-1, level.group)
    kappa = blocks.abs().amax(1) / blocks.square().mean(1).sqrt()
    decibels = 4.78 + 6.02 * level.bits - 20 * log10(float(kappa.mean()))
    if level.scale == "e4m3":
        decibels += 10 * log10(level.group / (level.group - 1))
    else:
        scale = blocks.abs().amax(1) / 127
        decibels -= 20 * log10(float((2 ** scale.log2().ceil() / scale).square().mean().sqrt()))
    error = (BlockFormat().solve(weight, level).dense() - weight).square().sum() / weight.square().sum()
    assert -10 * log10(float(error)) == pytest.approx(decibels, abs=1.5)


def test_rotation_evens_out_a_block_with_an_outlier() -> None:
    weight = torch.randn(32, 128, generator=rng())
    weight[:, ::32] *= 20
    for name in ("mxint4", "nvint4", "mxint8"):
        plain, turned = (BlockFormat().solve(weight, parse_level(name + end)).dense() for end in ("", "/h"))
        assert float((turned - weight).norm()) < 0.8 * float((plain - weight).norm())


# ---- MR-GPTQ


@pytest.mark.parametrize("text", ["mxfp4", "mxfp4/h", "nvfp4", "nvfp4/h", "nvint4/h", "mxint4/h"])
def test_mr_gptq_is_nearer_than_rounding_and_than_its_own_parts(text: str) -> None:
    weight, gram, _ = problem(48, 160)
    level = parse_level(text)
    full, unfitted, plain = (
        loss(weight, method.solve(weight, level, gram=gram).dense(), gram)
        for method in (MRGPTQ(), MRGPTQ(rule="minmax"), MRGPTQ(rule="minmax", reorder=False))
    )
    rounded = loss(weight, RTN().solve(weight, level).dense(), gram)
    fitted = loss(weight, RTN(rule="mse").solve(weight, level).dense(), gram)
    assert full < 0.7 * fitted and full < 0.7 * rounded
    assert full < plain < rounded
    assert full < 1.02 * unfitted


def test_rotation_helps_mxfp4_and_hurts_the_rounding_of_nvfp4() -> None:
    weight, gram, _ = problem(64, 256)

    def of(text: str) -> float:
        return loss(weight, MRGPTQ().solve(weight, parse_level(text), gram=gram).dense(), gram)

    def cast(text: str) -> float:
        return float((RTN().solve(weight, parse_level(text)).dense() - weight).norm())

    assert of("mxfp4/h") < of("mxfp4")
    assert of("mxfp4/h") - of("nvfp4/h") < of("mxfp4") - of("nvfp4")
    assert cast("mxfp4/h") < cast("mxfp4") and cast("nvfp4/h") > cast("nvfp4")


def test_the_sweep_is_obs_with_scales_fixed_and_the_largest_inputs_first() -> None:
    """Optimal brain surgery written out: the inverse of what is left, one column after another."""
    weight, gram, _ = problem(6, 40)
    level = parse_level("nvfp4")
    method = MRGPTQ(rounds=0)
    packed = method.solve(weight, level, gram=gram)
    grid = grid_for(weight, level, rule="mse")
    h = (gram + method.damp * gram.diagonal().mean() * torch.eye(40)).double()
    left, w, q = gram.diagonal().argsort(descending=True).tolist(), weight.double(), torch.zeros(6, 40)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        q[:, j] = grid.round(w[:, j : j + 1].float(), j)[1][:, 0]
        w[:, left] -= torch.outer((w[:, j] - q[:, j]) / inverse[0, 0], inverse[0])
        left = left[1:]
    torch.testing.assert_close(packed.dense(), q, rtol=1e-5, atol=1e-6)


def test_turns_of_the_two_scales_only_lower_the_error() -> None:
    weight = problem(32, 128)[0]
    level = parse_level("nvfp4")
    errors = []
    for rounds in range(4):
        grid = grid_for(weight, level, rule="mse")
        MRGPTQ(rounds=rounds)._take_turns(grid, weight)
        errors.append(float((grid.round(weight)[1] - weight).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < float((RTN().solve(weight, level).dense() - weight).square().sum())


# ---- k-means and VPTQ


def test_nearest_is_the_nearest() -> None:
    v, h, book = (
        torch.randn(300, 3, generator=rng()),
        torch.rand(300, 3, generator=rng(1)),
        torch.randn(17, 3, generator=rng(2)),
    )
    index, error = nearest(v, h, book)
    table = ((v[:, None] - book[None]).double().square() * h[:, None]).sum(2)
    assert torch.equal(index, table.argmin(1))
    torch.testing.assert_close(error, table.min(1).values.float(), rtol=1e-4, atol=1e-5)


def test_k_means_lowers_the_weighted_error_and_ends_at_weighted_means() -> None:
    v, h = torch.randn(2000, 4, generator=rng()), torch.rand(2000, 4, generator=rng(1)) ** 4
    books = [weighted_kmeans(v, h, 32, rng=rng(), iterations=n, tolerance=0) for n in (1, 2, 4, 8, 16, 200)]
    errors = [float(nearest(v, h, book)[1].sum()) for book in books]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    index = nearest(v, h, books[-1])[0]
    for i, codeword in enumerate(books[-1]):
        mine = index == i
        mean = (v[mine] * h[mine]).sum(0) / h[mine].sum(0)
        torch.testing.assert_close(codeword, mean, rtol=1e-3, atol=1e-4)
    blind = weighted_kmeans(v, torch.ones_like(h), 32, rng=rng(), tolerance=0)
    assert errors[-1] < 0.95 * float(nearest(v, h, blind)[1].sum())


def test_k_means_uses_every_codeword() -> None:
    v = torch.cat((torch.zeros(500, 2), torch.arange(20.0).repeat_interleave(2).reshape(20, 2)))
    book = weighted_kmeans(v, torch.ones_like(v), 16, rng=rng())
    assert len(set(nearest(v, torch.ones(2), book)[0].tolist())) >= 14
    assert torch.equal(weighted_kmeans(v[-3:], torch.ones(3, 2), 8, rng=rng())[:3], v[-3:])


@pytest.mark.parametrize("text", ["vq/d4/k16", "vq/d2/k16", "vq/d4/k64/r16", "vq/d8/k64"])
def test_vptq_is_nearer_than_k_means_at_the_same_level(text: str) -> None:
    weight, gram, _ = problem(96, 128)
    level = parse_level(text)
    assert isinstance(level, Codebook)
    packed = VPTQ().solve(weight, level, gram=gram, rng=rng())
    vectors, left = weight.reshape(-1, level.dim), torch.zeros(())
    for size in filter(None, (level.size, level.residual)):
        rest = vectors - left
        book = weighted_kmeans(rest, torch.ones_like(rest), size, rng=rng())
        left = left + book[nearest(rest, torch.ones(level.dim), book)[0]]
    assert loss(weight, packed.dense(), gram) < 0.6 * loss(weight, left.reshape(96, 128), gram)


def test_a_residual_codebook_lowers_the_error() -> None:
    weight, gram, _ = problem(96, 128)
    errors = [
        loss(weight, VPTQ().solve(weight, parse_level(t), gram=gram, rng=rng()).dense(), gram)
        for t in ("vq/d4/k32", "vq/d4/k32/r4", "vq/d4/k32/r32")
    ]
    assert errors[2] < errors[1] < errors[0]


def test_with_uncorrelated_inputs_vptq_takes_the_nearest_codeword() -> None:
    weight = problem(16, 22)[0]
    packed = VPTQ().solve(weight, Codebook(4, 16), gram=torch.eye(22), rng=rng())
    book = packed.tensors["book"].float()
    for j in range(0, 22, 4):
        part = weight[:, j : j + 4]
        best = torch.cdist(part.double(), book[:, : part.shape[1]].double()).argmin(1)
        assert torch.equal(packed.dense()[:, j : j + 4], book[best, : part.shape[1]])


def test_vptq_depends_on_nothing_but_its_generator() -> None:
    weight, gram, _ = problem(24, 50)
    level = Codebook(4, 32, 8)
    once, twice = (VPTQ().solve(weight, level, gram=gram, rng=rng(5)).tensors for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


# ---- minifloats


@pytest.mark.parametrize("text", ["e1m1/row", "e2m1/row", "e2m1/g7", "e3m2/g16", "e4m3/row", "e2m1/g8/h"])
def test_without_correction_minifloats_round_to_nearest(text: str) -> None:
    weight, gram, mean = problem(6, 24)
    level = parse_level(text)
    plain = Minifloat(rule="minmax", correct=False).solve(weight, level, gram=gram, mean=mean)
    assert torch.equal(plain.dense(), RTN().solve(weight, level).dense())


@pytest.mark.parametrize("text", ["e1m1/row", "e2m1/row", "e2m1/g7", "e3m2/g16", "e2m1/g8/h"])
def test_correction_takes_the_mean_error_away_and_lowers_the_loss(text: str) -> None:
    weight, gram, mean = problem(40, 64)
    level = parse_level(text)
    off, on = (Minifloat(correct=c).solve(weight, level, gram=gram, mean=mean).dense() for c in (False, True))
    assert float(((on - weight) @ mean).abs().mean()) < 0.25 * float(((off - weight) @ mean).abs().mean())
    assert loss(weight, on, gram) < loss(weight, off, gram)


def test_a_corrected_weight_is_one_of_its_two_neighbours_and_the_expected_error_never_rises() -> None:
    weight, gram, mean = problem(40, 32)
    level = Float(2, 1)
    off, on = (Minifloat(correct=c).solve(weight, level, gram=gram, mean=mean).dense() for c in (False, True))
    turned = on != off
    assert 0 < int(turned.sum()) < weight.numel() // 2
    between = (on[turned] - weight[turned]).sign() * (off[turned] - weight[turned]).sign()
    assert bool((between <= 0).all())
    variance = gram.diagonal() - mean.square()

    def expected(q: Tensor) -> Tensor:
        return ((q - weight) @ mean).square() + (q - weight).square() @ variance

    assert bool((expected(on) <= expected(off) * (1 + 1e-5)).all())


def test_centred_inputs_leave_nothing_to_correct() -> None:
    weight, gram, mean = problem(8, 32)
    off, on = (Minifloat(correct=c).solve(weight, Float(2, 1), gram=gram, mean=0 * mean) for c in (False, True))
    assert torch.equal(on.dense(), off.dense())


# ---- all of them


SIZES = [(1, 1), (1, 37), (3, 7), (5, 33), (2, 130)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize(
    ("method", "text"),
    [(BlockFormat, t) for t in ("mxint8", "nvfp4/h", "nvint4", "e2m1/row")]
    + [(MRGPTQ, t) for t in ("mxfp4/h", "nvfp4", "4b/g16", "e3m2/row")]
    + [(VPTQ, t) for t in ("vq/d4/k16", "vq/d8/k256/r16", "vq/d3/k2")]
    + [(Minifloat, t) for t in ("e2m1/row", "e3m2/g16/h", "nvfp4")],
)
def test_odd_sizes_half_precision_and_exact_bytes(method: type, text: str, shape: tuple[int, int]) -> None:
    weight, gram, mean = problem(*shape)
    level = parse_level(text)
    wanted = {"gram": gram, "mean": mean, "rng": rng()}
    packed = method().solve(weight.bfloat16(), level, **{name: wanted[name] for name in method.needs()})
    assert packed.nbytes == level.bytes(shape)
    assert packed.dense().shape == shape and bool(packed.dense().isfinite().all())


@pytest.mark.parametrize("method", [BlockFormat, MRGPTQ, VPTQ, Minifloat])
def test_dead_inputs_and_zero_weights_do_no_harm(method: type) -> None:
    weight, gram, mean = problem(6, 32)
    gram[:, 3], gram[3, :], mean[3], weight[2] = 0, 0, 0, 0
    wanted = {"gram": gram, "mean": mean, "rng": rng()}
    level = parse_level({VPTQ: "vq/d4/k16", Minifloat: "e2m1/row"}.get(method, "mxfp4"))
    dense = method().solve(weight, level, **{name: wanted[name] for name in method.needs()}).dense()
    assert bool(dense.isfinite().all())
    assert method is VPTQ or bool((dense[2] == 0).all())


@pytest.mark.parametrize(
    ("method", "text"),
    [(BlockFormat, "4b/g64"), (BlockFormat, "50%"), (MRGPTQ, "2:4"), (VPTQ, "4b/g64"), (Minifloat, "r8")],
)
def test_other_levels_are_refused_by_name(method: type, text: str) -> None:
    weight, gram, mean = problem(4, 32)
    wanted = {"gram": gram, "mean": mean, "rng": rng()}
    with pytest.raises(UserError, match=f"{method.card.name} was asked for {text}"):
        method().solve(weight, parse_level(text), **{name: wanted[name] for name in method.needs()})
