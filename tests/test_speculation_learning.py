"""A draft that learns while it serves: texts stay the target's, and learning keeps to its bytes and its time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_session import BASE, compiled, make, packed_at
from test_speculation import PROMPT, SMALLER, ahead, calm
from test_worker import Client, worker
from torch import Tensor

import trimtab
from trimtab.core.errors import UserError
from trimtab.core.method import Card, Objective
from trimtab.distill.osd import OSD
from trimtab.engine.learning import FLOOR, NAME, SHORTEST, Learner, Piece
from trimtab.engine.session import Runtime, Writer, generate
from trimtab.engine.speculation import Speculation, speculate
from trimtab.loading import drafter
from trimtab.server.meter import Meter
from trimtab.server.wire import State

assert calm  # one thread, here too


def pupil(objective: Objective | None = None, plain: bool = True, **options: Any) -> tuple[Learner, Writer]:
    """A small draft's learner, and a writer of it."""
    runtime = Runtime(make("LlamaForCausalLM", SMALLER), plain=plain)
    bank = runtime.bank(16)
    learner = Learner(runtime.model, bank, objective or OSD(), rate=2e-2, **options)
    writer = runtime.open(96, bank=bank)
    writer.use(0, NAME)
    return learner, writer


class Wrong(Objective):
    """A loss that is no number from its third call on."""

    card = Card("wrong", paper="", claim="", kinds=frozenset({"head"}))

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, student: Tensor, teacher: Tensor | None, batch: Any, **internals: Any) -> Tensor:
        self.calls += 1
        return student.square().mean() * (math.nan if self.calls > 2 else 1)


def told(learner: Learner, texts: int, length: int = 40, corrections: int = 5) -> None:
    """Texts with corrections, of random numbers."""
    rng = np.random.default_rng(texts)
    for _ in range(texts):
        for position in np.sort(rng.permutation(np.arange(1, length + 1))[:corrections]):
            learner.corrected(0, int(position), rng.standard_normal(99).astype(np.float32))
        learner.ended(0, rng.integers(0, 99, length).tolist())


