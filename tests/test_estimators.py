"""Estimators of gradients: what each promises, written out; and what holds for all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import METHODS, seeded
from test_structure import filled, gpt2, llama
from torch import Tensor, nn

import trimtab
from trimtab.core.errors import UserError
from trimtab.core.method import Estimator, method
from trimtab.engine.train import Recipe, train
from trimtab.parts.row_sampling import chosen, sampled
from trimtab.parts.saving import Saver
from trimtab.tasks.training import Prediction

ESTIMATORS = sorted(name for name, cls in METHODS.items() if issubclass(cls, Estimator))
each = pytest.mark.parametrize("name", ESTIMATORS)
LENGTH = 16


def model_of(tied: bool = False) -> nn.Module:
    model = filled(lambda: llama(3)).requires_grad_(True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def data_of(model: nn.Module, items: int = 12) -> Prediction:
    tokens = torch.randint(0, model.config.vocab_size, (items, LENGTH), generator=seeded(1))
    return Prediction({"input_ids": tokens}, tokens, {"use_cache": False})


def losses_of(model: nn.Module, data: Prediction, items: int = 4, micro: int = 2) -> list[Any]:
    return [lambda part=part: data.items(model, part) for part in torch.arange(items).split(micro)]


def exact(model: nn.Module, data: Prediction, items: int = 4) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    mean = data.items(model, torch.arange(items)).mean()
    return dict(zip(named, torch.autograd.grad(mean, list(named.values())), strict=True))


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])


def estimated(name: str, model: nn.Module, losses: list[Any], seed: int = 0, **config: Any) -> dict[str, Tensor]:
    made: Any = method(name, **config)
    given = {"rng": seeded(seed), "rate": 1e-3}
    _, found = made.estimate(model, losses, **{k: given[k] for k in made.needs()})
    return {name: grad.clone() for name, grad in found}


@each
def test_every_parameter_gets_a_gradient_of_its_shape_and_stays_where_it_was(name: str) -> None:
    model = model_of()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    made: Any = method(name)
    given = {"rng": seeded(0), "rate": 1e-3}
    loss, found = made.estimate(model, losses_of(model, data_of(model)), **{k: given[k] for k in made.needs()})
    with torch.no_grad():
        assert abs(loss - float(data_of(model).items(model, torch.arange(4)).mean())) < 0.05
    got = {n: g for n, g in found}
    assert set(got) == set(before) and all(got[n].shape == before[n].shape for n in got)
    for n, p in model.named_parameters():
        assert torch.allclose(p, before[n], atol=2e-6) and p.requires_grad


@each
def test_a_run_that_was_cut_off_goes_on_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    def run(folder: Path, resume: bool, stop: int | None) -> Tensor:
        model = model_of()
        optimiser = trimtab.optimizer(model.parameters(), "apollo", lr=1e-2, rank=4)

        def watch(step: int, value: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            train(
                *(model, data_of(model), 12, Recipe(steps=6, every=2), optimiser, folder),
                gradient=method(name),  # type: ignore[arg-type]
                resume=resume,
                watch=watch,
            )
        return flat({n: p.detach() for n, p in model.named_parameters()})

    whole = run(tmp_path / "whole", False, None)
    run(tmp_path / "cut", False, 5)
    assert torch.equal(run(tmp_path / "cut", True, None), whole)
    assert bool(whole.isfinite().all()) and not torch.equal(whole, flat(dict(model_of().named_parameters())).detach())


def test_a_slope_times_its_direction_is_right_in_the_mean() -> None:
    model = nn.Linear(6, 1, bias=False)
    x = torch.randn(16, 6, generator=seeded(0))
    losses = [lambda: (model(x)[:, 0] - 1).square()]
    wanted = torch.autograd.grad(losses[0]().mean(), model.weight)[0].flatten()
    for name, config in (
        ("mezo", {}),
        ("forward-gradient", {}),
        ("mezo", {"queries": 4}),
        ("sparse-mezo", {"share": 1.0}),
    ):
        found = torch.stack([estimated(name, model, losses, s, **config)["weight"].flatten() for s in range(1500)])
        error = found.std(0) / len(found) ** 0.5
        assert bool(((found.mean(0) - wanted).abs() < 4.5 * error + 2e-3).all()), name


def test_forward_mode_gives_the_exact_slope_along_the_same_direction() -> None:
    model = model_of()
    data = data_of(model)
    wanted = flat(exact(model, data))
    forward = flat(estimated("forward-gradient", model, losses_of(model, data)))
    squares = float(forward.square().sum())
    # g = s z with s = dL . z, so that g . dL = s^2, and |g|^2 = s^2 |z|^2
    slope = float(forward @ wanted) ** 0.5
    assert abs(squares**0.5 / slope / len(forward) ** 0.5 - 1) < 0.01
    central = flat(estimated("mezo", model, losses_of(model, data)))
    assert float(torch.cosine_similarity(central, forward, dim=0)) > 0.9999
    assert abs(float(central.norm() / forward.norm()) - 1) < 0.05


def test_blocks_are_moved_one_at_a_time() -> None:
    model = model_of()
    data, calls = data_of(model), []
    losses = [lambda: (calls.append(1), data.items(model, torch.arange(2)))[1]]
    estimated("mezo", model, losses, blockwise=True)
    assert len(calls) == 2 * (3 + 1)
    calls.clear()
    estimated("mezo", model, losses, queries=3)
    assert len(calls) == 6


def test_only_the_small_weights_move() -> None:
    model = nn.Linear(64, 33, bias=False)
    losses = [lambda: model(torch.ones(2, 64)).square().sum(1)]
    moved = estimated("sparse-mezo", model, losses, share=0.25)["weight"] != 0
    small, large = model.weight.abs()[moved].max(), model.weight.abs()[~moved].min()
    assert float(moved.float().mean()) == pytest.approx(0.25, abs=0.001) and small <= large
    drawn = [estimated("sparse-mezo", model, losses, s, select="random")["weight"] != 0 for s in range(2)]
    assert torch.equal(drawn[0], drawn[1]) and float(drawn[0].float().mean()) == pytest.approx(0.25, abs=0.03)


def test_a_conservative_step_never_makes_the_batch_worse() -> None:
    model = model_of()
    data = data_of(model)
    losses = losses_of(model, data)
    for seed in range(4):
        before = float(data.items(model, torch.arange(4)).mean().detach())
        made: Any = method("zo-conservative")
        _, found = made.estimate(model, losses, rng=seeded(seed), rate=0.05)
        with torch.no_grad():
            for name, grad in found:
                model.get_parameter(name).sub_(grad, alpha=0.05)
        assert float(data.items(model, torch.arange(4)).mean().detach()) <= before + 1e-5


def test_the_last_blocks_of_a_hybrid_get_their_exact_gradient() -> None:
    model = model_of()
    data = data_of(model)
    wanted, found = exact(model, data), estimated("zo-hybrid", model, losses_of(model, data))
    near = [name for name in wanted if torch.allclose(wanted[name], found[name], atol=1e-6)]
    assert near == [name for name in wanted if name.startswith("model.layers.2.")]


@pytest.mark.parametrize("tied", [False, True])
def test_ghost_clipping_is_clipping_example_by_example(tied: bool) -> None:
    model = model_of(tied)
    data = data_of(model)
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    norms = []
    for i in range(5):
        grads = torch.autograd.grad(data.items(model, torch.tensor([i])).sum(), list(named.values()))
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        for name, grad in zip(named, grads, strict=True):
            total[name] += grad * min(1.0, 0.9 * norms[0] / norms[-1]) / 5
    found = estimated("ghost-clipping", model, losses_of(model, data, 5, 3), limit=0.9 * norms[0])
    assert all(torch.allclose(found[name], total[name], atol=1e-6, rtol=1e-4) for name in named)
    noisy = estimated("ghost-clipping", model, losses_of(model, data, 5, 3), limit=0.9 * norms[0], noise=1.0)
    spread = float((flat(noisy) - flat(total)).std())
    assert spread == pytest.approx(0.9 * norms[0] / 5, rel=0.05)


def test_what_mixes_examples_has_no_ghost() -> None:
    model = filled(gpt2).requires_grad_(True)
    tokens = torch.randint(0, model.config.vocab_size, (3, LENGTH), generator=seeded(1))
    data = Prediction({"input_ids": tokens}, tokens, {"use_cache": False})
    with pytest.raises(UserError, match="wpe"):
        estimated("ghost-clipping", model, losses_of(model, data, 3, 3))


def test_sampled_rows_are_right_in_the_mean_and_winners_vary_less() -> None:
    x = torch.randn(24, 5, generator=seeded(0)) * torch.logspace(-1, 1, 24)[:, None]
    g = torch.randn(24, 3, generator=seeded(1))
    wanted = g.T @ x
    spread = {}
    for winners in (True, False):
        rng, found = seeded(2), []
        for _ in range(3000):
            places, scale = chosen(x.norm(dim=1), 8, winners, rng)
            assert len(places) == 8
            found.append(g[places].T @ (x[places] * scale[:, None]))
        all_ = torch.stack(found)
        error = all_.std(0) / len(found) ** 0.5
        assert bool(((all_.mean(0) - wanted).abs() < 4.5 * error).all())
        spread[winners] = float(all_.var(0).sum())
    assert spread[True] < 0.9 * spread[False]


def test_a_share_of_the_rows_is_kept_and_no_more() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(4)])
    x = torch.randn(512, 64, generator=seeded(0))
    kept = {}
    for share in (0.25, 1.0):
        saver = Saver(model.parameters())
        with saver, sampled(model, share, True, seeded(1)):
            model(x).sum()
        kept[share] = saver.peak
    rows, places = 4 * 64, 4
    assert kept[0.25] == 4 * 128 * (rows + places) and kept[1.0] == 4 * 512 * (rows + places)
    model[1].weight.grad = None
    with sampled(model, 1.0, True, seeded(1)):
        model(x).square().sum().backward()
    ours = model[1].weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    assert torch.allclose(ours, model[1].weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("mezo", {"eps": 0.0}, "above 0"),
        ("mezo", {"queries": 0}, "above 0"),
        ("sparse-mezo", {"share": 0.0}, "share"),
        ("sparse-mezo", {"select": "large"}, "one of small, random"),
        ("zo-conservative", {"eps": -1.0}, "above 0"),
        ("zo-hybrid", {"last": 3}, "1 to 2"),
        ("wta-crs", {"share": 1.5}, "above 0 up to 1"),
        ("ghost-clipping", {"limit": 0.0}, "limit is above 0"),
    ],
)
def test_what_cannot_be_is_refused(name: str, config: dict[str, Any], said: str) -> None:
    model = model_of()
    with pytest.raises(UserError, match=said):
        estimated(name, model, losses_of(model, data_of(model)), **config)


def test_codes_cannot_be_moved_to_and_fro() -> None:
    from trimtab.parts.integer_weight import hold

    model = model_of()
    hold(model)
    with pytest.raises(UserError, match="kept as codes"):
        estimated("mezo", model, losses_of(model, data_of(model)))
