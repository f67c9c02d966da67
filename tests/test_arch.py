"""Blocks of papers on architectures: what every one of them holds, and what each is made of."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import pytest
import torch
from battery import METHODS, seeded
from torch import Tensor, nn
from torch.nn import functional

from trimtab.arch.efficientvit import CascadedGroupAttention
from trimtab.arch.inceptionnext import InceptionDWConv, InceptionNeXt
from trimtab.arch.mobilenetv3 import InvertedResidual, MobileNetV3
from trimtab.arch.shvit import SHViT, SingleHeadAttention
from trimtab.arch.unireplknet import BRANCHES, DilatedReparamBlock, UniRepLKNet
from trimtab.arch.vanillanet import VanillaNet
from trimtab.arch.vovnet import OneShotAggregation, VoVNet
from trimtab.core.errors import UserError
from trimtab.core.method import Architecture
from trimtab.parts.convolving import ConvNorm, with_norm
from trimtab.tasks.contest import forward, in_turns, multi_head, operations, touched

BLOCKS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Architecture)}
each_block = pytest.mark.parametrize("name", BLOCKS)
each_mergeable = pytest.mark.parametrize("name", [n for n, cls in BLOCKS.items() if "mergeable" in cls.card.keeps])
SIZES = ((12, 12), (9, 5), (1, 1))


def made(name: str, width: int = 16) -> nn.Module:
    """A block with every number random, the running ones of its norms too, so that no branch is nothing."""
    torch.manual_seed(0)
    block = BLOCKS[name]().build(width, width)  # type: ignore[attr-defined]
    return shaken(block)


def shaken(block: nn.Module) -> nn.Module:
    rng = seeded(1)
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point() and tensor.dim():
                tensor.copy_(torch.rand(tensor.shape, generator=rng) * 0.8 + 0.2)
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.copy_(torch.randn(module.weight.shape, generator=rng) / module.weight[0].numel() ** 0.5)
    return block


def images(width: int, size: tuple[int, int], count: int = 3) -> Tensor:
    return torch.randn(count, width, *size, generator=seeded(2))


@each_block
@pytest.mark.parametrize("size", SIZES)
def test_a_block_maps_images_to_images_each_by_itself(name: str, size: tuple[int, int]) -> None:
    block, x = made(name).eval(), images(16, size)
    y = block(x)
    assert y.shape == x.shape and bool(y.isfinite().all())
    assert torch.allclose(block(x[1:2]), y[1:2], atol=1e-5), "an image does not see the others"
    assert torch.equal(block(x), y)


@each_block
def test_a_gradient_reaches_every_number_of_a_block(name: str) -> None:
    block = made(name).train()
    block(images(16, (8, 8))).square().sum().backward()
    still = [key for key, p in block.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert still == []


@each_block
def test_a_block_can_be_carried_off_alone(name: str) -> None:
    block, x = made(name).eval(), images(16, (8, 8))
    other = BLOCKS[name]().build(16, 16).eval()  # type: ignore[attr-defined]
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x)) and torch.equal(copy.deepcopy(block)(x), block(x))
    for module in block.modules():
        home = sys.modules[type(module).__module__]
        assert home.__name__.startswith(("torch.", "trimtab.arch.", "trimtab.parts.convolving"))
    doubled = copy.deepcopy(block).double()(x.double())
    assert doubled.dtype == torch.float64 and torch.allclose(doubled.float(), block(x), atol=1e-3)


@each_block
def test_numbers_that_make_no_block_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        BLOCKS[name]().build(0, 0)  # type: ignore[attr-defined]
    for field in dataclasses.fields(BLOCKS[name]):  # type: ignore[arg-type]
        if (
            isinstance(field.default, int)
            and not isinstance(field.default, bool)
            and (name, field.name)
            != (
                "vovnet",
                "width",
            )
        ):
            with pytest.raises(UserError, match=name):
                BLOCKS[name](**{field.name: -2}).build(16, 16)  # type: ignore[attr-defined]


@each_mergeable
@pytest.mark.parametrize("size", SIZES)
def test_what_is_merged_computes_the_same(name: str, size: tuple[int, int]) -> None:
    block, x = made(name).eval(), images(16, size)
    if name == "vanillanet":
        with pytest.raises(UserError, match="t = 0"):
            block.merged()  # type: ignore[operator]
        block.fade(1.0)  # type: ignore[operator]
    before, state = block(x), copy.deepcopy(block.state_dict())
    plain = block.merged()  # type: ignore[operator]
    assert torch.allclose(plain(x), before, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, state[key]) for key, value in block.state_dict().items()), "it is left as it was"
    assert sum(p.numel() for p in plain.parameters()) < sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 4}, {"dilation": 2}, {"kernel": (1, 5)}])
def test_a_norm_folds_into_its_convolution(options: dict[str, Any]) -> None:
    pair = shaken(ConvNorm(8, 12, **{"kernel": 3, **options})).eval()
    assert isinstance(pair, ConvNorm)
    x = images(8, (11, 9))
    assert torch.allclose(pair.merged()(x), pair(x), atol=1e-5)
    biased, norm = nn.Conv2d(8, 12, 1), pair[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert torch.allclose(with_norm(biased, norm)(x), norm(biased(x)), atol=1e-5)


def test_mobilenetv3_is_an_inverted_residual_with_hard_gates() -> None:
    block = shaken(MobileNetV3(expansion=2.0).build(6, 6)).eval()
    assert isinstance(block, InvertedResidual)
    expand, _, depthwise, _, gate, project = block.branch
    x = images(6, (7, 7))

    def hard(v: Tensor) -> Tensor:
        return (v + 3).clamp(0, 6) / 6

    inner = expand(x)
    inner = depthwise(inner * hard(inner))
    inner = inner * hard(inner)
    squeezed = gate.up(gate.down(inner.mean((2, 3), keepdim=True)).relu())
    assert torch.allclose(block(x), x + project(inner * hard(squeezed)), atol=1e-5)
    assert MobileNetV3(stride=2).build(6, 8)(x).shape == (3, 8, 4, 4)
    assert len(list(MobileNetV3(expansion=1.0, squeeze=False).build(6, 6).modules())) < len(list(block.modules()))


def test_vovnet_gathers_its_chain_once() -> None:
    block = shaken(VoVNet(layers=3, width=4).build(6, 10)).eval()
    assert isinstance(block, OneShotAggregation)
    x = images(6, (7, 7))
    one = block.chain[0](x)
    two = block.chain[1](one)
    three = block.chain[2](two)
    assert torch.equal(block(x), block.gather(torch.cat([x, one, two, three], 1)))
    sides = [(m.in_channels, m.out_channels) for m in block.modules() if isinstance(m, nn.Conv2d)]
    assert sides == [(6, 4), (4, 4), (4, 4), (18, 10)]


def test_inceptionnext_mixes_three_shares_and_keeps_the_rest() -> None:
    block = shaken(InceptionNeXt().build(16, 16)).eval()
    mixer = block.mixer
    assert isinstance(mixer, InceptionDWConv)
    x = images(16, (9, 13))
    y = mixer(x)
    assert torch.equal(y[:, :10], x[:, :10]), "most channels go through"
    square, wide, tall = mixer.branches
    for first, conv, pads in ((10, square, (1, 1)), (12, wide, (0, 5)), (14, tall, (5, 0))):
        wanted = functional.conv2d(x[:, first : first + 2], conv.weight, conv.bias, padding=pads, groups=2)
        assert torch.allclose(y[:, first : first + 2], wanted, atol=1e-6)
    assert [tuple(conv.weight.shape[2:]) for conv in mixer.branches] == [(3, 3), (1, 11), (11, 1)]
    assert torch.allclose(block(x), x + block.scale * block.mlp(block.norm(y)), atol=1e-6)
    fresh = InceptionNeXt().build(16, 16).eval()
    assert torch.allclose(fresh(x), x, atol=1e-4), "at the start it is almost nothing"


def test_shvit_attends_on_the_first_channels_alone() -> None:
    block = shaken(SingleHeadAttention(14, 3, 5)).eval()
    x = images(14, (4, 6))
    q, k, v = block.qkv(block.norm(x[:, :3])).flatten(2).split((5, 5, 3), 1)
    wanted = functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    wanted = wanted.transpose(1, 2).reshape(3, 3, 4, 6)
    assert torch.allclose(block(x), block.project(torch.cat([wanted, x[:, 3:]], 1)), atol=1e-5)
    assert SHViT().build(28, 28)[1].branch.widths == (6, 22)  # type: ignore[index]
    x = images(28, (4, 4))
    assert torch.equal(SHViT().build(28, 28).eval()(x), x), "at the start every branch is nothing"


def test_efficientvit_feeds_each_head_with_the_one_before() -> None:
    block = shaken(CascadedGroupAttention(12, 4, (3, 5, 1), 7)).eval()
    x = images(12, (4, 3))
    found: list[Tensor] = []
    places = [(i, j) for i in range(4) for j in range(3)]
    for head, part in enumerate(x.split(4, 1)):
        part = part + found[-1] if found else part
        q, k, v = block.qkv[head](part).split((4, 4, 4), 1)
        q, k, v = (t.flatten(2).transpose(1, 2) for t in (block.near[head](q), k, v))
        bias = torch.stack([
            torch.stack([block.biases[head, abs(a[0] - b[0]), abs(a[1] - b[1])] for b in places]) for a in places
        ])  # fmt: skip
        mixed = functional.scaled_dot_product_attention(q, k, v, bias[None])
        found.append(mixed.transpose(1, 2).reshape(3, 4, 4, 3))
    assert torch.allclose(block(x), block.project(torch.cat(found, 1)), atol=1e-5)


def test_efficientvit_attends_within_windows() -> None:
    block = shaken(CascadedGroupAttention(8, 4, (3, 3), 4)).eval()
    x = images(8, (8, 12))
    whole = block(x)
    for row in (0, 4):
        for col in (0, 4, 8):
            here = (..., slice(row, row + 4), slice(col, col + 4))
            assert torch.allclose(block(x[here]), whole[here], atol=1e-5)
    assert block(images(8, (9, 5))).shape == (3, 8, 9, 5)


def test_vanillanet_fades_from_a_relu_to_nothing() -> None:
    block: Any = shaken(VanillaNet(series=1, pool=2).build(6, 8)).eval()
    x = images(6, (8, 8))
    inner = block.first(x)
    for share in (0.0, 0.3, 1.0):
        block.fade(share)
        between = (1 - share) * inner.relu() + share * inner
        pooled = functional.max_pool2d(block.second(between), 2)
        shifted, norm = block.series.shifted
        wanted = norm(functional.conv2d(pooled.relu(), shifted.weight, padding=1, groups=8))
        assert torch.allclose(block(x), wanted, atol=1e-5)
    dense = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    left = [m for m in block.merged().modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert (len(dense), len(left)) == (2, 1)
    assert "linear" in block.state_dict(), "how far it has faded is saved with it"


@pytest.mark.parametrize("kernel", BRANCHES)
def test_unireplknets_dilated_kernels_fit_into_the_large_one(kernel: int) -> None:
    block = shaken(DilatedReparamBlock(3, kernel)).double().eval()
    assert isinstance(block, DilatedReparamBlock)
    assert all(dilation * (side - 1) < kernel for side, dilation in BRANCHES[kernel])
    x = images(3, (19, 14)).double()
    one = block.merged()
    assert one.kernel_size == (kernel, kernel) and torch.allclose(one(x), block(x), atol=1e-10)


def test_unireplknet_is_a_mixer_a_gate_and_a_normed_mlp() -> None:
    block: Any = shaken(UniRepLKNet(kernel=5).build(8, 8)).eval()
    x = images(8, (6, 6))
    inner = functional.gelu(block.up(block.squeeze(block.norm(block.mixer(x)))))
    lengths = inner.square().sum((2, 3), keepdim=True).sqrt()
    response = block.response
    normed = inner + response.scale * inner * lengths / (lengths.mean(1, keepdim=True) + 1e-6) + response.shift
    assert torch.allclose(block(x), x + block.scale * block.down(normed), atol=1e-5)
    with pytest.raises(UserError, match="side 6"):
        UniRepLKNet(kernel=6).build(8, 8)


def test_a_contest_counts_what_a_forward_does() -> None:
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU()), images(2, (4, 5), 1)
    assert operations(net, x) == 2 * 3 * 4 * 5 * 2 * 9
    assert touched(net, x) == 4 * (2 * 20 + 3 * 20 + 3 * 2 * 9)
    seen = touched(nn.Sequential(net, nn.Conv2d(3, 1, 1)), x)
    assert seen == touched(net, x) + 4 * (3 * 20 + 20 + 3 + 1)


def test_runs_take_turns_and_the_longer_one_takes_longer() -> None:
    order: list[str] = []

    def run(name: str, turns: int) -> None:
        order.append(name)
        sum(range(turns))

    times = in_turns({"short": lambda: run("short", 100), "long": lambda: run("long", 300_000)}, rounds=3)
    assert order == ["short", "long"] * 4 and times["long"] > times["short"] > 0
    net = nn.Conv2d(2, 2, 1)
    assert not forward(net, images(2, (3, 3)))().requires_grad  # type: ignore[attr-defined]


def test_the_baseline_of_attention_is_attention_and_feed_forward() -> None:
    block: Any = shaken(multi_head(8, 2, 2)).eval()
    x = images(8, (3, 4))
    q, k, v = (t.unflatten(1, (2, 4)).transpose(2, 3) for t in block.qkv(block.norms[0](x)).flatten(2).split(8, 1))
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(3, 8, 3, 4)
    y = x + block.out(mixed)
    assert torch.allclose(block(x), y + block.mlp(block.norms[1](y)), atol=1e-5)
