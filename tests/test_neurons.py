"""Neurons of feed-forward layers: found by the map, watched, and run in part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Int
from trimtab.engine.neurons import FeedForward, activations, clocked, feed_forwards, masked, narrowed, only, watched
from trimtab.engine.run import PackedLinear
from trimtab.engine.session import map_of
from trimtab.parts.frozen import Frozen
from trimtab.quant.rtn import RTN

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
KV = {"num_key_value_heads": 2, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES | KV),
    "biases": ("LlamaForCausalLM", SIZES | KV | {"mlp_bias": True}),
    "gate and up in one": ("Phi3ForCausalLM", SIZES | KV),
    "opt": ("OPTForCausalLM", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 97, "n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
    ),
}
RUNS = {"llama": 2, "biases": 2, "gate and up in one": 2, "opt": 1, "gpt2": 1}


def make(name: str) -> Any:
    cls = getattr(transformers, MODELS[name][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**MODELS[name][1])).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.2))
    return model


def tokens(texts: int = 2, count: int = 9) -> Tensor:
    return torch.randint(3, 97, (texts, count), generator=torch.Generator().manual_seed(0))


def some(layers: tuple[FeedForward, ...], count: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randperm(at.neurons, generator=rng)[:count] for at in layers]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(), use_cache=False).logits


def pack(model: nn.Module, layers: tuple[FeedForward, ...]) -> None:
    """All linears of these layers in 4 bits, unpacked as they are used."""
    for path in {path for at in layers for path in (*at.paths, at.down)}:
        module: Any = model.get_submodule(path)
        model.set_submodule(path, PackedLinear(RTN().solve(Frozen(module).weight(), Int(4, 16)), module.bias))


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found(name: str) -> None:
    model = make(name)
    layers = feed_forwards(map_of(model))
    assert [(at.block, at.neurons, len(at.makers)) for at in layers] == [(b, 48, RUNS[name]) for b in range(3)]
    for at in layers:
        block = at.down.partition(f".{at.block}.")[0] + f".{at.block}."
        assert all(path.startswith(block) for path in at.paths)


@pytest.mark.parametrize("name", MODELS)
def test_all_neurons_are_the_model(name: str) -> None:
    model = make(name)
    layers = feed_forwards(map_of(model))
    with only(model, layers, [torch.arange(at.neurons) for at in layers]):
        found = logits(model)
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_some_neurons_are_the_masked_model(name: str, packed: bool) -> None:
    model = make(name)
    layers = feed_forwards(map_of(model))
    if packed:
        pack(model, layers)
    whole, chosen = logits(model), some(layers, 7)

    def keep(place: int, given: Tensor) -> Tensor:
        return torch.zeros(48, dtype=torch.bool).index_fill(0, chosen[place], True)

    with masked(model, layers, keep):
        expected = logits(model)
    with only(model, layers, chosen):
        found = logits(model)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert float((expected - whole).abs().max()) > 1e-2
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("name", ["llama", "gate and up in one", "opt"])
def test_activations_are_what_down_reads(name: str) -> None:
    model = make(name)
    layers = feed_forwards(map_of(model))
    given = activations(model, layers, tokens())
    assert [tuple(x.shape) for x in given] == [(2, 9, 48)] * 3
    with watched(model, layers) as seen:
        logits(model)
    last = layers[-1]
    assert torch.equal(seen[2].reshape(2, 9, 48), given[2])
    with only(model, layers[-1:], [torch.tensor([5, 3])]), watched(model, layers[-1:]) as seen:
        logits(model)
    torch.testing.assert_close(seen[0].reshape(2, 9, 2), given[2][..., [5, 3]])
    assert not model.get_submodule(last.down)._forward_pre_hooks


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = make("llama")
    layers, whole = feed_forwards(map_of(model)), logits(model)
    with pytest.raises(RuntimeError, match="stop"), only(model, layers, some(layers, 3)):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), whole)


def test_time_is_that_of_the_layers() -> None:
    model, ticks = make("opt"), iter(range(100))
    with clocked(model, feed_forwards(map_of(model)), now=lambda: float(next(ticks))) as clock:
        logits(model)
    assert (clock.runs, clock.seconds, next(ticks)) == (3, 3.0, 6)


@pytest.mark.parametrize("wrong", [[], [48], [-1]])
def test_neurons_that_are_not_there(wrong: list[int]) -> None:
    model = make("llama")
    layers = feed_forwards(map_of(model))
    with pytest.raises(UserError, match="it has 48, numbers 0 to 47"):
        narrowed(model, layers[:1], [torch.tensor(wrong, dtype=torch.long)])


def test_experts_are_no_feed_forward_layer() -> None:
    sizes = SIZES | KV | {"num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    with pytest.raises(UserError, match="0 linears end a feed-forward layer, and"):
        feed_forwards(map_of(model))