@pytest.mark.parametrize("plain", [True, pytest.param(False, marks=compiled)])
def test_what_it_learns_the_draft_that_runs_takes_over(plain: bool) -> None:
    learner, draft = pupil(plain=plain)
    own = {name: value.clone() for name, value in learner.module.state_dict().items()}
    tokens = torch.randint(99, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    theirs = 3 * torch.randn(24, 99, generator=torch.Generator().manual_seed(4))

    def logits() -> Tensor:
        draft.forget(0)
        return torch.cat([draft.outputs(tokens[i : i + 8]) for i in range(0, 24, 8)])

    before = logits()
    for _ in range(40):
        for place in range(24):
            learner.corrected(0, place + 1, theirs[place].numpy())
        learner.ended(0, tokens)
        learner.work()
    after = logits()
    assert learner.updates == 40 and learner.nbytes == 0 and not learner.heard
    first, last = (float(OSD().loss(x, theirs, None)) for x in (before, after))
    assert last < 0.7 * first
    expected = learner._logits(tokens).detach()
    assert float((after - expected).abs().max()) < 0.02 * float(expected.abs().max())
    after_all = learner.module.state_dict()
    assert all(torch.equal(after_all[name], value) for name, value in own.items()), "its own weights stay"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_greedy_texts_stay_the_targets_while_the_draft_learns(temperature: float) -> None:
    target = Runtime(make("LlamaForCausalLM", BASE))
    learner, draft = pupil(plain=False)
    writer, speculation = target.open(96), ahead(draft, drafter("it", 3), listener=learner)
    expected = list(generate(target.open(96), PROMPT, 30))
    for seed in range(6):
        found = list(speculate(writer, speculation, PROMPT, 30, temperature=temperature, seed=seed))
        assert len(found) == 30 and (temperature or found == expected)
        learner.work()
    assert learner.updates > 3 and speculation.tally.looked >= speculation.tally.accepted


def test_what_is_kept_of_a_text_are_its_tokens_before_each_correction() -> None:
    learner, _ = pupil()
    learner.length, logits = 16, np.arange(99, dtype=np.float32)
    tokens = list(range(60))
    positions = [3, 20, 21, 37, 44, 60, 61, 63]
    for position in positions:
        learner.corrected(0, position, logits + position)
    learner.ended(0, tokens)
    found = [piece.tokens[place] for piece in learner.buffer for place in piece.places]
    assert found == [position - 1 for position in positions if position <= 60], "what lies after its end is left out"
    for piece in learner.buffer:
        assert len(piece.tokens) <= 16 and piece.tokens == tokens[piece.tokens[0] :][: len(piece.tokens)]
        assert piece.tokens[0] == 0 or min(piece.places) >= 8, "half a piece or more stands before a correction"
    assert learner.buffer[0].logits[0, 0] == -98.0
    assert learner.nbytes == sum(piece.nbytes for piece in learner.buffer)


def test_what_waits_is_bounded_in_bytes_and_the_oldest_goes_first() -> None:
    learner, _ = pupil(most=20_000)
    pieces, sizes = [], []
    for i in range(30):
        told(learner, 1, length=40 + i)
        pieces.append(learner.buffer[-1])
        sizes.append(learner.nbytes)
    assert max(sizes) <= 20_000 + 8 * 80 and min(sizes[-5:]) > 15_000
    assert 1 < len(learner.buffer) < 20
    assert all(a is b for a, b in zip(learner.buffer, pieces[-len(learner.buffer) :], strict=True))
    for position in range(400):  # a text that does not end
        learner.corrected(1, position + 1, np.zeros(99, np.float32))
    assert learner.nbytes <= 20_000 + 8 * 80 and not learner.buffer
    learner.ended(1, [1] * 400)
    learner.work()
    assert learner.nbytes == 0


def test_a_loss_that_is_no_number_ends_it_and_the_draft_goes_on_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    learner, draft = pupil(Wrong())
    told(learner, 6)
    learner.step()
    learner.step()
    good = {path: (down.clone(), up.clone()) for path, (down, up) in learner.bank.held[NAME].factors.items()}
    assert any(bool(up.any()) for _, up in good.values())
    learner.work()
    assert "learns no more" in capsys.readouterr().err and "nan" in learner.stopped
    assert learner.updates == 2 and not learner.buffer and learner.nbytes == 0
    for path, (down, up) in learner.bank.held[NAME].factors.items():
        assert torch.equal(down, good[path][0]) and torch.equal(up, good[path][1])
    target = Runtime(make("LlamaForCausalLM", BASE), plain=True)
    expected = list(generate(target.open(96), PROMPT, 20))
    speculation = ahead(draft, drafter("it", 3), listener=learner)
    assert list(speculate(target.open(96), speculation, PROMPT, 20)) == expected
    learner.work()
    assert learner.nbytes == 0 and learner.updates == 2


@pytest.mark.parametrize("plain", [True, pytest.param(False, marks=compiled)])
def test_factors_that_halves_cannot_hold_are_not_taken_over(plain: bool, capsys: pytest.CaptureFixture[str]) -> None:
    learner, draft = pupil(plain=plain)
    told(learner, 1)
    next(iter(learner.factors.values())).b.data.fill_(1e5)
    learner.work()
    assert learner.stopped and learner.updates == 0 and "halves end" in capsys.readouterr().err
    assert bool(draft.extend(0, PROMPT).isfinite().all())


def test_learning_takes_its_share_of_the_time_while_requests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, _ = pupil(share=0.1, longest=0.05)
    told(learner, 200, corrections=1)
    spent = 0.0

    def step() -> float:
        nonlocal spent
        learner.buffer.popleft()
        spent += 0.03
        return 0.03

    monkeypatch.setattr(learner, "step", step)
    for _ in range(300):
        learner.between(0.02, idle=False)
    assert 0.08 * 6 < spent <= 0.1 * 6 + 0.05
    before = len(learner.buffer)
    for _ in range(10):
        learner.between(0.0, idle=True)
    assert before - len(learner.buffer) == 10, "a piece each time where nobody waits"


def test_pieces_become_short_where_they_take_long() -> None:
    learner, _ = pupil(longest=0.0, context=128)
    lengths = []
    for _ in range(6):
        told(learner, 1, length=128)
        learner.work()
        lengths.append(learner.length)
    assert lengths[-1] == SHORTEST and lengths == sorted(lengths, reverse=True)
    learner.longest = 60.0
    for _ in range(6):
        told(learner, 1, length=128)
        learner.work()
    assert learner.length == 128


@pytest.mark.parametrize("context", [128, 20])
def test_warming_up_changes_nothing(context: int) -> None:
    learner, _ = pupil(context=context, longest=60.0)
    assert learner.length == context, "no more than the draft knows positions"
    before = [p.clone() for factor in learner.factors.values() for p in (factor.a, factor.b)]
    learner.warm()
    assert learner.length == context
    learner.longest = 0.0
    learner.warm()
    assert learner.length == min(SHORTEST, context)
    after = [p for factor in learner.factors.values() for p in (factor.a, factor.b)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_logits_far_below_the_largest_are_kept_finite() -> None:
    learner, _ = pupil()
    logits = np.zeros(99, np.float32)
    logits[3] = -np.inf
    learner.corrected(0, 1, logits)
    learner.ended(0, [1, 2])
    assert isinstance(learner.buffer[0], Piece) and learner.buffer[0].logits[0, 3] == np.float16(FLOOR)
    learner.work()
    assert not learner.stopped and learner.updates == 1


@compiled
def test_a_packed_draft_learns_beside_its_weights() -> None:
    model = make("LlamaForCausalLM", SMALLER | {"hidden_size": 32, "intermediate_size": 64})
    runtime = Runtime(model, packed_at(model, "4b/g32"))
    bank = runtime.bank(16)
    learner = Learner(model, bank, OSD(), rate=2e-2)
    draft = runtime.open(96, bank=bank)
    before = draft.extend(0, PROMPT).clone()
    draft.forget(0)
    draft.use(0, NAME)
    assert torch.equal(draft.extend(0, PROMPT), before), "nothing is learned yet"
    told(learner, 3)
    learner.work()
    draft.forget(0)
    assert not torch.equal(draft.extend(0, PROMPT), before)


# ---- for users


@compiled
def test_texts_one_after_the_other_teach_the_draft() -> None:
    target, draft = trimtab.load("pocket", packed=True), trimtab.load("pocket", packed=True)
    policy = drafter("pocket", 3)
    assert policy is not None
    plain = [target.generate(f"def f{i}(x):", 12, temperature=t) for i, t in ((0, 0.0), (1, 0.0))]
    target.use_draft(draft, policy, learn=True)
    assert [target.generate(f"def f{i}(x):", 12) for i in (0, 1)] == plain
    assert target.learner is not None and isinstance(target.speculation(draft.writer(64)), Speculation)
    given = trimtab.load("pocket", packed=True)
    given.share = True
    given.generate("x", 2)
    with pytest.raises(UserError, match="gave its weights to the kernels"):
        target.use_draft(given, policy, learn=True)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The shipped model's first block, with its tokenizer."""
    import shutil

    from trimtab.models.pocket import POCKET

    folder = tmp_path_factory.mktemp("draft") / "narrow"
    model = trimtab.load("pocket").model
    model.model.layers = model.model.layers[:1]  # type: ignore[union-attr,index]
    model.config.num_hidden_layers = 1  # type: ignore[union-attr]
    model.save_pretrained(folder)  # type: ignore[operator]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(POCKET["pocket"] / name, folder)
    yield folder


@compiled
def test_a_server_whose_draft_learns_serves_the_same_tokens(tmp_path: Path, narrow: Path) -> None:
    prompts = [[5 + i, 6, 7 * i + 9] for i in range(6)]
    plain = trimtab.load("pocket").writer(128)
    expected = [list(generate(plain, prompt, 40)) for prompt in prompts]
    with worker(tmp_path, "--draft", narrow, "--draft-tokens", 3, "--learn") as (_, path):
        client = Client(path)
        for turn in range(3):
            for i, prompt in enumerate(prompts):
                client.do("submit", id=f"{turn}-{i}", tokens=prompt, limit=40, ignore_eos=True)
            for _ in prompts:
                client.next("end")
            assert [client.tokens[f"{turn}-{i}"] for i in range(len(prompts))] == expected
        state = client.next("state")
        while state["running"] or state["pieces"]:
            state = client.next("state")
    assert state["updates"] > 3 and state["learns"] and state["drafted"] >= state["accepted"] > 0


def test_metrics_tell_how_the_draft_does() -> None:
    class Link:
        ready, adapters = None, ()
        state = State(
            1, 0, 0, 1, 0, 0, (), 0, 0, 0, {}, 0, 0, 0, drafted=40, accepted=30, pieces=3, updates=7, learns=True
        )

    lines = Meter().text(Link()).splitlines()  # type: ignore[arg-type]
    said = {line.split("{")[0].removeprefix("trimtab:"): float(line.split()[-1]) for line in lines if "{" in line}
    names = ("drafted_tokens", "accepted_tokens", "draft_learns", "draft_pieces", "draft_updates")
    assert [said[name] for name in names] == [40, 30, 1, 3, 7]
