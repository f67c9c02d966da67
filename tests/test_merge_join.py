"""Whole models joined into one: what must come out exactly, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_structure import filled, gpt2, inputs, llama, run, vit
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.modelmap import trace
from trimtab.engine.joining import join, moments, settle
from trimtab.formats.cutting import out_dim
from trimtab.formats.structure import put_weight, weight_of
from trimtab.merge.pleas import PLeaS
from trimtab.models.pocket.cnn import PocketCNN, PocketCNNConfig


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)).requires_grad_(
        False
    )


def cnn(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A residual network whose batch norms have seen the images beside it."""
    torch.manual_seed(seed)
    model = PocketCNN(PocketCNNConfig(widths=(8, 16), inner=((12,), (20,)))).eval()
    images = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    settle(model, [{"images": images}])
    return model, {"images": images}


def transformer(make: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    return filled(make), inputs(make(), items=40)


def permuted(model: nn.Module, batch: dict[str, Tensor], seed: int = 0) -> nn.Module:
    """The same function with the units of every coupled group of channels in another order."""
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    done: set[tuple[int, int, int]] = set()  # a tied weight lies in several places
    for group in trace(model, batch).coupled:
        if group.kind != "channels":
            continue
        order = torch.randperm(group.width, generator=rng).tolist()
        for m in group.members:
            old, new = (torch.tensor(group.indices(m, units)) for units in (order, list(range(group.width))))
            if m.side == "param":
                value = other.get_parameter(m.path).data
                value.index_copy_(m.dim, new, value.index_select(m.dim, old))
                continue
            module = other.get_submodule(m.path)
            dim = 1 if m.side == "in" else out_dim(module)
            weight = weight_of(module)
            size, place = weight.shape[dim], (weight.data_ptr(), dim, m.offset)
            if place in done:
                continue
            done.add(place)
            put_weight(module, weight.index_copy(dim, new, weight.index_select(dim, old)))
            for value in (*module._parameters.values(), *module._buffers.values()):
                if m.side != "in" and value is not None and value is not module.weight and value.shape == (size,):
                    value.data.index_copy_(0, new, value.data.index_select(0, old))
    return other


@pytest.mark.parametrize("make", [llama, gpt2, vit, None])
def test_a_model_and_its_own_permuted_copy_make_that_model(make: Any) -> None:
    model, batch = transformer(make) if make else cnn()
    other = permuted(model, batch)
    assert not all(map(torch.equal, model.parameters(), other.parameters()))
    before = run(model, batch)
    assert torch.allclose(run(other, batch), before, atol=1e-4 * float(before.abs().max()))
    for method in (PLeaS(), PLeaS(refit=False)):
        after = run(join(method, [model, other], [batch]), batch)
        assert (after - before).abs().max() <= 1e-3 * before.abs().max()
    unmatched = run(join(PLeaS(permute=False, refit=False), [model, other], [batch]), batch)
    assert (unmatched - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("refit", [True, False])
def test_side_by_side_is_the_mean_of_both(refit: bool) -> None:
    x = torch.randn(100, 6)
    one, other = mlp(0), mlp(1)
    joined: Any = join(PLeaS(extra=1.0, refit=refit), [one, other], [{"input": x}])
    assert joined[0].out_features == 24 and joined[2].weight.shape == (20, 24)
    assert torch.allclose(joined(x), (one(x) + other(x)) / 2, atol=1e-5)
    (first, batch), (second, _) = cnn(0), cnn(1)
    wide = run(join(PLeaS(extra=1.0, refit=refit), [first, second], [batch]), batch)
    mean = (run(first, batch) + run(second, batch)) / 2
    assert (wide - mean).abs().max() <= 1e-4 * mean.abs().max()


def test_wider_is_nearer_to_the_mean_of_both() -> None:
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    one, other = mlp(0), mlp(1)
    errors = []
    for extra in (0.0, 0.3, 0.6, 1.0):
        joined = join(PLeaS(extra=extra), [one, other], [{"input": x}])
        errors.append(float((joined(x) - (one(x) + other(x)) / 2).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1]


def test_a_layer_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    x, first, second = torch.randn(300, 6), mlp(0)[:1], mlp(1)[:1]  # type: ignore[index]
    joined: Any = join(PLeaS(damp=1e-9), [first, second], [{"input": x}])
    ones = torch.cat([x, torch.ones(300, 1)], 1)
    wanted = torch.linalg.lstsq(ones, (first(x) + second(x)) / 2).solution.T
    assert torch.allclose(torch.cat([joined[0].weight, joined[0].bias[:, None]], 1), wanted, atol=1e-4)


def test_moments_are_those_of_all_rows_side_by_side() -> None:
    one, other, x = mlp(0), mlp(1), torch.randn(50, 6)
    found = moments([one, other], [("2", "4")], [{"input": x[:30]}, {"input": x[30:]}])["2", "4"]
    u = torch.cat([one[:2](x), other[:4](x), torch.ones(50, 1)], 1).double()  # type: ignore[index]
    assert torch.allclose(found, u.T @ u / 50, atol=1e-6)


def test_settled_batch_norms_have_the_statistics_of_what_they_see() -> None:
    model, batch = cnn()
    seen: list[Tensor] = []
    norm: Any = model.get_submodule("stem.1")
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run(model, batch)
    handle.remove()
    assert torch.allclose(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.1 and not any(m.training for m in model.modules())


def test_what_cannot_be_joined_is_refused() -> None:
    batch = [{"input": torch.randn(9, 6)}]
    with pytest.raises(UserError, match=r"extra=2; it is a share"):
        join(PLeaS(extra=2.0), [mlp(0), mlp(1)], batch)
    with pytest.raises(UserError, match="was given 3 models"):
        join(PLeaS(), [mlp(0), mlp(1), mlp(2)], batch)
    other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 10), nn.Tanh(), nn.Linear(10, 3))
    with pytest.raises(UserError, match=r"0\.(weight|bias).*models of one architecture|2\.weight.*one architecture"):
        join(PLeaS(), [mlp(0), other], batch)
