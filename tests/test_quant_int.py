"""Grids of every scalar format, and the methods that round to them."""

from __future__ import annotations

from math import floor, log2

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sweep import output_error, problem, surgeon
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Float, Int, Level, Plus, Rank, Sparse, parse_level
from trimtab.core.method import Scene
from trimtab.core.modelmap import trace
from trimtab.formats.minifloat import magnitudes
from trimtab.formats.packed import hadamard_blocks
from trimtab.parts.grids import grid_for, rotate, rotate_gram
from trimtab.quant.awq import AWQ
from trimtab.quant.finequant import FineQuant
from trimtab.quant.gptq import GPTQ
from trimtab.quant.rtn import RTN
from trimtab.quant.zeroquant_v2 import ZeroQuantV2

settings.register_profile("steady", deadline=None)  # a busy machine is not a failure
settings.load_profile("steady")

FORMATS = [
    *("4b/g64", "4b/row", "2b/g16", "3b/g7", "1b/g8", "8b/g32", "4b/g64/sym", "2b/g8/sym", "1b/g8/sym", "8b/row/sym"),
    *(
        "4b/g32/e8m0",
        "4b/g16/e4m3",
        "mxint8",
        "mxint4",
        "nvint4",
        "mxfp8",
        "mxfp6",
        "mxfp4",
        "nvfp4",
        "e2m1/g64",
        "e5m2/row",
    ),
    *("4b/g16/h", "nvfp4/h"),
]


