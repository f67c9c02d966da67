"""Texts that a draft writes ahead of: beside the target alone, which must write the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serving import CONTEXT, PLACES, ROWS, Bench, orders, run, written
from test_session import BASE, MODELS, compiled, make, packed_at
from test_worker import Client, worker

import trimtab
from trimtab.core.errors import UserError
from trimtab.core.method import Drafter, method
from trimtab.core.view import Drafting
from trimtab.distill.osd import OSD
from trimtab.engine.books import Books, replay
from trimtab.engine.drawing import drawn, probabilities
from trimtab.engine.session import Runtime, Writer, generate
from trimtab.engine.speculation import Speculation, check_vocabulary, judge, speculate
from trimtab.kernels.native import native
from trimtab.serve.adaptive_drafting import AdaptiveDrafting
from trimtab.serve.speculative_decoding import SpeculativeDecoding
from trimtab.server.worker import main
from trimtab.tasks.drafts import padded, topics

PROMPT = [5, 17, 3, 88, 41, 2, 60]
SMALLER = BASE | {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 40}


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """One thread, with which models this small are fastest."""
    before, kernels = torch.get_num_threads(), native()
    theirs = kernels.threads() if kernels else 1
    torch.set_num_threads(1)
    if kernels:
        kernels.set_threads(1)
    yield
    torch.set_num_threads(before)
    if kernels:
        kernels.set_threads(theirs)


class Whatever(Drafter):
    """As many as a generator says, whatever happened."""

    def __init__(self, seed: int, most: int = 9) -> None:
        self.rng, self.most = np.random.default_rng(seed), most

    def decide(self, view: Any, **extra: Any) -> int:
        return int(self.rng.integers(0, min(self.most, view.room) + 1))


def ahead(draft: Writer, policy: Drafter, **options: Any) -> Speculation:
    return Speculation(draft, policy, vocabulary=99, **options)


def chi_square(counts: np.ndarray, chances: np.ndarray) -> float:
    """How far counts are from chances, in standard deviations of chi-square; cells expected under 8 times are one."""
    expected = counts.sum() * chances
    rare = expected < 8
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return float(((counts - expected) ** 2 / expected).sum() - (len(counts) - 1)) / (2 * (len(counts) - 1)) ** 0.5


# ---- the same tokens


@compiled
@pytest.mark.parametrize("level", [None, "4b/g32", "8b/row", "nvfp4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_of_a_step_do_not_depend_on_what_is_beside_them(name: str, level: str | None) -> None:
    """What the identity of greedy texts rests on: bit for bit, in whatever pieces tokens come."""
    model = make(*MODELS[name])
    runtime = Runtime(model, packed_at(model, level) if level else {})
    texts = torch.randint(99, (3, 60), generator=torch.Generator().manual_seed(2)).tolist()
    alone, together = (runtime.open(64, sequences=3, chunk=48, cache="fp16", most=48) for _ in range(2))
    expected = [torch.cat([alone.step({i: token}).clone() for token in text]) for i, text in enumerate(texts)]
    rng, done = np.random.default_rng(0), [0, 0, 0]
    while min(done) < 60:
        counts = {i: int(min(rng.integers(1, 12), 60 - done[i])) for i in range(3) if done[i] < 60}
        logits = together.score({i: texts[i][done[i] : done[i] + count] for i, count in counts.items()})
        for (i, count), rows in zip(counts.items(), logits.split(list(counts.values())), strict=True):
            assert torch.equal(rows, expected[i][done[i] : done[i] + count])
            done[i] += count


@compiled
@pytest.mark.parametrize("level", [None, "4b/g32"])
@pytest.mark.parametrize("kind", ["itself", "rounded", "another", "other vocabulary"])
def test_greedy_text_is_that_of_the_target_alone(level: str | None, kind: str) -> None:
    model = make(*MODELS["llama"])
    target = Runtime(model, packed_at(model, level) if level else {})
    drafts = {
        "itself": lambda: target,
        "rounded": lambda: Runtime(model, packed_at(model, "3b/g16")),
        "another": lambda: Runtime(make("LlamaForCausalLM", SMALLER)),
        "other vocabulary": lambda: Runtime(make("LlamaForCausalLM", SMALLER | {"vocab_size": 120})),
    }
    draft, writer = drafts[kind]().open(128), target.open(128)
    expected = list(generate(target.open(128), PROMPT, 100))
    for policy in (SpeculativeDecoding(), SpeculativeDecoding(tokens=1), AdaptiveDrafting(), Whatever(0)):
        speculation = ahead(draft, policy)
        assert list(speculate(writer, speculation, PROMPT, 100)) == expected
        tally = speculation.tally
        assert tally.steps + tally.accepted == 99, "every token but the first is of a step or accepted"
        if kind == "itself":
            assert tally.accepted == tally.drafted > 0


@compiled
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 98), min_size=1, max_size=40), st.integers(1, 60))
def test_greedy_text_with_any_draft_and_any_number(seed: int, prompt: list[int], limit: int) -> None:
    model = make(*MODELS["llama"])
    target = Runtime(model, packed_at(model, "4b/g32"))
    torch.manual_seed(seed)
    other = make("LlamaForCausalLM", SMALLER)
    for parameter in other.parameters():
        parameter += 0.5 * torch.randn_like(parameter)
    expected = list(generate(target.open(128), prompt, limit))
    found = list(speculate(target.open(128), ahead(Runtime(other).open(96), Whatever(seed)), prompt, limit))
    assert found == expected


@compiled
@pytest.mark.parametrize("cache", ["kivi4/r64", "kivi2/r64", "bf16"])
def test_what_a_cache_has_packed_is_not_taken_back(cache: str) -> None:
    target = Runtime(make(*MODELS["llama"]))
    expected = list(generate(target.open(128, cache=cache), PROMPT, 120))
    for draft in (target, Runtime(make("LlamaForCausalLM", SMALLER))):
        speculation = ahead(draft.open(128), SpeculativeDecoding(tokens=7))
        assert list(speculate(target.open(128, cache=cache), speculation, PROMPT, 120)) == expected
        assert speculation.tally.drafted > 100


def test_on_torch_too() -> None:
    target, draft = (Runtime(make("LlamaForCausalLM", sizes), plain=True) for sizes in (BASE, SMALLER))
    expected = list(generate(target.open(64), PROMPT, 30))
    for other in (target, draft):
        assert list(speculate(target.open(64), ahead(other.open(64), Whatever(1)), PROMPT, 30)) == expected


@compiled
def test_a_text_ends_at_its_stop_token_and_leaves_no_trace() -> None:
    target = Runtime(make(*MODELS["llama"]))
    expected = list(generate(target.open(64), PROMPT, 40))
    stop = expected[11]
    writer, speculation = target.open(64), ahead(target.open(64), SpeculativeDecoding(tokens=5))
    first = expected.index(stop)
    for _ in range(2):
        assert list(speculate(writer, speculation, PROMPT, 40, stop=frozenset({stop}))) == expected[:first]
        assert not speculation.held and not speculation.past


# ---- the same distribution


def test_the_rule_of_acceptance_keeps_the_targets_distribution() -> None:
    """Chi-square of the first and the second token over 3000 draws; a rule that takes all it is offered fails it."""
    rng = np.random.default_rng(0)
    targets = 1.5 * rng.standard_normal((3, 12))
    drafts = targets[:2] + rng.standard_normal((2, 12))
    for top_p in (1.0, 0.8):
        p, q = ([probabilities(row, 0.9, top_p) for row in rows] for rows in (targets, drafts))
        counts, taken, second = np.zeros(12), np.zeros(12), np.zeros(12)
        for _ in range(3000):
            proposed = [drawn(shares, rng) for shares in q]
            tokens = judge(targets, proposed, q, rng, 0.9, top_p)
            counts[tokens[0]] += 1
            taken[proposed[0]] += 1
            if len(tokens) > 1:
                second[tokens[1]] += 1
        assert chi_square(counts, p[0]) < 4 and chi_square(second, p[1]) < 4
        assert not counts[p[0] == 0].any()
        assert chi_square(taken, p[0]) > 8
        expected = np.minimum(p[0], q[0]).sum()
        assert second.sum() / counts.sum() == pytest.approx(expected, abs=0.03), "theorem 3.5: 1 - the distance"


@compiled
@pytest.mark.parametrize("same", [False, True])
def test_sampled_texts_have_the_targets_distribution(same: bool) -> None:
    """Of the second and the third token of a text, whose exact chances are sums over all that may come before."""
    model = make("LlamaForCausalLM", BASE | {"vocab_size": 11})
    target = Runtime(model)
    draft = target if same else Runtime(make("LlamaForCausalLM", SMALLER | {"vocab_size": 11}))
    writer, other = target.open(32), draft.open(32)
    prompt, warmth = [1, 2, 3], 1.5
    first = probabilities(writer.extend(0, prompt).numpy(), warmth)
    chances = np.zeros((11, 11))
    for token in range(11):
        writer.forget(0, 3)
        chances[token] = first[token] * probabilities(writer.step({0: token})[0].numpy(), warmth)
    third = np.zeros(11)
    for pair in np.ndindex(11, 11):
        writer.forget(0, 3)
        third += chances[pair] * probabilities(writer.extend(0, list(pair)).numpy(), warmth)
    pairs, last = np.zeros((11, 11)), np.zeros(11)
    for seed in range(3000):
        speculation = Speculation(other, SpeculativeDecoding(tokens=2), vocabulary=11)
        a, b, c = speculate(writer, speculation, prompt, 3, temperature=warmth, seed=seed)
        pairs[a, b] += 1
        last[c] += 1
    assert chi_square(pairs.ravel(), chances.ravel()) < 4 and chi_square(last, third) < 4
    assert chi_square(last, np.roll(third, 1)) > 20


# ---- how many


def test_more_is_drafted_where_more_is_accepted() -> None:
    policy = AdaptiveDrafting()
    asked = [policy.decide(Drafting(20, ((4, accepted),) * 20)) for accepted in (0, 1, 2, 3, 4)]
    assert asked == sorted(asked) and asked[0] <= 1 and asked[-1] == 8
    assert policy.decide(Drafting(2, ((4, 4),) * 20)) == 2 and policy.decide(Drafting(0)) == 0
    assert AdaptiveDrafting(cost=1.0).decide(Drafting(9, ((4, 2),) * 20)) == 0
    assert policy.decide(Drafting(9, ((4, 0),) * 30 + ((0, 0),) * 32)) > 0, "it is tried again"
    for wrong in ({"prior": 1.0}, {"most": -1}, {"weight": 0.0}, {"cost": -1.0}):
        with pytest.raises(UserError, match="adaptive-drafting was asked for"):
            AdaptiveDrafting(**wrong).decide(Drafting(4))
    with pytest.raises(UserError, match="asked for -1 tokens"):
        SpeculativeDecoding(tokens=-1).decide(Drafting(4))


# ---- for users


def test_drafts_with_other_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"the draft tiny has 2 tokens and the model 3, and 3 of them are not in both"):
        check_vocabulary({"a": 0, "b": 2}, {"a": 0, "b": 1, "c": 2}, "tiny")
    loaded = trimtab.load("pocket")
    with pytest.raises(UserError, match="pocket-cnn is for classification"):
        loaded.use_draft(trimtab.load("pocket-cnn"), SpeculativeDecoding())


@compiled
def test_run_takes_a_draft(cli: Any) -> None:
    line = ("run", "pocket", "--prompt", "def f(x):", "--tokens", "12", "--threads", "1", "--json")
    alone, fixed = cli(*line).json(), cli(*line, "--draft", "pocket", "--draft-tokens", "3").json()
    assert alone["text"] == fixed["text"] and "draft" not in alone
    assert fixed["draft"]["accepted"] == fixed["draft"]["drafted"] > 6 and fixed["draft"]["tokens_per_step"] > 2
    said = cli("run", "pocket", "--prompt", "x", "--tokens", "3", "--draft", "pocket")
    assert said.code == 0 and "drafted ones were accepted" in said.err
    said = cli("run", "pocket", "--draft-tokens", "3")
    assert said.code == 2 and "--draft-tokens was given without --draft" in said.err
    said = cli("run", "pocket", "--draft", "pocket", "--draft-tokens", "16")
    assert said.code == 2 and "1 to 15 tokens at a time" in said.err
    said = cli("run", "pocket", "--prompt", "x", "--draft", "pocket-cnn")
    assert said.code == 2 and "is for classification" in said.err


# ---- served


@compiled
@pytest.mark.parametrize("kind", ["itself", "another"])
def test_requests_served_with_a_draft_get_what_they_get_alone(kind: str) -> None:
    """With adapters, which the draft does not know, and requests that come while others write."""
    bench, trace = Bench(), []
    service = bench.service("s-lora", trace=trace)
    sizes: dict[str, Any] = {"sequences": PLACES, "chunk": ROWS, "cache": "fp32", "paged": True}
    other = bench.runtime if kind == "itself" else Runtime(make("LlamaForCausalLM", SMALLER))
    service.ahead = ahead(other.open(CONTEXT, **sizes), Whatever(0, 4))
    asked = [replace(order, temperature=0.0) for order in orders(12)]
    numbers = [service.submit(order) for order in asked[:7]]
    books = dict(service.open)
    events = [event for _ in range(9) for event in service.tick()]
    numbers += [service.submit(order) for order in asked[7:]]
    books |= service.open
    events += run(service)
    found = written(events)
    assert [found[number] for number in numbers] == [bench.alone(order) for order in asked]
    tally = service.ahead.tally
    plain = [book.drafts for book in books.values() if book.order.adapter is None]
    assert tally.drafted > 50 and sum(drafts.drafted for drafts in plain) > 10
    if kind == "itself":
        assert all(drafts.accepted == drafts.drafted for drafts in plain)
    assert sum(book.drafts.accepted for book in books.values()) == tally.accepted
    assert not service.ahead.held and sorted(service.places) == list(range(PLACES)) and not service.books.running
    again = Books(method("s-lora"), ROWS, PLACES, service.books.pool, service.books.pages)
    assert replay(trace, again) == [happened.decision for happened in trace]


@compiled
def test_a_worker_serves_with_a_draft(tmp_path: Path) -> None:
    prompt = [5, 6, 7]
    expected = list(generate(trimtab.load("pocket").writer(64), prompt, 20))
    with worker(tmp_path, "--draft", "pocket", "--draft-tokens", 3) as (_, path):
        client = Client(path)
        assert client.ask("a", *prompt, limit=20) == expected
        state = client.next("state")
        while state["running"]:
            state = client.next("state")
        assert state["drafted"] >= state["accepted"] >= 14 and state["pages"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--draft-tokens", "3"], "without --draft"),
        (["--draft", "pocket", "--draft-tokens", "0"], "1 to 15 tokens at a time"),
        (["--draft", "pocket", "--draft-tokens", "16"], "1 to 15 tokens at a time"),
        (["--learn"], "--learn was given without --draft"),
        (["--draft", "pocket-cnn"], "is for classification"),
        (["--policy", "adaptive-drafting"], "is no policy of serving"),
    ],
)
def test_a_worker_says_what_is_wrong_with_a_draft(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["pocket", "--socket", str(tmp_path / "engine"), *options])
    assert caught.value.code == 2 and said in capsys.readouterr().err


# ---- what claims and benchmarks try it on


def test_a_padded_target_is_the_same_function() -> None:
    model = make("LlamaForCausalLM", BASE)
    wide, tokens = padded(model, 160), torch.tensor([PROMPT])
    assert wide.model.layers[0].mlp.down_proj.weight.shape == (48, 160)
    assert torch.allclose(wide(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-5)


def test_prompts_of_a_topic_are_of_one_document_where_that_is_asked() -> None:
    tokenizer = trimtab.load("pocket").tokenizer
    wide, narrow = (topics(tokenizer, 0, 6, 24, within=within) for within in (0, 1))
    assert list(narrow) == ["code", "prose", "tables"] and wide != narrow
    assert {len(prompt) for prompts in narrow.values() for prompt in prompts} == {24}
    assert topics(tokenizer, 0, 6, 24, within=1) == narrow


# ---- what a draft learns by


def test_the_divergences_of_osd() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([[0.2, 0.2, 0.6], [0.1, 0.7, 0.2]])

    def kl(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * (a / b).log()).sum(1).mean())

    m = (p + q) / 2
    expected = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}
    for divergence, value in expected.items():
        assert float(OSD(divergence).loss(q.log() + 3, p.log() - 1, None)) == pytest.approx(value, rel=1e-5)
    with pytest.raises(UserError, match="asked for the divergence 'sideways'"):
        OSD("sideways").loss(q, p, None)
