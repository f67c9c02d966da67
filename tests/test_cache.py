"""Caches of which older tokens are packed, remade or dropped, on torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from conftest import Said
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Remembered
from trimtab.engine.cache import Caching, Held, PackedLayer, SieveLayer
from trimtab.engine.session import Runtime, map_of
from trimtab.formats.cache import CacheFormat, Plain
from trimtab.kv.retrievalattention import RetrievalAttention
from trimtab.kv.sirllm import SirLLM
from trimtab.kv.think import Channels, ThinK

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(120)]

SHAPE = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256}
GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 256}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SHAPE),
    "all heads": ("LlamaForCausalLM", SHAPE | {"num_key_value_heads": 6}),
    "biases": ("Qwen2ForCausalLM", {k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "one linear": ("GPT2LMHeadModel", GPT2),
    "half turned": ("StableLmForCausalLM", {k: v for k, v in SHAPE.items() if k != "head_dim"}),
}
NORMED = ("Qwen3ForCausalLM", SHAPE)
EXACT = (  # settings under which nothing is lost but what 16 bits lose
    "think(prune=0.0, residual=16)",
    "xquant(bits=16, residual=16)",
    "xquant(bits=16, residual=16, latent=False)",
    "xquant-cl(bits=16, base_bits=16, base=1, residual=16)",
    "cskv(keep=1.0, residual=16)",
    "retrievalattention(top=16, beam=16, near=4, links=4, entries=2, residual=16)",
    "sirllm(residual=16)",
)
LOSSY = (
    "think(prune=0.4, residual=16)",
    "xquant(bits=2, residual=16)",
    "xquant-cl(bits=2, base=1, residual=16)",
    "cskv(keep=0.25, residual=16)",
    "retrievalattention(top=4, beam=8, near=4, links=4, entries=2, sinks=2, residual=16)",
    "sirllm(start=2, memory=10, recent=2, residual=16)",
)


def make(name: str, options: dict[str, Any]) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter *= 1 if parameter.ndim == 1 else 3
    return model


def caching_of(model: Any, text: str) -> Caching:
    form = CacheFormat.parse(text)
    keeper = form.worker()
    assert keeper is not None and not form.compiled
    return Caching(keeper, form.window, model, map_of(model), lambda: tokens(4, 64, seed=1))


def tokens(texts: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(97, (texts, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def written(caching: Caching, ids: Tensor, most: int) -> tuple[Tensor, Held]:
    """Logits of all tokens, read in steps of at most so many."""
    cache = caching.new()
    cuts = CacheFormat(window=caching.window).cuts(0, ids.shape[1], most)
    return torch.cat([caching.run(cache, ids[:, a:b]).logits for a, b in cuts], 1), cache


@pytest.mark.parametrize("text", EXACT)
@pytest.mark.parametrize("name", MODELS)
def test_a_cache_that_keeps_all_gives_what_the_model_gives(name: str, text: str) -> None:
    model, ids = make(*MODELS[name]), tokens(2, 60)
    if name == "one linear" and text.startswith("sirllm"):
        ids = ids[:, :16]  # nothing can be moved there
    expected = model(input_ids=ids).logits
    for most in (16, 7):
        found, cache = written(caching_of(model, text), ids, most)
        assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())
        assert cache.get_seq_length() == ids.shape[1] == cache.read


@pytest.mark.parametrize("text", LOSSY)
def test_what_a_token_sees_does_not_depend_on_the_cuts(text: str) -> None:
    caching, ids = caching_of(make(*MODELS["llama"]), text), tokens(2, 70)
    whole, cache = written(caching, ids, 16)
    pieces, other = written(caching, ids, 1)
    assert torch.allclose(whole, pieces, atol=2e-3 * float(whole.abs().max()))
    exact = caching.model(input_ids=ids).logits  # type: ignore[misc]
    assert float((whole[:, :16] - exact[:, :16]).abs().max()) < 0.02 * float(exact.abs().max())
    assert float((whole[:, 16:] - exact[:, 16:]).abs().max()) > 0.01 * float(exact.abs().max()), "nothing was lost"
    assert cache.nbytes == other.nbytes


@pytest.mark.parametrize("text", LOSSY)
def test_a_session_goes_back_and_on(text: str) -> None:
    model, ids = make(*MODELS["llama"]), tokens(1, 70)[0].tolist()
    writer = Runtime(model).open(128, cache=text, sample=lambda: tokens(4, 64, seed=1))
    first = writer.extend(0, ids).clone()
    writer.forget(0)
    assert torch.allclose(writer.extend(0, ids), first, atol=1e-5)
    if not text.startswith("sirllm"):  # what it forgot does not come back
        writer.forget(0, 64)
        assert torch.allclose(writer.extend(0, ids[64:]), first, atol=1e-5)
        writer.forget(0, 66)
        assert torch.allclose(writer.extend(0, ids[66:]), first, atol=1e-5)
        with pytest.raises(UserError, match=r"go back to token 40, within a window of 16 that is packed"):
            writer.forget(0, 40)


def test_bytes_are_those_of_what_is_held() -> None:
    model, ids = make(*MODELS["llama"]), tokens(1, 33)
    _, cache = written(caching_of(model, "think(prune=0.5, residual=16)"), ids, 16)
    layer = cache.layers[0]
    assert isinstance(layer, PackedLayer) and len(layer.stored) == 2
    kept = 16 * 2 * (4 + 8) * 2 + 2  # tokens, heads, channels of keys and of values, 16 bits; a bit for each channel
    assert layer.stored[0].nbytes == kept
    assert layer.nbytes == 2 * kept + 2 * (8 + 8) * 2 + 6 * 8 * 2  # and a token with its queries
    _, cache = written(caching_of(model, "xquant(bits=4, group=16, residual=16)"), ids, 16)
    layer = cache.layers[0]
    assert isinstance(layer, PackedLayer)
    grids = 16 * (16 // 16) * 4
    assert layer.stored[0].nbytes == 2 * (16 * 16 // 2 + grids)


def test_think_keeps_the_channels_that_queries_meet() -> None:
    rng = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 2, 32, 10, generator=rng).unbind()
    queries[0, :, 3], keys[1, :, 4], queries[:, :16, 5] = 0.0, 0.0, 100.0
    stored = ThinK(prune=0.1, observed=16).store(keys, keys, queries=queries)
    lost = (stored.keys.dense() == 0).all(1)
    assert lost.nonzero().tolist() == [[0, 3], [1, 4]]
    assert isinstance(stored.keys, Channels) and isinstance(stored.values, Plain)
    with pytest.raises(UserError, match=r"think was given prune=1.5 for keys of 10 channels"):
        ThinK(prune=1.5).store(keys, keys, queries=queries)


def test_sirllm_keeps_first_newest_and_surprising_tokens_where_they_are_moved_to() -> None:
    model, ids = make(*MODELS["llama"]), tokens(1, 48)
    caching = caching_of(model, "sirllm(start=2, memory=6, recent=2, residual=16)")
    with torch.no_grad():
        cache = caching.new()
        caching.run(cache, ids[:, :16])
        surprise = cache.surprise[0]
        caching.run(cache, ids[:, 16:32])
    told = model(input_ids=ids[:, :16]).logits.log_softmax(-1)[0]
    assert torch.allclose(surprise[1:], -told[:-1].gather(-1, ids[0, 1:16, None])[:, 0], atol=1e-2)
    stay = [0, 1, *sorted((2 + surprise[2:14].argsort(descending=True)[:6]).tolist()), 14, 15]
    assert cache.origin[0].tolist() == [*stay, *range(16, 32)]
    layer, place = cache.layers[0], caching.place(0, 0)
    assert isinstance(layer, SieveLayer) and cache.get_seq_length() == 26
    projection = caching.projection(0)
    block = model.model.layers[0]
    held = block.input_layernorm(model.model.embed_tokens(ids[:, cache.origin[0]]))
    assert torch.allclose(layer.keys.float(), place(held @ projection.key.T), atol=0.02)


def test_sirllm_holds_no_more_than_it_was_given_however_long_the_text() -> None:
    caching = caching_of(make(*MODELS["llama"]), "sirllm(start=2, memory=6, recent=4, decay=0.5, residual=16)")
    sizes = [written(caching, tokens(2, count), 16)[1].nbytes for count in (28, 60, 300)]
    assert len(set(sizes)) == 1
    for fields in ({"start": -1}, {"start": 0, "memory": 0}, {"decay": 2.0}):
        with pytest.raises(UserError, match="sirllm was given"):
            SirLLM(**fields).decide(Remembered(torch.zeros(1, 3), torch.zeros(1, 3)))  # type: ignore[arg-type]


def test_a_search_of_everything_finds_the_largest_products() -> None:
    keys, queries = torch.randn(2, 1, 80, 8, generator=torch.Generator().manual_seed(0)).unbind()
    exact = (queries @ keys.transpose(-1, -2)).topk(8, -1).indices
    method = RetrievalAttention(top=8, beam=80, near=20, links=40, entries=8, sinks=0)
    reading = method.store(keys, keys, queries=queries, first=0).read(queries)
    assert bool(reading.taken.gather(-1, exact).all()) and bool((reading.taken.sum(-1) == 8).all())
    reading = (
        RetrievalAttention(top=8, beam=12, near=8, links=8, sinks=0)
        .store(keys, keys, queries=queries, first=0)
        .read(queries)
    )
    found = float(reading.taken.gather(-1, exact).float().mean())
    looked = float(reading.visits.float().mean() / 80)
    assert found > looked + 0.1, "no better than looking at as many keys at random"
    assert bool((reading.visits >= 8).all()) and bool((reading.visits <= 80).all())
    with pytest.raises(UserError, match="the beam is no less than top or entries"):
        RetrievalAttention(top=8, beam=4).store(keys, keys, queries=queries, first=0)


def test_models_that_do_not_show_what_is_needed_are_refused() -> None:
    model = make(*NORMED)
    with pytest.raises(
        UserError, match=r"xquant makes keys anew .* in layer 0 of this model they come out with an error"
    ):
        written(caching_of(model, "xquant(residual=16)"), tokens(1, 20), 16)
    written(caching_of(model, "think(residual=16)"), tokens(1, 20), 16)
    with pytest.raises(UserError, match=r"sirllm moves keys to other positions"):
        written(caching_of(make(*MODELS["one linear"]), "sirllm(memory=4, residual=16)"), tokens(1, 20), 16)
    with pytest.raises(UserError, match=r"cskv prepares itself on a sample of text"):
        Runtime(make(*MODELS["llama"])).open(64, cache="cskv(residual=16)").extend(0, [1, 2, 3])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("think(keep=0.4)", "method think has no field 'keep'"),
        ("think(prune='much')", "method think: prune='much' was given"),
        ("think(residual=0)", "windows of 0 tokens"),
        ("think(", "unknown cache 'think\\('"),
        ("gptq", "unknown cache 'gptq'"),
        ("xquant-cl(bits=)", "has fields that cannot be read"),
    ],
)
def test_texts_that_name_no_cache_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        CacheFormat.parse(text)


def test_a_text_of_a_cache_parses_back() -> None:
    for text in (*EXACT, *LOSSY, "kivi2/g32", "kivi(bits=3)"):
        assert str(CacheFormat.parse(str(CacheFormat.parse(text)))) == str(CacheFormat.parse(text))


def test_the_command_takes_a_method_of_caches(cli: Any) -> None:
    said: Said = cli("run", "pocket", "--prompt", "import os\n" * 12, "--tokens", "5", "--cache", LOSSY[3], "--json")
    found = said.json()
    assert found["engine"].startswith("torch") and found["tokens"] == 5 and math.isfinite(found["seconds"])
    assert cli("run", "pocket", "--prompt", "import os", "--cache", "thinks").code == 2
