"""What autograd keeps: gradients as without the saver, few bytes, and nothing taken for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from battery import seeded
from test_structure import filled, gpt2, llama, vit
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Int, parse_level
from trimtab.engine.run import PackedLinear
from trimtab.parts.cross_entropy import chunked_cross_entropy
from trimtab.parts.frozen import Frozen, product
from trimtab.parts.lowrank_delta import LowRank
from trimtab.parts.norms import rms_norm, rms_norms
from trimtab.parts.saving import CODECS, Saver, decode, encode
from trimtab.prune.magnitude import Magnitude
from trimtab.quant.blockformat import BlockFormat
from trimtab.quant.rtn import RTN

BIG = (256, 128)  # more elements than what is always kept


def adapted(model: nn.Module, rank: int = 4) -> nn.Module:
    """A model whose linears all carry a trained delta that is not zero."""
    rng = seeded(3)
    for name, module in list(model.requires_grad_(False).named_modules()):
        if isinstance(module, nn.Linear) or hasattr(module, "nf"):
            base = Frozen(module)
            a = torch.randn(rank, base.in_features, generator=rng) / base.in_features**0.5
            b = torch.randn(base.out_features, rank, generator=rng) * 0.02
            parent, _, key = name.rpartition(".")
            setattr(model.get_submodule(parent), key, LowRank(module, a, b, 1.0))
    return model


def gradients(model: nn.Module, inputs: dict[str, Tensor], saver: Saver | None) -> tuple[dict[str, Tensor], int]:
    """Gradients of a scalar of the outputs, and the bytes that were kept for them."""
    model.zero_grad()
    kept: dict[int, int] = {}
    ours = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def count(t: Tensor) -> Tensor:
        if t.untyped_storage()._cdata not in ours:
            kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with saver or torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        out = model(**inputs)
        loss = (getattr(out, "logits", None) if hasattr(out, "logits") else out.last_hidden_state).square().mean()
    held = saver.held if saver else sum(kept.values())
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}, held


def inputs_for(model: nn.Module) -> dict[str, Tensor]:
    rng = seeded(0)
    if hasattr(model.config, "vocab_size"):
        return {"input_ids": torch.randint(0, model.config.vocab_size, (8, 64), generator=rng)}
    size = model.config.image_size
    return {"pixel_values": torch.randn(256, model.config.num_channels, size, size, generator=rng)}


@pytest.mark.parametrize("recompute", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("make", [lambda: llama(3), gpt2, vit], ids=["llama", "gpt2", "vit"])
def test_gradients_are_those_of_plain_autograd(make, recompute: float) -> None:
    model = adapted(filled(make).train(False))
    batch = inputs_for(model)
    plain, all_bytes = gradients(model, batch, None)
    saver = Saver([*model.parameters(), *model.buffers()], recompute=recompute)
    ours, held = gradients(model, batch, saver)
    for name, grad in plain.items():
        assert (ours[name] - grad).norm() <= 1e-6 * grad.norm().clamp_min(1e-12), name
    assert held < (0.85 if not recompute else 0.75) * all_bytes
    assert saver.held == 0, "what was kept is given back"


@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_keeps_fewer_bytes_and_gradients_near(codec: str) -> None:
    model = adapted(filled(lambda: llama(3)).train(False))
    batch = inputs_for(model)
    plain, _ = gradients(model, batch, None)
    _, exact = gradients(model, batch, Saver([*model.parameters(), *model.buffers()]))
    ours, held = gradients(model, batch, Saver([*model.parameters(), *model.buffers()], codec=codec))
    away = max(float((ours[n] - g).norm() / g.norm()) for n, g in plain.items())
    assert away <= {"exact": 1e-6, "bf16": 0.02, "int8": 0.05, "int4": 0.8}[codec]
    assert held <= {"exact": 1.0, "bf16": 0.7, "int8": 0.5, "int4": 0.4}[codec] * exact


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("n", [1, 63, 64, 1000])
def test_a_codec_of_odd_lengths_and_large_values(codec: str, n: int) -> None:
    x = torch.randn(n, generator=seeded(n)) * 1e30
    back = decode(encode(x.clone(), codec))
    assert back.shape == x.shape and back.dtype == x.dtype and bool(back.isfinite().all())
    assert (back - x).abs().max() <= {"bf16": 0.01, "int8": 0.01, "int4": 0.1}[codec] * x.abs().max()
    assert not decode(encode(torch.zeros(n), codec)).any()


def test_a_change_in_place_is_never_taken_for_the_old_content() -> None:
    weight = nn.Parameter(torch.randn(128, 128, generator=seeded(0)))
    x = torch.randn(*BIG, generator=seeded(1))

    def loss(saver: Saver | None) -> Tensor:
        weight.grad = None
        with saver or torch.enable_grad():
            gate = x @ weight
            shifted = nn.functional.silu(gate)
            shifted.add_(1.0)  # a recipe for its old content must not be used
            out = (shifted @ weight).square().mean()
        out.backward()
        return weight.grad.clone()

    assert torch.allclose(loss(Saver([weight])), loss(None), rtol=1e-5, atol=1e-7)


def test_a_kept_tensor_changed_in_place_is_an_error() -> None:
    weight = nn.Parameter(torch.eye(128))
    with Saver([weight]):
        gate = torch.ones(*BIG) @ weight
        out = nn.functional.silu(gate).sum()
        with torch.no_grad():
            gate.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_storages_that_come_and_go_are_not_mixed_up() -> None:
    weight = nn.Parameter(torch.randn(128, 128, generator=seeded(0)) / 11)

    def loss(saver: Saver | None) -> Tensor:
        weight.grad = None
        with saver or torch.enable_grad():
            x = torch.randn(*BIG, generator=seeded(1))
            for _ in range(40):
                for _ in range(3):  # freed at once: the next tensors get their addresses
                    nn.functional.silu(torch.randn(*BIG, generator=seeded(2)))
                x = nn.functional.silu(x @ weight) * 2
            out = x.square().sum()
        out.backward()
        return weight.grad.clone()

    assert torch.equal(loss(Saver([weight])), loss(None))


def test_the_graph_can_be_kept_and_used_again() -> None:
    weight = nn.Parameter(torch.randn(128, 128, generator=seeded(0)))
    with Saver([weight], recompute=1.0) as saver:
        out = (nn.functional.silu(torch.ones(*BIG) @ weight) * 3 @ weight).sum()
    out.backward(retain_graph=True)
    once = weight.grad.clone()
    out.backward()
    assert torch.equal(weight.grad, 2 * once)
    del out
    assert saver.held == 0


def test_a_frozen_linear_keeps_nothing() -> None:
    layer = nn.Linear(128, 128).requires_grad_(False)
    x = torch.randn(*BIG, requires_grad=True)
    with Saver([*layer.parameters()]) as saver:
        out = product(product(x, Frozen(layer)), Frozen(layer)).sum()
    assert saver.held == 0
    out.backward()
    w = layer.weight
    assert torch.allclose(x.grad, torch.ones(*BIG) @ w @ w, atol=1e-5)


def test_a_packed_linear_keeps_no_unpacked_weight() -> None:
    weight = torch.randn(128, 128, generator=seeded(0)) / 11
    layer = PackedLinear(RTN().solve(weight, Int(4, 64)), torch.ones(128))
    x = torch.randn(*BIG, requires_grad=True)
    with Saver() as saver:
        out = layer(layer(x)).sum()
    assert saver.held == 0
    out.backward()
    dense = layer.packed.dense()
    assert torch.allclose(x.grad, torch.ones(*BIG) @ dense @ dense, atol=1e-5)


def test_chunked_cross_entropy_is_the_plain_one_and_keeps_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.parts.cross_entropy.CHUNK", 4 * 500 * 100)
    rng = seeded(0)
    hidden = torch.randn(700, 32, generator=rng, requires_grad=True)
    weight = torch.randn(500, 32, generator=rng, requires_grad=True)
    bias = torch.randn(500, generator=rng, requires_grad=True)
    labels = torch.randint(0, 500, (700,), generator=rng)
    labels[::7] = -100
    plain = nn.functional.cross_entropy(hidden @ weight.T + bias, labels)
    wanted = torch.autograd.grad(plain, (hidden, weight, bias))
    with Saver() as saver:
        ours = chunked_cross_entropy(hidden, weight, bias, labels)
    assert saver.held < 700 * 500
    for a, b in zip(torch.autograd.grad(ours, (hidden, weight, bias)), wanted, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
    assert abs(float(ours.detach() - plain.detach())) < 1e-5


@pytest.mark.parametrize("level", ["4b/g16", "8b/row/sym", "mxfp4", "50%"])
def test_chunked_cross_entropy_over_a_packed_head_is_the_plain_one(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.parts.cross_entropy.AT_ONCE", 2000)
    weight = torch.randn(500, 32, generator=seeded(0))
    solver: Any = Magnitude() if level == "50%" else BlockFormat() if level == "mxfp4" else RTN()
    packed, bias = solver.solve(weight, parse_level(level)), torch.randn(500, generator=seeded(1))
    hidden = torch.randn(90, 32, generator=seeded(2), requires_grad=True)
    labels = torch.randint(0, 500, (90,), generator=seeded(3))
    for ignored in (False, True):
        labels[::7] = -100 if ignored else labels[::7]
        plain = nn.functional.cross_entropy(hidden @ packed.dense().T + bias, labels)
        (wanted,) = torch.autograd.grad(plain, hidden)
        with Saver() as saver:
            ours = chunked_cross_entropy(hidden, packed, bias, labels)
        assert saver.held < 90 * 500, "neither logits nor the head"
        assert abs(float(ours.detach() - plain.detach())) < 1e-5
        (found,) = torch.autograd.grad(2 * ours, hidden)
        assert (found / 2 - wanted).norm() <= 1e-6 * wanted.norm()


def test_rms_norms_are_told_by_what_they_compute_and_give_the_same_gradients() -> None:
    model = filled(lambda: llama(2))
    found = list(rms_norms(model))
    assert len(found) == 5 and {eps for _, eps in found} == {model.config.rms_norm_eps}
    assert list(rms_norms(filled(gpt2))) == [] and list(rms_norms(filled(vit))) == []
    norm, eps = found[0]
    x = torch.randn(6, 40, len(norm.weight), generator=seeded(0), requires_grad=True)
    weight = norm.weight.requires_grad_(True)
    direction = torch.randn(x.shape, generator=seeded(1))
    plain = torch.autograd.grad((norm(x) * direction).sum(), (x, weight))
    with Saver([weight]):
        ours = (rms_norm(x, weight, eps) * direction).sum()
    for a, b in zip(torch.autograd.grad(ours, (x, weight)), plain, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_what_cannot_be_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match="int3"):
        Saver(codec="int3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1\\.5"):
        Saver(recompute=1.5)