def values_of(level: Level, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Every value that one group can say."""
    if isinstance(level, Float):
        grid = magnitudes(level.e, level.m)
        return torch.cat((-grid, grid)) * scale
    offset = float(1 << (level.bits - 1)) if zero is None else zero
    return (torch.arange(1 << level.bits) - offset) * scale


@given(
    text=st.sampled_from(FORMATS),
    rows=st.integers(1, 4),
    cols=st.integers(1, 70),
    kind=st.sampled_from(["normal", "zero", "positive", "wide", "huge", "tiny"]),
    rule=st.sampled_from(["minmax", "mse"]),
    power=st.sampled_from(["floor", "ceil"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150)
def test_a_grid_rounds_to_the_nearest_value_that_storage_gives_back(
    text: str, rows: int, cols: int, kind: str, rule: str, power: str, seed: int
) -> None:
    level, rng = parse_level(text), torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=rng)
    if kind == "positive":
        weight = weight.abs() + 3
    elif kind == "wide":  # as bfloat16 weights may range
        weight = (weight * torch.exp2(torch.randint(-30, 12, (rows, cols), generator=rng).float())).bfloat16().float()
    else:
        weight = weight * {"normal": 1.0, "zero": 0.0, "huge": 1e30, "tiny": 1e-30}[kind]
    grid = grid_for(weight, level, rule=rule, power=power)
    codes, values = grid.round(weight)
    packed = grid.pack(codes, (rows, cols))
    assert packed.nbytes == level.bytes((rows, cols))
    assert torch.equal(packed.dense(), rotate(values, level))
    assert bool(values.isfinite().all())
    group = level.group or cols
    for r in range(rows):
        for j in range(cols):
            g = j // group
            every = values_of(level, grid.scale[r, g], None if grid.zero is None else grid.zero[r, g])
            nearest = (every - weight[r, j]).abs().min()
            slack = 1e-5 * float(nearest) + 1e-6 * float(grid.scale[r, g])
            assert float((values[r, j] - weight[r, j]).abs()) <= float(nearest) + slack
    for k in (1, 3):  # a run of columns alone rounds as it does within the whole
        j0 = (cols - 1) // 2
        assert torch.equal(grid.round(weight[:, j0 : j0 + k], j0)[1], values[:, j0 : j0 + k])


@pytest.mark.parametrize("text", ["4b/g32", "3b/row", "4b/g32/sym", "2b/g32/sym", "8b/g32/sym"])
def test_no_weight_lies_further_than_half_a_step(text: str) -> None:
    weight, level = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)), parse_level(text)
    grid = grid_for(weight, level)
    step = grid.scale.repeat_interleave(level.group or 96, 1)
    # a zero point is rounded to a whole step, which may push the other end out by half a step more; the 11 bits of a
    # scale may move that end by 2**-11 of the range
    reach = (0.5 if level.symmetric else 1.0) + 2.0 ** (level.bits - 11)
    assert bool(((grid.round(weight)[1] - weight).abs() <= step * reach).all())


@pytest.mark.parametrize(("text", "emax"), [("mxfp4", 2), ("mxfp6", 2), ("mxfp8", 8), ("mxint8", 6), ("mxint4", 2)])
def test_powers_of_two_follow_the_ocp_rule_or_clip_nothing(text: str, emax: int) -> None:
    weight, level = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)), parse_level(text)
    largest = weight.abs().amax(1).tolist()
    assert grid_for(weight, level).scale[:, 0].tolist() == [2.0 ** (floor(log2(x)) - emax) for x in largest]
    whole = grid_for(weight, level, power="ceil").scale[:, 0].tolist()
    top = float(magnitudes(level.e, level.m)[-1]) if isinstance(level, Float) else ((1 << level.bits) - 1) / 2
    assert all(s * top >= x * (1 - 1e-5) and s / 2 * top < x * (1 + 1e-5) for s, x in zip(whole, largest, strict=True))


@pytest.mark.parametrize("text", [t for t in FORMATS if "/h" not in t])
def test_a_searched_range_loses_no_more_than_the_whole(text: str) -> None:
    weight, level = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), parse_level(text)
    plain = [(grid_for(weight, level, power=p).round(weight)[1] - weight).square().sum() for p in ("floor", "ceil")]
    assert (grid_for(weight, level, rule="mse").round(weight)[1] - weight).square().sum() <= min(plain) * (1 + 1e-6)


@pytest.mark.parametrize("text", ["4b/g16", "4b/g16/sym", "nvfp4", "nvint4", "mxfp4"])
def test_a_refit_touches_its_groups_alone_and_matches_a_fresh_fit(text: str) -> None:
    rng, level = torch.Generator().manual_seed(0), parse_level(text)
    weight, other = torch.randn(4, 72, generator=rng), 0.5 * torch.randn(4, 72, generator=rng)
    grid, before = grid_for(weight, level), grid_for(weight, level)
    width = level.group
    grid.refit(other[:, width : 2 * width], width)
    assert torch.equal(grid.scale[:, :1], before.scale[:, :1]) and torch.equal(grid.scale[:, 2:], before.scale[:, 2:])
    if level.scale != "e4m3":  # there the scale of the matrix stays that of the first fit
        assert torch.equal(grid.scale[:, 1], grid_for(other[:, width : 2 * width], level).scale[:, 0])
    codes, values = grid.round(weight)
    assert torch.equal(grid.pack(codes, (4, 72)).dense(), values)


def test_rotated_grams_are_those_of_rotated_inputs() -> None:
    level, x = Int(4, 16, hadamard=True), torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    turned = hadamard_blocks(x, 16)
    assert torch.allclose(rotate_gram(x.T @ x, level), turned.T @ turned, atol=1e-3)


# ---- GPTQ and RTN


@pytest.mark.parametrize("text", ["4b/g16", "3b/row", "2b/g7", "4b/g16/sym", "3b/g64"])
def test_gptq_is_its_algorithm_written_out(text: str) -> None:
    level, (weight, gram) = parse_level(text), problem(8, 60)
    grid, width = grid_for(weight, level), level.group or 60
    expected, w = torch.zeros_like(weight), weight.double().clone()
    # the surgeon hands over one column at a time; a group's grid needs the weights of the whole group as they stand
    h = gram.double() + 0.01 * gram.double().diagonal().mean() * torch.eye(60, dtype=torch.float64)
    for j in range(60):
        if level.group and j % width == 0:
            grid.refit(w[:, j : j + width].float(), j)
        inverse = torch.linalg.inv(h[j:, j:])
        expected[:, j : j + 1] = grid.round(w[:, j : j + 1].float(), j)[1]
        w[:, j:] -= torch.outer((w[:, j] - expected[:, j].double()) / inverse[0, 0], inverse[0])
    solved = GPTQ().solve(weight, level, gram=gram).dense()
    assert float((solved != expected).float().mean()) <= 0.01  # a tie may fall the other way in single precision
    assert output_error(weight, solved, gram) == pytest.approx(output_error(weight, expected, gram), rel=0.02)


@pytest.mark.parametrize("text", ["4b/g16", "3b/g64", "2b/row", "4b/g32/sym", "4b/g16/h", "3b/g16/e4m3", "4b/g32/e8m0"])
@pytest.mark.parametrize("order", [None, "activation"])
def test_gptq_loses_less_than_rounding_to_nearest(text: str, order: str | None) -> None:
    level, (weight, gram) = parse_level(text), problem(24, 130)
    solved = GPTQ(order=order).solve(weight, level, gram=gram)
    assert solved.nbytes == level.bytes((24, 130))
    assert output_error(weight, solved.dense(), gram) < 0.8 * output_error(
        weight, RTN().solve(weight, level).dense(), gram
    )


@pytest.mark.parametrize("text", ["4b/g16", "3b/row", "4b/g16/sym", "4b/g16/e4m3"])
@pytest.mark.parametrize("order", [None, "activation"])
def test_gptq_without_correlations_is_rounding_to_nearest(text: str, order: str | None) -> None:
    level, (weight, _) = parse_level(text), problem(8, 60)
    assert torch.equal(
        GPTQ(order=order).solve(weight, level, gram=torch.eye(60)).dense(), RTN().solve(weight, level).dense()
    )


def test_the_activation_order_is_the_surgeon_s() -> None:
    level, (weight, gram) = Int(8, 16), problem(4, 32)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    grid = grid_for(weight, level)
    expected, _ = surgeon(weight, gram, lambda c, j, u: grid.round(c, j)[1], order=order)
    assert float((GPTQ(order="activation").solve(weight, level, gram=gram).dense() != expected).float().mean()) <= 0.02


@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (7, 63), (64, 3)])
@pytest.mark.parametrize("text", ["4b/g64", "3b/g32", "2b/row", "8b/g16/sym"])
def test_odd_sizes(shape: tuple[int, int], text: str) -> None:
    level, (weight, gram) = parse_level(text), problem(*shape)
    for packed in (RTN().solve(weight, level), GPTQ().solve(weight, level, gram=gram)):
        assert packed.nbytes == level.bytes(shape)
        assert packed.dense().shape == shape and bool(packed.dense().isfinite().all())


def test_two_runs_are_equal() -> None:
    weight, gram = problem(8, 60)
    first, second = (GPTQ().solve(weight, Int(3, 16), gram=gram) for _ in range(2))
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors)


@pytest.mark.parametrize(
    "solve",
    [
        lambda w, g: RTN().solve(w, Sparse(0.5)),
        lambda w, g: RTN(rule="median").solve(w, Int(4, 16)),
        lambda w, g: GPTQ().solve(w, parse_level("mxfp4"), gram=g),
        lambda w, g: GPTQ(order="random").solve(w, Int(4, 16), gram=g),
        lambda w, g: FineQuant().solve(w, parse_level("4b/g16/h")),
        lambda w, g: ZeroQuantV2().solve(w, Int(4, 16), gram=g),
        lambda w, g: ZeroQuantV2(inner="awq").solve(w, parse_level("4b/g16+r4"), gram=g),
    ],
)
def test_refusals_say_what_was_asked_and_what_is_taken(solve) -> None:
    with pytest.raises(UserError, match=r"(asked for|given|asked of).*(it takes|is |inner is|the rule is)"):
        solve(*problem(4, 32))


# ---- FineQuant


def test_finequant_refines_where_outliers_are_and_saves_scales_where_not() -> None:
    rng, level = torch.Generator().manual_seed(0), Int(4, 32)
    calm = torch.randn(16, 512, generator=rng)
    spiked = calm.clone()
    spiked[:, ::128] *= 30
    flat, fine = FineQuant().solve(calm, level), FineQuant().solve(spiked, level)
    assert flat.level.group is None or flat.level.group > 32
    assert fine.level.group == 32
    for weight, packed in ((calm, flat), (spiked, fine)):
        assert packed.nbytes == packed.level.bytes((16, 512)) <= level.bytes((16, 512))
        row = RTN().solve(weight, Int(4, None)).dense()
        assert (packed.dense() - weight).norm() <= (row - weight).norm()


def test_finequant_s_groups_divide_the_row_where_they_can() -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    weight[:, ::40] *= 30
    for group in (16, 32, 40):
        chosen = FineQuant(alpha=0.01).solve(weight, Int(4, group)).level.group
        assert chosen is None or (96 % chosen == 0 or 96 % group)


# ---- ZeroQuant-V2


@pytest.mark.parametrize("inner", ["rtn", "gptq"])
def test_lorc_adds_the_best_low_rank_part_of_the_error(inner: str) -> None:
    level, (weight, gram) = Plus(Int(3, 32), Rank(6)), problem(40, 64)
    packed = ZeroQuantV2(inner=inner).solve(weight, level, gram=gram)
    base = RTN().solve(weight, level.base) if inner == "rtn" else GPTQ().solve(weight, level.base, gram=gram)
    left = np.linalg.svd((weight - base.dense()).numpy().astype(np.float64), compute_uv=False)[6:]
    assert packed.nbytes == level.bytes((40, 64))
    assert float((packed.dense() - weight).norm()) == pytest.approx(float(np.linalg.norm(left)), rel=1e-3)


def test_lorc_in_the_metric_of_the_inputs_lowers_the_outputs_error_further() -> None:
    level, (weight, gram) = Plus(Int(2, 32), Rank(6)), problem(40, 64)
    gram = gram * torch.outer(s := torch.logspace(-1, 1, 64), s)
    plain = ZeroQuantV2(inner="rtn").solve(weight, level, gram=gram).dense()
    metric = ZeroQuantV2(inner="rtn", metric="gram").solve(weight, level, gram=gram).dense()
    assert output_error(weight, metric, gram) < output_error(weight, plain, gram)


def test_lorc_with_more_rank_than_there_is() -> None:
    level, (weight, gram) = Plus(Int(2, 8), Rank(9)), problem(5, 20)
    for metric in ("plain", "gram"):
        packed = ZeroQuantV2(metric=metric).solve(weight, level, gram=gram)
        assert packed.nbytes == level.bytes((5, 20))
        assert torch.allclose(packed.dense(), weight, atol=1e-2)


# ---- AWQ


class Attention(torch.nn.Module):
    """A block with grouped queries and a gated MLP, each behind a norm."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.RMSNorm(width)
        self.q, self.o = torch.nn.Linear(width, width), torch.nn.Linear(width, width)
        self.k, self.v = (torch.nn.Linear(width, kv_heads * self.size) for _ in range(2))
        self.gate, self.up = (torch.nn.Linear(width, 48, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(48, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm1(x)
        q = self.q(y).view(b, n, self.heads, self.size).transpose(1, 2)
        k, v = (m(y).view(b, n, self.kv_heads, self.size).transpose(1, 2) for m in (self.k, self.v))
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(out.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(20, 32)
        self.blocks = torch.nn.ModuleList(Attention() for _ in range(2))
        self.head = torch.nn.Linear(32, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def inputs_of(model: torch.nn.Module, paths: list[str], tokens: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def watch(path: str) -> None:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path] = args[0].reshape(-1, args[0].shape[-1])

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))

    handles: list = []
    for path in paths:
        watch(path)
    model(tokens)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_awq_keeps_the_function_and_lowers_the_error_of_rounding() -> None:
    torch.manual_seed(0)
    model, tokens = Tiny(), torch.randint(0, 20, (8, 12))
    for name, p in model.named_parameters():
        if "norm" in name and "weight" in name:
            p.copy_(torch.exp(torch.randn_like(p)))  # salient channels
        elif "norm" in name:
            p.normal_()
    modelmap = trace(model, (tokens[:1],))
    paths = [f"blocks.{i}.{n}" for i in range(2) for n in ("q", "k", "v", "o", "gate", "up", "down")]
    level = Int(3, 16)

    def errors() -> float:
        total = 0.0
        for path, x in inputs_of(model, paths, tokens).items():
            weight = model.get_submodule(path).weight
            total += float(
                (x @ (RTN().solve(weight, level).dense() - weight).T).square().mean() / (x @ weight.T).square().mean()
            )
        return total

    before, lost = model(tokens), errors()
    weights = {p: model.get_submodule(p).weight.clone() for p in paths}
    for block in range(2):
        here = [p for p in paths if p.startswith(f"blocks.{block}.")]
        seen = inputs_of(model, here, tokens)
        scene = Scene(model, modelmap, (block,), dict.fromkeys(here, level))
        AWQ().rewrite(
            scene,
            gram={p: x.T @ x / len(x) for p, x in seen.items()},
            absmean={p: x.abs().mean(0) for p, x in seen.items()},
        )
    assert torch.allclose(model(tokens), before, atol=1e-5)
    assert all(not torch.equal(model.get_submodule(p).weight, w) for p, w in weights.items())
    assert errors() < 0.9 * lost


@torch.no_grad()
def test_awq_touches_nothing_that_the_plan_does_not_name() -> None:
    torch.manual_seed(0)
    model, tokens = Tiny(), torch.randint(0, 20, (4, 12))
    modelmap = trace(model, (tokens[:1],))
    before = {n: p.clone() for n, p in model.named_parameters()}
    named = ["blocks.0.q", "blocks.0.k", "blocks.0.gate", "blocks.0.up"]  # v shares q's and k's input, and is not named
    seen = inputs_of(model, named, tokens)
    AWQ().rewrite(
        Scene(model, modelmap, (0,), dict.fromkeys(named, Int(4, 16))),
        gram={p: x.T @ x / len(x) for p, x in seen.items()},
        absmean={p: x.abs().mean(0) for p, x in seen.items()},
    )
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"blocks.0.norm2.weight", "blocks.0.gate.weight", "blocks.0.up.weight"}
