"""What every wrapper must hold, by its card and signature; and what some of them promise beyond that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from battery import METHODS, rank_of, seeded
from torch import Tensor, nn

from trimtab.adapt.lora import LoRA
from trimtab.adapt.lora_ga import LoRAGA
from trimtab.adapt.paca import PaCA
from trimtab.adapt.s2ft import S2FT
from trimtab.adapt.smora import SMoRA
from trimtab.core.errors import UserError
from trimtab.core.level import Int, Rank, parse_level
from trimtab.core.method import Wrapper
from trimtab.engine.run import PackedLinear
from trimtab.parts.frozen import Frozen
from trimtab.quant.rtn import RTN

WRAPPERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Wrapper) and cls.family() == "adapt"}
each = pytest.mark.parametrize("name", WRAPPERS)


def conv1d(rows: int, cols: int) -> nn.Module:
    """A linear that stores its weight turned, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(rows, cols)


def packed(rows: int, cols: int) -> nn.Module:
    weight = torch.randn(rows, cols, generator=seeded(1)) / cols**0.5
    return PackedLinear(RTN().solve(weight, Int(4, 32)), torch.ones(rows))


MODULES = {
    "a linear": lambda: nn.Linear(96, 48),
    "no bias": lambda: nn.Linear(96, 48, bias=False),
    "odd sizes": lambda: nn.Linear(37, 53),
    "turned": lambda: conv1d(48, 96),
    "packed": lambda: packed(48, 96),
}


def statistics(module: nn.Module, x: Tensor) -> dict[str, Any]:
    rows = x.reshape(-1, x.shape[-1]).float()
    grad = torch.randn(Frozen(module).out_features, x.shape[-1], generator=seeded(4))
    return {
        **{"gram": rows.T @ rows / len(rows), "mean": rows.mean(0), "absmean": rows.abs().mean(0)},
        **{"grad": grad, "rng": seeded(5)},
    }


def wrapped(name: str, place: str, level: Any = None) -> tuple[nn.Module, nn.Module, Tensor]:
    module = MODULES[place]()
    x = torch.randn(3, 5, Frozen(module).in_features, generator=seeded(2))
    method: Any = WRAPPERS[name]()
    found = statistics(module, x)
    stats = {k: found[k] for k in method.needs()}
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.random.get_rng_state()
    out = method.wrap(module, level or parse_level(method.card.levels[0]), **stats)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items()), "the module was changed"
    assert torch.equal(torch.random.get_rng_state(), state), "randomness comes from `rng` alone"
    return module, out, x


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]


def disturb(module: nn.Module) -> nn.Module:
    """Any trained state, far from the first."""
    rng = seeded(8)
    with torch.no_grad():
        for _, p in trained(module):
            p.add_(torch.randn(p.shape, generator=rng) * 0.3)
    return module


@pytest.mark.parametrize("place", MODULES)
@each
def test_the_face_and_where_promised_the_function_stay(name: str, place: str) -> None:
    module, out, x = wrapped(name, place)
    before, after = module(x), out(x)
    assert after.shape == before.shape and after.dtype == before.dtype
    assert (out.in_features, out.out_features) == (before.shape[-1] * 0 + x.shape[-1], before.shape[-1])
    if "function" in out_card(name).keeps:
        assert (after - before).abs().max() <= out_card(name).tolerance * before.abs().max()


def out_card(name: str) -> Any:
    return WRAPPERS[name].card


@pytest.mark.parametrize("place", MODULES)
@each
def test_merged_is_unmerged_where_promised(name: str, place: str) -> None:
    if "mergeable" not in out_card(name).keeps:
        pytest.skip("its card does not promise it")
    module, out, x = wrapped(name, place)
    merged = disturb(out).merged()
    assert type(merged) is nn.Linear and trained(merged) == []
    assert (merged(x) - out(x)).abs().max() <= 1e-4 * out(x).abs().max()
    assert not torch.allclose(out(x), module(x), atol=1e-3), "the trained state changes something"


@pytest.mark.parametrize("place", MODULES)
@each
def test_gradients_are_finite_right_and_on_what_was_added_alone(name: str, place: str) -> None:
    _, out, x = wrapped(name, place)
    out = disturb(out).double() if place != "packed" else disturb(out)
    x = x.to(next(p for _, p in trained(out)).dtype).requires_grad_()
    direction = torch.randn(out(x).shape, generator=seeded(3), dtype=x.dtype)
    (out(x) * direction).sum().backward()
    added = {n for n, _ in trained(out)}
    assert added and all((p.grad is not None) == (n in added) for n, p in out.named_parameters())
    assert all(bool(p.grad.isfinite().all()) for _, p in trained(out)) and bool(x.grad.isfinite().all())
    if place == "packed":
        return
    for tensor in [x, *(p for n, p in trained(out) if name != "dora")]:  # DoRA's norm is a constant to its gradient
        step = torch.randn(tensor.shape, generator=seeded(6), dtype=x.dtype) * 1e-6
        with torch.no_grad():
            ahead = (out_at(out, tensor, step, x) * direction).sum()
            behind = (out_at(out, tensor, -step, x) * direction).sum()
        assert torch.allclose((ahead - behind) / 2, (tensor.grad * step).sum(), rtol=2e-3, atol=1e-9)


