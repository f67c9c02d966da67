"""The column sweep against Optimal Brain Surgeon written out, with an inverse a column, and pruning methods on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import NM, Int, Rank, Sparse, parse_level
from trimtab.parts import sweep
from trimtab.parts.scores import keep_nm, keep_top
from trimtab.parts.sweep import obs_sweep
from trimtab.prune.magnitude import Magnitude
from trimtab.prune.sparsegpt import SparseGPT
from trimtab.prune.wanda import Wanda

DAMP = 0.01


def problem(rows: int, cols: int, samples: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the gram of correlated inputs."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, cols, generator=rng) @ torch.randn(cols, cols, generator=rng) / cols**0.5
    return torch.randn(rows, cols, generator=rng), x.T @ x / samples


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> float:
    missed = (weight - values).double()
    return float((missed @ gram.double() * missed).sum())


def damped(gram: Tensor, damp: float = DAMP) -> Tensor:
    wide = gram.double()
    return wide + damp * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def surgeon(weight: Tensor, gram: Tensor, choose, step: int = 1, order: list[int] | None = None) -> tuple[Tensor, list]:
    """Slow and literal: fix `step` columns J, move the free ones by -(w - q) [F^-1_JJ]^-1 F^-1_J; F = H of those.

    Returns the chosen values and the weights as they stood before each step.
    """
    h, w = damped(gram), weight.double().clone()
    free = order or list(range(weight.shape[1]))
    chosen, stood = torch.zeros_like(w), []
    while free:
        now, free_now = free[:step], list(free)
        stood.append(w.clone())
        inverse = torch.linalg.inv(h[free_now][:, free_now])
        q = choose(w[:, now].float(), now[0], inverse[0, 0].sqrt()).double()
        chosen[:, now] = q
        k = len(now)
        w[:, free_now] -= (w[:, now] - q) @ torch.linalg.inv(inverse[:k, :k]) @ inverse[:k]
        free = free[k:]
    return chosen.float(), stood


def bend(columns: Tensor, j: int, u: Tensor) -> Tensor:
    """A choice without cliffs, so that values can be compared and not only errors."""
    return 0.8 * torch.tanh(columns) + 0.01 * (j % 3)


@pytest.mark.parametrize("block", [1, 8, 13, 128])
def test_the_sweep_is_optimal_brain_surgeon(block: int) -> None:
    weight, gram = problem(5, 45)
    expected, _ = surgeon(weight, gram, bend)
    assert torch.allclose(obs_sweep(weight, gram, bend, damp=DAMP, block=block), expected, atol=1e-4)


@pytest.mark.parametrize("panel", [1, 8, 20, 44])
@pytest.mark.parametrize("block", [1, 13, 128])
def test_the_factor_may_be_cut_into_panels_anywhere(panel: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(5, 45)
    expected, _ = surgeon(weight, gram, bend, step=3)
    monkeypatch.setattr(sweep, "PANEL", panel)
    given = gram.clone()
    assert torch.allclose(obs_sweep(weight, gram, bend, step=3, damp=DAMP, block=block), expected, atol=1e-4)
    assert torch.equal(gram, given)
    factor = sweep._factor(gram, DAMP)
    assert sum(p.numel() for p in factor.panels) <= (45 + panel) * 45 / 2 + panel * 45
    whole = factor.columns(0, 45)
    assert torch.equal(whole, whole.triu()) and torch.equal(whole.diagonal(), factor.diagonal())
    assert torch.allclose((whole.double() @ whole.T.double()), damped(gram), atol=1e-4)


@pytest.mark.parametrize(("step", "block"), [(2, 16), (4, 10), (7, 128), (64, 16)])
def test_columns_decided_together(step: int, block: int) -> None:
    weight, gram = problem(4, 45)
    expected, _ = surgeon(weight, gram, bend, step)
    assert torch.allclose(obs_sweep(weight, gram, bend, step=step, damp=DAMP, block=block), expected, atol=1e-4)


def test_the_largest_activations_first() -> None:
    weight, gram = problem(4, 30)
    gram = gram * torch.outer(s := torch.linspace(0.2, 3, 30), s)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist()
    expected, _ = surgeon(weight, gram, bend, order=order)
    assert torch.allclose(obs_sweep(weight, gram, bend, order="activation"), expected, atol=1e-4)


@pytest.mark.parametrize(("span", "block"), [(4, 16), (6, 16), (16, 16), (20, 8), (100, 16), (None, 16)])
def test_a_run_begins_with_weights_that_carry_every_earlier_error(span: int | None, block: int) -> None:
    weight, gram = problem(3, 45)
    _, stood = surgeon(weight, gram, bend)
    seen: list[tuple[int, int]] = []

    def begin(columns: Tensor, j: int, d: Tensor) -> None:
        seen.append((j, columns.shape[1]))
        assert torch.allclose(columns, stood[j][:, j : j + columns.shape[1]].float(), atol=1e-4)
        for i in range(len(d)):
            free = torch.linalg.inv(damped(gram)[j + i :, j + i :])
            assert float(d[i]) == pytest.approx(float(free[0, 0].sqrt()), rel=1e-3)

    obs_sweep(weight, gram, bend, begin=begin, span=span, damp=DAMP, block=block)
    width = span or 45
    assert seen == [(j, min(width, 45 - j)) for j in range(0, 45, width)]


def test_nothing_is_spread_without_correlations() -> None:
    weight, _ = problem(3, 20)
    assert torch.allclose(
        obs_sweep(weight, torch.eye(20), bend), torch.cat([bend(weight[:, j : j + 1], j, weight) for j in range(20)], 1)
    )


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_bad_grams_never_give_nan(damp: float) -> None:
    weight, gram = problem(4, 40, samples=7)  # rank 7
    crooked = gram - 0.05 * gram.diagonal().mean() * torch.eye(40)  # negative eigenvalues
    dead = gram.clone()
    dead[:, 5], dead[5] = 0.0, 0.0
    for bad in (gram, crooked, dead, torch.zeros(40, 40), gram * 1e-30, gram * 1e25):
        assert bool(obs_sweep(weight, bad, lambda c, j, u: c.round(), damp=damp).isfinite().all())


def test_an_input_that_is_always_zero_is_rounded_alone() -> None:
    weight, gram = problem(4, 40)
    gram[:, 5], gram[5] = 0.0, 0.0
    assert torch.equal(obs_sweep(weight, gram, lambda c, j, u: c.round())[:, 5], weight[:, 5].round())


def test_a_gram_that_is_no_gram_is_refused() -> None:
    weight, gram = problem(2, 6)
    with pytest.raises(UserError, match="not finite"):
        obs_sweep(weight, gram * float("nan"), bend)
    with pytest.raises(UserError, match="not positive definite"):
        obs_sweep(weight, gram.diagonal().diag() + 1e9 * (1 - torch.eye(6)), bend)


# ---- pruning


@pytest.mark.parametrize("text", ["50%", "70%", "2:4", "1:3", "4:8"])
def test_sparsegpt_is_its_algorithm_written_out(text: str) -> None:
    rows, cols, level, mask_block = 6, 45, parse_level(text), 16
    weight, gram = problem(rows, cols)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    h, w = damped(gram), weight.double().clone()
    span = level.m if isinstance(level, NM) else mask_block
    total = cols - level.kept((rows, cols)) // rows
    for j in range(cols):
        if j % span == 0:
            end = min(j + span, cols)
            cost = torch.stack([w[:, c].square() / torch.linalg.inv(h[c:, c:])[0, 0] for c in range(j, end)], 1)
            for r in range(rows):
                go = max(0, end - j - level.n) if isinstance(level, NM) else total * end // cols - total * j // cols
                mask[r, j + cost[r].argsort(descending=True)[: end - j - go]] = True
        inverse = torch.linalg.inv(h[j:, j:])
        w[:, j:] -= torch.outer(w[:, j] * ~mask[:, j] / inverse[0, 0], inverse[0])
    solved = SparseGPT(mask_block=mask_block).solve(weight, level, gram=gram).dense()
    assert torch.equal(solved != 0, mask)
    assert torch.allclose(solved, (w * mask).float(), atol=2e-3)  # values are kept in 16 bits


@pytest.mark.parametrize("text", ["50%", "33%", "90%", "0%", "2:4", "1:4", "3:7", "4:8"])
@pytest.mark.parametrize("shape", [(8, 45), (1, 7), (3, 2), (5, 200)])
def test_every_row_keeps_its_number_and_the_bytes_are_the_level_s(text: str, shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape)
    level = parse_level(text)
    for packed in (
        Magnitude().solve(weight, level),
        Wanda().solve(weight, level, gram=gram),
        SparseGPT().solve(weight, level, gram=gram),
    ):
        kept = (packed.dense() != 0).sum(1)
        if isinstance(level, NM):
            full, rest = divmod(shape[1], level.m)
            assert kept.tolist() == [full * level.n + min(rest, level.n)] * shape[0]
        else:
            assert kept.tolist() == [shape[1] - int(level.ratio * shape[1])] * shape[0]
        assert packed.nbytes == level.bytes(shape)


def test_methods_that_see_the_inputs_lose_less() -> None:
    weight, gram = problem(32, 128)
    gram = gram * torch.outer(s := torch.logspace(-1, 1, 128)[torch.randperm(128)], s)
    for level in (Sparse(0.5), Sparse(0.7), NM(2, 4)):
        plain = output_error(weight, Magnitude().solve(weight, level).dense(), gram)
        wanda = output_error(weight, Wanda().solve(weight, level, gram=gram).dense(), gram)
        swept = output_error(weight, SparseGPT().solve(weight, level, gram=gram).dense(), gram)
        assert swept < wanda < plain


def test_wanda_leaves_weights_alone_and_magnitude_keeps_the_largest() -> None:
    weight, gram = problem(6, 40)
    wanda = Wanda().solve(weight, Sparse(0.5), gram=gram).dense()
    assert torch.equal(wanda[wanda != 0], weight.half().float()[wanda != 0])
    kept = Magnitude().solve(weight, Sparse(0.5)).dense() != 0
    for row, mask in zip(weight.abs(), kept, strict=True):
        assert row[mask].min() >= row[~mask].max()


def test_masks_with_ties_keep_exactly_as_many() -> None:
    assert keep_top(torch.zeros(3, 10), 4).sum(1).tolist() == [4, 4, 4]
    assert keep_nm(torch.zeros(2, 10), 2, 4).sum(1).tolist() == [6, 6]


def test_weights_of_dead_inputs_go_first() -> None:
    weight, gram = problem(4, 16)
    gram[:, :8], gram[:8] = 0.0, 0.0
    for packed in (SparseGPT().solve(weight, Sparse(0.5), gram=gram), Wanda().solve(weight, Sparse(0.5), gram=gram)):
        assert not bool(packed.dense()[:, :8].any())


@pytest.mark.parametrize("level", [Int(4, 64), Rank(4)])
def test_other_levels_are_refused(level: object) -> None:
    weight, gram = problem(4, 16)
    for solve in (
        lambda: Magnitude().solve(weight, level),
        lambda: Wanda().solve(weight, level, gram=gram),
        lambda: SparseGPT().solve(weight, level, gram=gram),
    ):
        with pytest.raises(UserError, match=f"{level}.*like 50% or 2:4"):
            solve()
