"""CoreInfer: core neurons by hand, groups of texts, text that is written with a part of the neurons."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Said
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Selector
from trimtab.core.view import Prompted
from trimtab.engine.neurons import NeuronSession, feed_forwards, only
from trimtab.engine.session import Runtime, TorchSession, generate, map_of
from trimtab.loading import load, selector
from trimtab.serve.coreinfer import CoreInfer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(180)]

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
PROMPT = [5, 17, 80, 3, 44, 9, 61]


def make() -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (1.0 if parameter.ndim == 1 else 0.3))
    return model


def opened(model: Any, policy: Selector | None, cache: str = "fp32") -> TorchSession:
    sample = torch.randint(97, (6, 12), generator=torch.Generator().manual_seed(1))
    session = Runtime(model, plain=True).open(64, cache=cache, sample=lambda: sample, neurons=policy)
    assert isinstance(session, TorchSession)
    return session


def plain(given: Tensor, share: float, alpha: float) -> set[int]:
    """Core neurons of a sentence, token by token."""
    counts, sums = [0] * given.shape[1], [0.0] * given.shape[1]
    for token in given.tolist():
        active = sorted((n for n, a in enumerate(token) if a > 0), key=lambda n: -token[n])
        for n in active[: max(1, int(alpha * len(active)))] if active else []:
            counts[n] += 1
        for n in active:
            sums[n] += token[n]
    best = sorted(range(given.shape[1]), key=lambda n: (-counts[n], -sums[n]))
    return set(best[: round(share * given.shape[1])])


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_core_neurons_are_those_of_the_definitions(share: float, alpha: float) -> None:
    given = torch.randn(9, 30, generator=torch.Generator().manual_seed(2))
    given[3] = -1.0  # a token that activates none
    (found,) = CoreInfer(share=share, token_share=alpha).decide(Prompted((given,)))
    assert set(found.tolist()) == plain(given, share, alpha)
    (large,) = CoreInfer(share=share, token_share=alpha, signed=False).decide(Prompted((given,)))
    assert set(large.tolist()) == plain(given.abs(), share, alpha)


def test_an_odd_share_is_met_exactly_even_where_few_neurons_are_activated() -> None:
    given = torch.zeros(2, 10)
    given[:, 7] = 1.0
    (found,) = CoreInfer(share=0.33).decide(Prompted((given,)))
    assert len(found) == 3 and 7 in found.tolist()


def test_a_prompt_takes_the_core_neurons_of_the_texts_that_are_like_it() -> None:
    rng = torch.Generator().manual_seed(3)

    def text(first: int) -> tuple[Tensor, ...]:
        given = 0.1 * torch.rand(12, 20, generator=rng)
        given[:, first : first + 10] += 1.0
        return given, given.flip(-1)

    policy = CoreInfer(share=0.5, token_share=0.5, guide="similarity", groups=2)
    groups = policy.prepare(text(10 * (i % 2)) for i in range(8))
    for first in (0, 10):
        one, two = policy.decide(Prompted(text(first), groups))
        assert one.tolist() == list(range(first, first + 10))
        assert two.tolist() == list(range(10 - first, 20 - first))


@pytest.mark.parametrize("fields", ["share=0.0", "share=1.2", "token_share=0", "guide='both'", "groups=0"])
def test_fields_that_cannot_be(fields: str) -> None:
    with pytest.raises(UserError, match="shares are above 0 and at most 1"):
        selector(f"coreinfer({fields})")


def test_what_chooses_no_neurons() -> None:
    with pytest.raises(UserError, match="which it does not; these do: coreinfer"):
        selector("s-lora")


@pytest.mark.parametrize("guide", ["stability", "similarity"])
def test_text_goes_on_with_the_neurons_of_its_prompt(guide: str) -> None:
    model, policy = make(), CoreInfer(share=0.25, guide=guide)
    session = opened(model, policy)
    whole = opened(model, None)
    assert isinstance(session, NeuronSession)
    torch.testing.assert_close(session.extend(0, PROMPT), whole.extend(0, PROMPT))
    chosen, layers = session.chosen[0], feed_forwards(map_of(model))
    assert [len(some) for some in chosen] == [12, 12]
    for token in (8, 30):
        with only(model, layers, chosen):
            expected = whole.step({0: token})
        torch.testing.assert_close(session.step({0: token}), expected, atol=1e-5, rtol=1e-5)
    assert session.chosen[0] is chosen and session.written.runs == 4 and session.read.runs == 2
    assert session.written.seconds > 0


def test_all_neurons_write_the_model_s_text() -> None:
    model = make()
    texts = [list(generate(opened(model, p), PROMPT, 20)) for p in (CoreInfer(share=1.0), None, CoreInfer(share=0.1))]
    assert texts[0] == texts[1] != texts[2]


def test_texts_are_apart_and_a_new_one_chooses_anew() -> None:
    session = opened(make(), CoreInfer(share=0.25))
    assert isinstance(session, NeuronSession)
    session.extend(0, PROMPT)
    session.extend(1, PROMPT[::-1][:3])
    first, second = session.chosen[0], session.chosen[1]
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = session.step({1: 7})
    session.forget(1, 3)
    torch.testing.assert_close(session.step({0: 7, 1: 7})[1], alone[0])
    session.forget(0)
    session.extend(0, PROMPT[::-1][:3])
    assert all(torch.equal(a, b) for a, b in zip(session.chosen[0], second, strict=True))


def test_a_prompt_longer_than_a_window_of_a_packed_cache_counts_whole() -> None:
    model, prompt = make(), torch.arange(3, 43).tolist()
    session = opened(model, CoreInfer(share=0.25), cache="think(prune=0.0, residual=16)")
    whole = opened(model, CoreInfer(share=0.25))
    assert isinstance(session, NeuronSession) and isinstance(whole, NeuronSession)
    session.extend(0, prompt)
    whole.extend(0, prompt)
    same = [float(torch.isin(a, b).float().mean()) for a, b in zip(session.chosen[0], whole.chosen[0], strict=True)]
    assert min(same) > 0.9  # a cache of 16 bits may move one that was near the edge


# ---- the command


def test_run_says_which_neurons_wrote(cli: Callable[..., Said], tiny: Path) -> None:
    said = cli("run", tiny, "--prompt", "def f(", "--tokens", "5", "--neurons", "coreinfer(share=0.25)", "--json")
    found = said.json()
    assert said.code == 0 and found["engine"].startswith("torch")
    assert found["neurons"]["kept"] == [32, 32] and found["neurons"]["of"] == [128, 128]
    assert 0 < found["neurons"]["share_of_decode"] < 1
    said = cli("run", tiny, "--prompt", "def f(", "--tokens", "5", "--neurons", "coreinfer")
    assert said.code == 0 and "layer by layer: 51 of 128, 51 of 128; they took" in said.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--neurons", "coreinfer(share=2)"], "share=2"),
        (["--neurons", "coreinver"], "did you mean 'coreinfer'"),
        (["--neurons", "coreinfer(part=1)"], "no field 'part'"),
        (["--neurons", "kivi"], "was asked to choose neurons, which it does not"),
        (["--neurons", "coreinfer", "--adapter", "some"], "an adapter was asked for beside a choice of neurons"),
        (["--neurons", "coreinfer", "--draft", "some"], "a draft was asked for beside a choice of neurons"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    cli: Callable[..., Said], options: list[str], expected: str
) -> None:
    said = cli("run", "no-such-model", "--prompt", "a", *options)
    assert said.code == 2 and expected in said.err and "Traceback" not in said.err and "no-such-model" not in said.err


def test_a_model_without_feed_forward_layers(cli: Callable[..., Said], tiny: Path, tmp_path: Path) -> None:
    sizes = SIZES | {"vocab_size": 4096, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    model.save_pretrained(tmp_path, save_original_format=False)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    said = cli("run", tmp_path, "--prompt", "def f(", "--tokens", "5", "--neurons", "coreinfer")
    assert said.code == 2 and "no such layer whose neurons stand apart" in said.err and "Traceback" not in said.err


def test_the_library_refuses_what_the_command_refuses(tiny: Path) -> None:
    loaded = load(tiny, neurons="coreinfer")
    with pytest.raises(UserError, match="an adapter was asked for"):
        loaded.add_adapter("a", tiny)
    with pytest.raises(UserError, match="a draft was asked for"):
        loaded.use_draft(load(tiny), None)  # type: ignore[arg-type]
