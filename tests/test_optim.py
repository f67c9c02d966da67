"""Optimisers: what every update rule promises, and its numbers written out."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from battery import METHODS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import trimtab
from trimtab.core.errors import UserError
from trimtab.core.level import Rank
from trimtab.core.method import Optimiser, method
from trimtab.parts.gathering import Means
from trimtab.parts.integer_weight import Held
from trimtab.parts.moments import bucketed, gaussian, leading, signs
from trimtab.parts.stepping import Stepping

OPTIMISERS = sorted(name for name, cls in METHODS.items() if issubclass(cls, Optimiser))
each = pytest.mark.parametrize("name", OPTIMISERS)


def small(name: str, rank: int = 4) -> Any:
    known = {"rank": rank, "every": 3}
    return method(name, **{k: v for k, v in known.items() if k in METHODS[name].__dataclass_fields__})  # type: ignore[attr-defined]


def grads(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for _ in range(steps)]


def run(optimiser: torch.optim.Optimizer, params: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for step in steps:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimiser.step()


@each
@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 20), max_size=3).map(tuple), bf16=st.booleans())
def test_state_is_what_it_says_and_the_direction_has_the_shape(name: str, shape: tuple[int, ...], bf16: bool) -> None:
    param = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16 if bf16 else torch.float32))
    optimiser = Stepping([param], small(name), lr=0.1, means=Means(nn.Identity()))
    for grad in grads(shape, 4):
        param.grad = grad.to(param.dtype)
        before = param.grad.clone()
        optimiser.step()
        assert torch.equal(param.grad, before), "a gradient is the caller's"
    assert param.shape == shape and bool(param.isfinite().all())
    bytes_ = small(name).state_bytes(shape)
    if name == "q-galore" and len(shape) == 2 and min(shape) > 4:
        assert optimiser.state_bytes() == bytes_, "codes are codes"
    else:
        assert optimiser.state_bytes() == (bytes_ // 2 if bf16 else bytes_)


@each
def test_two_runs_are_equal_and_a_run_goes_on_to_the_bit(name: str) -> None:
    shapes = [(12, 30), (30, 12), (7,)]
    steps = [[grads(shape, 8, i)[n] for i, shape in enumerate(shapes)] for n in range(8)]

    def fresh() -> tuple[list[nn.Parameter], Stepping]:
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        return params, Stepping(params, small(name), lr=0.01, weight_decay=0.1, seed=3, means=Means(nn.Identity()))

    (whole, one), (cut, two) = fresh(), fresh()
    run(one, whole, steps)
    run(two, cut, steps[:5])
    state = copy.deepcopy(two.state_dict())
    resumed = [nn.Parameter(p.detach().clone()) for p in cut]
    three = Stepping(resumed, small(name), lr=0.01, weight_decay=0.1, seed=3, means=Means(nn.Identity()))
    three.load_state_dict(state)
    run(three, resumed, steps[5:])
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@each
def test_a_rank_that_is_not_smaller_is_adam(name: str) -> None:
    if "rank" not in METHODS[name].__dataclass_fields__:  # type: ignore[attr-defined]
        pytest.skip("it projects nothing, or to rank 1")
    ours, adam = nn.Parameter(torch.ones(6, 9)), nn.Parameter(torch.ones(6, 9))
    rule = method(name, rank=6)
    steps = [[grad] for grad in grads((6, 9), 5)]
    run(Stepping([ours], rule, lr=0.01), [ours], steps)
    run(torch.optim.AdamW([adam], lr=0.01, weight_decay=0.0, eps=1e-6), [adam], steps)
    assert torch.allclose(ours, adam, rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs() -> None:
    ours, theirs = nn.Parameter(torch.ones(6, 9)), nn.Parameter(torch.ones(6, 9))
    steps = [[grad] for grad in grads((6, 9), 9)]
    run(trimtab.optimizer([ours], "adamw", lr=0.01, weight_decay=0.1), [ours], steps)
    run(torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1), [theirs], steps)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@each
def test_a_loss_falls(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    target, x = torch.randn(20, 16, generator=rng), torch.randn(64, 16, generator=rng)
    layer = nn.Linear(16, 20, bias=False)
    rate = 0.08 if "galore" in name else 0.02  # a quarter goes in
    optimiser = Stepping(layer.parameters(), small(name), lr=rate, means=Means(layer))
    losses = []
    for _ in range(150):
        loss = (layer(x) - x @ target.T).square().mean()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.6 * losses[0]


def test_channels_are_scaled_as_the_projection_says() -> None:
    """One step of APOLLO, written out."""
    grad, rank, seed = grads((6, 40), 1)[0], 3, 5
    param = nn.Parameter(torch.zeros(6, 40))
    param.grad = grad.clone()
    trimtab.optimizer([param], "apollo", lr=1.0, seed=seed, rank=rank, scale=4.0).step()
    narrow = gaussian(6, rank, seed).T @ grad
    ratio = (narrow / (narrow.abs() + 1e-6)).norm(dim=0) / (narrow.norm(dim=0) + 1e-8)
    assert torch.allclose(param, -2.0 * grad * ratio, rtol=1e-4)
    mini = nn.Parameter(torch.zeros(6, 40))
    mini.grad = grad.clone()
    trimtab.optimizer([mini], "apollo-mini", lr=1.0, seed=seed).step()
    narrow = gaussian(6, 1, seed).T @ grad
    ratio = (narrow / (narrow.abs() + 1e-6)).norm() / narrow.norm()
    assert torch.allclose(mini, -(128**0.5) * grad * ratio, rtol=1e-4)


def test_growth_is_cut() -> None:
    param, rule = nn.Parameter(torch.zeros(6, 40)), method("apollo", rank=2)
    optimiser, lengths = Stepping([param], rule, lr=1.0), []
    for grow, grad in zip((1.0, 1.0, 50.0, 50.0), grads((6, 40), 4), strict=True):
        before, param.grad = param.detach().clone(), grow * grad
        optimiser.step()
        lengths.append(float((param.detach() - before).norm()))
    assert all(after <= 1.0101 * before for before, after in pairwise(lengths))


def test_leading_vectors_are_those_of_the_decomposition() -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 24, generator=rng)).Q for n in (24, 60))
    matrix = left @ torch.diag(0.6 ** torch.arange(24.0)) @ right.T
    for m, expected in ((matrix, left), (matrix.T, left)):
        found = leading(m, 5, torch.Generator().manual_seed(1))
        assert torch.allclose((found.T @ expected[:, :5]).abs(), torch.eye(5), atol=2e-2)


@pytest.mark.parametrize(
    ("rule", "config", "said"),
    [
        ("apollo", {"rank": 0}, "both are 1 or more"),
        ("galore", {"every": 0}, "both are 1 or more"),
        ("gptq", {}, "updates no parameters"),
        ("apolo", {}, "did you mean 'apollo'"),
        ("apollo", {"ranks": 3}, "no field 'ranks'"),
        ("apollo", {"projection": "svd"}, "one of gaussian, buckets"),
        ("sgd", {"momentum": 1.0}, "0 to below 1"),
        ("mkor", {}, "give means"),
        ("mkor", {"gamma": 1.0, "means": Means(nn.Identity())}, "gamma is above 0"),
    ],
)
def test_what_cannot_be_is_refused(rule: str, config: dict[str, Any], said: str) -> None:
    param = nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones(4, 4)
    with pytest.raises(UserError, match=said):
        trimtab.optimizer([param], rule, **config).step()
    with pytest.raises(UserError, match="neither may be negative"):
        trimtab.optimizer([param], "adamw", lr=-1.0)


def test_buckets_keep_lengths_in_the_mean_on_either_side() -> None:
    grad = grads((10, 25), 1)[0]
    found = torch.stack([bucketed(grad, 4, signs(10, seed)) for seed in range(2000)])
    squares = found.square().sum(1)
    error = squares.std(0) / 2000**0.5
    assert bool(((squares.mean(0) - grad.square().sum(0)).abs() < 4.5 * error).all())
    assert torch.equal(bucketed(grad.T, 4, signs(10, 7)), bucketed(grad, 4, signs(10, 7)).T)


def test_signs_and_momentum_are_as_torch_has_them() -> None:
    ours, theirs = nn.Parameter(torch.ones(6, 9)), nn.Parameter(torch.ones(6, 9))
    steps = [[grad] for grad in grads((6, 9), 5)]
    run(trimtab.optimizer([ours], "sgd", lr=0.1, momentum=0.8), [ours], steps)
    run(torch.optim.SGD([theirs], lr=0.1, momentum=0.8), [theirs], steps)
    assert torch.allclose(ours, theirs, atol=1e-6)
    signed = nn.Parameter(torch.zeros(6, 9))
    run(trimtab.optimizer([signed], "sgd", lr=0.1, sign=True), [signed], steps[:1])
    assert torch.equal(signed, -0.1 * steps[0][0].sign())


def test_a_weight_of_8_bits_is_rounded_without_bias() -> None:
    rng = torch.Generator().manual_seed(0)
    layer = nn.Linear(300, 7)
    matrix = torch.randn(7, 300, generator=rng)
    held = Held(layer)
    total = torch.zeros_like(matrix)
    for _ in range(400):
        held.store(matrix, rng)
        assert float(((held.dense() - matrix).abs() / held.scale.repeat_interleave(256, 1)[:, :300]).max()) < 1.001
        total += held.dense()
    step = held.scale.repeat_interleave(256, 1)[:, :300]
    assert float(((total / 400 - matrix) / step).abs().max()) < 4.5 * 0.5 / 400**0.5
    with pytest.raises(UserError, match="stochastic or nearest"):
        Held(layer, "up")  # type: ignore[arg-type]


def test_a_held_linear_is_the_linear_of_its_codes_and_gets_its_gradients() -> None:
    layer = nn.Linear(40, 9)
    held = Held(layer)
    plain = held.plain()
    x, y = (torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    held(x).square().sum().backward()
    plain(y).square().sum().backward()
    assert torch.allclose(held.weight.grad, plain.weight.grad, atol=1e-5)
    assert torch.allclose(x.grad, y.grad, atol=1e-5) and held.weight.untyped_storage().nbytes() == 4


def test_moments_and_bases_in_codes_follow_galore() -> None:
    """From equal gradients, Q-GaLore's first steps lie along GaLore's."""
    ours, theirs = nn.Parameter(torch.zeros(12, 40)), nn.Parameter(torch.zeros(12, 40))
    steps = [[grad] for grad in grads((12, 40), 5)]
    run(trimtab.optimizer([ours], "q-galore", lr=1.0, rank=6), [ours], steps)
    run(trimtab.optimizer([theirs], "galore", lr=1.0, rank=6), [theirs], steps)
    assert float(torch.cosine_similarity(ours.detach().flatten(), theirs.detach().flatten(), dim=0)) > 0.95


def test_a_settled_subspace_is_found_more_rarely() -> None:
    rng = torch.Generator().manual_seed(0)
    settled, restless = nn.Parameter(torch.zeros(12, 40)), nn.Parameter(torch.zeros(12, 40))
    one = torch.outer(torch.randn(12, generator=rng), torch.randn(40, generator=rng))
    optimiser = trimtab.optimizer([settled, restless], "q-galore", lr=0.1, rank=2, every=2)
    for grad in grads((12, 40), 60):
        settled.grad, restless.grad = one + 0.01 * grad, grad
        optimiser.step()
    counts = [optimiser.state[p]["found"] for p in (settled, restless)]
    assert counts[1] == 30 and counts[0] < 15


def test_inverses_changed_by_one_rank_are_the_inverses_of_the_factors() -> None:
    layer = nn.Linear(12, 7, bias=False)
    means = Means(layer)
    optimiser = trimtab.optimizer(layer.parameters(), "mkor", lr=1e-3, means=means, gamma=0.8, every=1)
    factors, rng = [torch.eye(7), torch.eye(12)], torch.Generator().manual_seed(0)
    for _ in range(6):
        x = torch.randn(5, 12, generator=rng)
        out = layer(x)
        out.retain_grad()
        out.square().sum().backward()
        for i, mean in enumerate((out.grad.mean(0), x.mean(0))):
            factors[i] = 0.8 * factors[i] + 0.2 * torch.outer(mean, mean)
        grad = layer.weight.grad.clone()
        optimiser.step()
        optimiser.zero_grad()
    state = optimiser.state[layer.weight]
    wanted = [torch.linalg.inv(factor) for factor in factors]
    assert torch.allclose(state["left"], wanted[0], atol=1e-4) and torch.allclose(state["right"], wanted[1], atol=1e-4)
    found = method("mkor", momentum=0.0).step(  # type: ignore[attr-defined]
        grad, {**state, "step": 1, "mean": torch.zeros(7, 12)}, layer.weight, inputs=None, errors=None
    )
    assert torch.equal(found, grad), "what is no linear's goes by its gradient"


def test_micro_batches_give_the_means_of_the_whole() -> None:
    layer, x = nn.Linear(6, 3), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    means = Means(layer)
    layer(x).square().sum().backward()
    whole = means.take(layer.weight)
    for part in x.split(3):
        layer(part).square().sum().backward()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, means.take(layer.weight), strict=True))
    assert means.take(layer.weight) == (None, None)


def test_factors_and_entries_are_the_linear_of_their_sum() -> None:
    layer = nn.Linear(40, 30)
    made = method("sltrain", density=0.05).wrap(  # type: ignore[attr-defined]
        layer, Rank(4), rng=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        made.b.normal_(generator=torch.Generator().manual_seed(1))
    assert len(made.values) == 60 and made.nbytes == 4 * (4 * 70 + 2 * 60)
    x = torch.randn(5, 40, requires_grad=True, generator=torch.Generator().manual_seed(2))
    out = made(x)
    assert torch.allclose(out, made.merged()(x), atol=1e-5)
    out.square().sum().backward()
    dense = (made.b @ made.a * made.scale).flatten().index_add(0, made.index, made.values).view(30, 40)
    y = x.detach().clone().requires_grad_()
    again = torch.autograd.grad(
        nn.functional.linear(y, dense, made.bias).square().sum(), [y, made.a, made.b, made.values]
    )
    for ours, theirs in zip((x, made.a, made.b, made.values), again, strict=True):
        assert torch.allclose(ours.grad, theirs, atol=1e-3, rtol=1e-4)
    with pytest.raises(UserError, match="rank 31"):
        method("sltrain").wrap(layer, Rank(31), rng=torch.Generator())  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="0 to 1"):
        method("sltrain", density=2.0).wrap(layer, Rank(3), rng=torch.Generator())  # type: ignore[attr-defined]
