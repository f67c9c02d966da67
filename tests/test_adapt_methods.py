"""What every wrapper must hold, by its card and signature; and what some of them promise beyond that."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from battery import METHODS, seeded
from torch import Tensor, nn

from trimtab.adapt.aqt import AQT
from trimtab.adapt.bi_lora import BiLoRA
from trimtab.adapt.lora import LoRA
from trimtab.adapt.lora_ga import LoRAGA
from trimtab.adapt.loram import LoRAM
from trimtab.adapt.mos import MoS
from trimtab.adapt.paca import PaCA
from trimtab.adapt.s2ft import S2FT
from trimtab.adapt.smora import SMoRA
from trimtab.core.errors import UserError
from trimtab.core.level import Int, Rank, parse_level
from trimtab.core.method import Wrapper
from trimtab.engine.run import PackedLinear
from trimtab.parts.frozen import Frozen
from trimtab.parts.shared import Shared
from trimtab.parts.trained_grid import rounded_rows
from trimtab.quant.rtn import RTN

ALL = {name: cls for name, cls in METHODS.items() if issubclass(cls, Wrapper) and cls.family() == "adapt"}
WRAPPERS = {name: cls for name, cls in ALL.items() if "linear" in cls.card.kinds}
each = pytest.mark.parametrize("name", WRAPPERS)
GRID = {"peqa", "l4q", "aqt"}
ROUNDED = GRID | {"bi-lora"}  # flat between steps: their gradient passes the rounding by, and has tests of its own


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
        **{"grad": grad, "rng": seeded(5), "shared": Shared((grad.shape,))},
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
    before, after = module(x), out.eval()(x)
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
    merged = disturb(out).eval().merged()
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
    if place == "packed" or name in ROUNDED:
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
    _, out, x = wrapped(name, "a linear")
    whole = out(x).detach()
    out = copy.deepcopy(out).to(torch.bfloat16)
    y = out(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - whole).abs().max() <= 0.1 * whole.abs().max()
    y.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for _, p in trained(out))


@each
def test_two_wrappers_of_one_seed_are_the_same(name: str) -> None:
    one, two = (wrapped(name, "packed")[1] for _ in range(2))
    for (_, a), (_, b) in zip(trained(one), trained(two), strict=True):
        assert torch.equal(a, b)


@each
def test_a_rank_above_the_layer_and_a_level_of_another_type_are_refused(name: str) -> None:
    takes = parse_level(out_card(name).levels[0])
    if isinstance(takes, Rank):
        with pytest.raises(UserError, match=r"rank 64 .*48 x 96"):
            wrapped(name, "no bias", Rank(64))
    other = "4b/g64" if isinstance(takes, Rank) else "r16"
    with pytest.raises(UserError, match=other):
        wrapped(name, "no bias", parse_level(other))
    with pytest.raises(UserError, match="Conv2d"):
        method: Any = WRAPPERS[name]()
        stats = statistics(nn.Linear(9, 9), torch.randn(4, 9))
        method.wrap(nn.Conv2d(3, 3, 3), takes, **{k: stats[k] for k in method.needs()})


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


# ---- on a grid


@pytest.mark.parametrize("place", MODULES)
@pytest.mark.parametrize("name", sorted(GRID))
def test_a_trained_grid_is_what_is_packed_bit_for_bit(name: str, place: str) -> None:
    _, out, x = wrapped(name, place)
    disturb(out)
    packed = out.packed()
    assert packed.nbytes == packed.level.bytes(packed.shape) and packed.flaw() is None
    assert torch.equal(PackedLinear(packed, out.bias)(rounded_rows(x, out.inputs)), out(x))
    if place == "packed":
        assert packed.level == Int(4, 32)
        start = WRAPPERS[name]().wrap(out.base, Int(2, 8), **({"rng": seeded(5)} if name == "l4q" else {}))
        same = torch.equal(start(x), out.base(rounded_rows(x, start.inputs)))
        assert same, "a packed matrix is what it was until it is trained"


def test_peqa_keeps_the_codes_and_its_gradient_is_the_scales() -> None:
    module, out, x = wrapped("peqa", "packed")
    before = module.packed.tensors["codes"].clone()
    whole = out.snapped(out.gain, None, None)[1]
    scale = out.start.clone().requires_grad_(True)
    nn.functional.linear(x, whole * scale.repeat_interleave(32, 1), out.bias).square().sum().backward()
    disturb(out)
    assert torch.equal(out.packed().tensors["codes"], before)
    _, fresh, _ = wrapped("peqa", "packed")
    fresh(x).square().sum().backward()
    assert torch.allclose(fresh.gain.grad, scale.grad * fresh.start, rtol=1e-4, atol=1e-5)


def test_l4q_has_the_gradients_of_a_learned_step() -> None:
    _, out, x = wrapped("l4q", "odd sizes")
    disturb(out)
    out(x).square().sum().backward()
    a, b, gain = (p.detach().clone().requires_grad_(True) for p in (out.a, out.b, out.gain))
    exact = out.start * (1 + gain)
    scale = exact + (out.snapped(gain, a, b)[0] - exact).detach()
    wide = out.spread(scale)
    ratio = (out.frozen.weight() + out.factor * b @ a) / wide
    low, high = out.limits()
    clipped = torch.minimum(torch.maximum(ratio, low), high)
    weight = (clipped + (clipped.round() - clipped).detach()) * wide
    nn.functional.linear(x, weight, out.bias).square().sum().backward()
    for ours, plain in ((out.a, a), (out.b, b), (out.gain, gain)):
        assert torch.allclose(ours.grad, plain.grad, rtol=1e-3, atol=1e-3 * float(plain.grad.abs().max()))


def test_the_gradient_goes_past_both_roundings_and_scales_follow_their_weights() -> None:
    layer, x = nn.Linear(64, 16, bias=False), torch.randn(6, 64, generator=seeded(0), requires_grad=True)
    frame = AQT(inputs=3).wrap(layer, parse_level("4b/g32/sym"))
    (frame(x).square().sum()).backward()
    plain = rounded_rows(x.detach(), 3).requires_grad_(True)
    weight = frame.packed().dense().requires_grad_(True)
    nn.functional.linear(plain, weight).square().sum().backward()
    assert torch.allclose(frame.b.grad, weight.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad, plain.grad, rtol=1e-4, atol=1e-4)
    was = frame.packed()
    with torch.no_grad():
        frame.b[3, 40] = 10 * layer.weight.abs().max()
    now, moved = frame.packed(), torch.zeros(16, 2, dtype=torch.bool)
    moved[3, 1] = True
    assert torch.equal(was.tensors["scale"] != now.tensors["scale"], moved)
    below = layer.weight + frame.b
    assert bool(((now.dense() - below).abs() <= 0.51 * now.tensors["scale"].float().repeat_interleave(32, 1)).all())
    fresh = RTN().solve(below.detach(), parse_level("4b/g32/sym")).tensors["scale"].float()
    assert torch.allclose(now.tensors["scale"].float(), fresh, rtol=2e-3), "they are those of a grid made anew"


def test_inputs_are_rounded_row_by_row_and_positive_ones_with_all_codes() -> None:
    x = torch.randn(5, 64, generator=seeded(1))
    for bits in (2, 4, 8):
        row = rounded_rows(x, bits)
        assert max(len(r.unique()) for r in row) <= (1 << bits) - 1
        assert bool(((row - x).abs().amax(1) <= x.abs().amax(1) / ((1 << bits) - 2) * 1.001).all())
        assert float((rounded_rows(x.relu(), bits) - x.relu()).abs().max()) < float((row - x).abs().max())
    assert rounded_rows(x, 0) is x and rounded_rows(x, 16) is x
    zeros = torch.zeros(2, 4)
    assert torch.equal(rounded_rows(zeros, 4), zeros)
    with pytest.raises(UserError, match="inputs=9"):
        AQT(inputs=9).wrap(nn.Linear(8, 8), Int(4, None))


def test_scales_that_are_no_16_bit_numbers_are_refused() -> None:
    module = PackedLinear(RTN().solve(torch.randn(8, 64, generator=seeded(0)), parse_level("mxint8")), None)
    with pytest.raises(UserError, match="mxint8"):
        WRAPPERS["peqa"]().wrap(module, Int(4, 32))


# ---- shared and rounded


def test_shards_of_one_pool_make_different_factors_at_the_cost_of_a_small_rank() -> None:
    shared, rng = Shared(((48, 96),) * 3 + ((53, 37),)), seeded(0)
    layers = [nn.Linear(96, 48) for _ in range(3)] + [nn.Linear(37, 53)]
    method = MoS(private=1)
    frames = [method.wrap(m, Rank(2), rng=rng, shared=shared.at(i)) for i, m in enumerate(layers)]
    numbers = sum(p.numel() for p in {p for f in frames for _, p in trained(f)})
    assert numbers <= 2 * (3 * (96 + 48) + 37 + 53 + 8), "of LoRA at rank 2, and the last shards' padding"
    one, two = frames[0].factors()[0], frames[1].factors()[0]
    assert one.shape == (16, 96) and not torch.equal(one, two)
    assert frames[0].pool_a is frames[2].pool_a and frames[3].pool_a is not frames[0].pool_a
    assert len(set(frames[0].index_a.tolist())) == 12 and not torch.equal(frames[0].index_a, frames[0].index_b)
    with pytest.raises(UserError, match="private=2"):
        MoS(private=2).wrap(layers[0], Rank(2), rng=rng, shared=shared)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_rounded_adapter_is_stored_in_its_bits_and_comes_back_exactly(bits: int) -> None:
    layer, x = nn.Linear(64, 40), torch.randn(5, 64, generator=seeded(0))
    frame = disturb(BiLoRA(bits=bits).wrap(layer, Rank(8), rng=seeded(1)))
    stored = {k: v for k, v in frame.state_dict().items() if not k.startswith("base.")}
    assert sum(v.numel() * v.element_size() for v in stored.values()) == 8 * (64 + 40) * bits // 8 + 2 * 8
    other = BiLoRA(bits=bits).wrap(layer, Rank(8), rng=seeded(2))
    other.load_state_dict(stored, strict=False)
    assert torch.equal(other(x), frame(x)) and frame.factors()[0].unique().numel() == 2**bits
    with pytest.raises(UserError, match="9 bits"):
        BiLoRA(bits=9).wrap(layer, Rank(8), rng=seeded(1))


def test_the_rounding_of_an_adapter_passes_the_gradient_on() -> None:
    frame, x = BiLoRA().wrap(nn.Linear(32, 16), Rank(4), rng=seeded(0)), torch.randn(6, 32, generator=seeded(1))
    disturb(frame)(x).square().sum().backward()
    w = frame.a.detach().clone().requires_grad_(True)
    standard = (w - w.mean()) / w.std()
    rounded = (standard + (standard.sign() * frame.levels[1] - standard).detach()) * w.std() + w.mean()
    (frame.base(x) + frame.scale * x @ rounded.T @ frame.factors()[1].detach().T).square().sum().backward()
    assert torch.allclose(frame.a.grad, w.grad, rtol=1e-3, atol=1e-3 * float(w.grad.abs().max()))


def test_a_matrix_of_two_sizes_is_pruned_in_training_alone() -> None:
    layer, x = nn.Linear(64, 40), torch.randn(200, 64, generator=seeded(0)) @ torch.randn(64, 64, generator=seeded(9))
    gram = x.T @ x / len(x)
    aligned, rough = (LoRAM(align=v).wrap(layer, Rank(4), gram=gram, rng=seeded(1)) for v in (True, False))
    off = [float((frame(x) - layer(x)).detach().square().mean()) for frame in (aligned, rough)]
    assert 0 < off[0] < off[1], "what stays makes good for what went"
    small = aligned.pruned.dense()
    assert int((small != 0).sum()) == 64 * 40 // 2 and aligned.pruned.nbytes < 0.6 * 2 * 64 * 40
    disturb(aligned)
    a, b, _ = aligned.factored()
    assert torch.allclose(aligned(x), nn.functional.linear(x, small + b @ a, layer.bias), rtol=1e-4, atol=1e-3)
    whole = nn.functional.linear(x, layer.weight + b @ a, layer.bias)
    assert torch.allclose(aligned.eval()(x), whole, rtol=1e-4, atol=1e-3)
    with pytest.raises(UserError, match="4b/g64"):
        LoRAM(keep="4b/g64").wrap(layer, Rank(4), gram=gram, rng=seeded(1))