def out_at(module: nn.Module, tensor: Tensor, step: Tensor, x: Tensor) -> Tensor:
    tensor += step
    try:
        return module(x)
    finally:
        tensor -= step


@each
def test_a_wrapper_works_in_bfloat16(name: str) -> None:
    module, out, x = wrapped(name, "a linear")
    out = copy.deepcopy(out).to(torch.bfloat16)
    y = out(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - module(x)).abs().max() <= 0.1 * module(x).abs().max()
    y.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for _, p in trained(out))


@each
def test_two_wrappers_of_one_seed_are_the_same(name: str) -> None:
    one, two = (wrapped(name, "packed")[1] for _ in range(2))
    for (_, a), (_, b) in zip(trained(one), trained(two), strict=True):
        assert torch.equal(a, b)


@each
def test_a_rank_above_the_layer_and_a_level_of_another_type_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"rank 64 .*48 x 96"):
        wrapped(name, "no bias", Rank(64))
    with pytest.raises(UserError, match="4b/g64"):
        wrapped(name, "no bias", Int(4, 64))
    with pytest.raises(UserError, match="Conv2d"):
        method: Any = WRAPPERS[name]()
        stats = statistics(nn.Linear(9, 9), torch.randn(4, 9))
        method.wrap(nn.Conv2d(3, 3, 3), Rank(2), **{k: stats[k] for k in method.needs()})
    assert rank_of(parse_level(out_card(name).levels[0]))


@pytest.mark.parametrize("name", ["paca", "s2ft"])
def test_the_partial_gradient_is_the_full_gradients_columns(name: str) -> None:
    module, out, x = wrapped(name, "a linear")
    out(x).square().sum().backward()
    full = module.requires_grad_(True)
    full(x).square().sum().backward()
    assert torch.allclose(out.columns.grad, full.weight.grad[:, out.index], rtol=1e-5, atol=1e-5)


def test_lora_ga_begins_along_the_gradient() -> None:
    layer = nn.Linear(48, 40, bias=False)
    x, y = torch.randn(64, 48, generator=seeded(0)), torch.randn(64, 40, generator=seeded(1))

    def along(build: Any) -> float:
        full = copy.deepcopy(layer).requires_grad_(True)
        (full(x) - y).square().mean().backward()
        grad = full.weight.grad
        module = build(copy.deepcopy(layer), grad)
        (module(x) - y).square().mean().backward()
        before = module.delta()
        with torch.no_grad():
            for _, p in trained(module):
                p -= 1e-3 * p.grad
        return float(torch.cosine_similarity((before - module.delta()).flatten(), grad.flatten(), dim=0))

    ga = along(lambda m, g: LoRAGA().wrap(m, Rank(8), grad=g))
    plain = along(lambda m, g: LoRA().wrap(m, Rank(8), rng=seeded(0)))
    assert ga > plain + 0.1


def test_a_mixture_of_loras_is_one_pair_with_ranks_in_blocks() -> None:
    layer, x = nn.Linear(32, 16), torch.randn(50, 32, generator=seeded(0))
    routed = disturb(SMoRA(active=4, block=4).wrap(layer, Rank(12), rng=seeded(1)))
    winner = (x @ routed.router.T).argmax(1)
    experts = [routed.scale * routed.b[:, i : i + 4] @ routed.a[i : i + 4] for i in (0, 4, 8)]
    wanted = layer(x) + torch.stack([experts[w] @ row for w, row in zip(winner.tolist(), x, strict=True)])
    assert torch.allclose(routed(x), wanted, atol=1e-4)


def test_fields_of_unknown_values_are_refused() -> None:
    layer = nn.Linear(8, 8)
    with pytest.raises(UserError, match="scaling='half'"):
        LoRA(scaling="half").wrap(layer, Rank(2), rng=seeded(0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="spans of 3"):
        S2FT(span=3).wrap(layer, Rank(4), absmean=torch.ones(8), rng=seeded(0))
    large = S2FT(select="large").wrap(layer, Rank(2), absmean=torch.arange(8.0), rng=seeded(0))
    assert large.index.tolist() == [6, 7]
    assert len(set(PaCA().wrap(layer, Rank(8), rng=seeded(0)).index.tolist())) == 8
