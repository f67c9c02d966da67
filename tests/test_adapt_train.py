"""The training loop and its data: what resumes, what stops, and what a bad line says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from battery import seeded
from test_structure import filled, gpt2, llama
from torch import Tensor, nn

from trimtab.adapt.lora import LoRA
from trimtab.core.errors import UserError
from trimtab.core.level import Int, Rank
from trimtab.engine.run import PackedLinear
from trimtab.engine.train import LOG, Recipe, order, train
from trimtab.formats.checkpoint import Checkpoint
from trimtab.models.source import open_source
from trimtab.quant.rtn import RTN
from trimtab.tasks.examples import read_examples, split_examples, windows
from trimtab.tasks.training import Prediction


def problem(seed: int = 0) -> tuple[nn.Module, Prediction]:
    model = filled(lambda: llama(2)).requires_grad_(False)
    for block in model.model.layers:
        block.mlp.down_proj = LoRA().wrap(block.mlp.down_proj, Rank(2), rng=seeded(seed))
    tokens = torch.randint(0, model.config.vocab_size, (12, 16), generator=seeded(1))
    return model, Prediction({"input_ids": tokens}, tokens, {"use_cache": False})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def test_the_loss_falls_and_two_runs_are_the_same() -> None:
    runs = []
    for _ in range(2):
        model, loss = problem()
        runs.append((train(model, loss, len(loss), Recipe(steps=12, rate=0.02), adam(model)), weights(model)))
    assert runs[0][0].log[-1]["loss"] < runs[0][0].log[0]["loss"]
    assert torch.equal(runs[0][1], runs[1][1])


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    found = []
    for micro in (0, 1, 3):
        model, loss = problem()
        loss.labels = loss.labels.clone()
        loss.labels[::2, :9] = -100  # uneven numbers of predictions
        train(model, loss, len(loss), Recipe(steps=3, batch=4, micro=micro), adam(model))
        found.append(weights(model))
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-5)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_a_run_that_was_cut_off_goes_on_with_the_same_bytes(tmp_path: Path, make: type) -> None:
    recipe = Recipe(steps=8, rate=0.01, every=2)

    def run(folder: Path, resume: bool, stop: int | None) -> Tensor:
        model, loss = problem()
        optimiser = make([p for p in model.parameters() if p.requires_grad], lr=0.01)

        def watch(step: int, value: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        try:
            train(model, loss, len(loss), recipe, optimiser, folder, resume=resume, watch=watch)
        except KeyboardInterrupt:
            assert step_of(folder) == 4
        return weights(model)

    def step_of(folder: Path) -> int:
        return int(next(folder.glob("checkpoint-*.safetensors")).stem.split("-")[1])

    whole = run(tmp_path / "whole", False, None)
    run(tmp_path / "cut", False, 5)
    assert torch.equal(run(tmp_path / "cut", True, None), whole)
    rows = [json.loads(line) for line in (tmp_path / "cut" / LOG).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9)), "each step once"
    assert sorted(p.name for p in (tmp_path / "cut").glob("checkpoint*")) == ["checkpoint-8.safetensors"]


def test_a_loss_that_is_no_number_stops_and_names_the_step(tmp_path: Path) -> None:
    model, loss = problem()

    def spoilt(module: nn.Module, places: Tensor) -> tuple[Tensor, int]:
        value, count = loss(module, places)
        spoilt.calls += 1
        return (value * float("nan") if spoilt.calls == 6 else value), count

    spoilt.calls = 0
    with pytest.raises(UserError, match=r"step 6: .*checkpoint, of step 4"):
        train(model, spoilt, len(loss), Recipe(steps=9, every=2), adam(model), tmp_path / "run")
    kept = Checkpoint(tmp_path / "run" / "checkpoint-4.safetensors")
    assert all(bool(kept.read(n).isfinite().all()) for n in kept.names() if n.startswith("parameters/"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    model, loss = problem()
    train(model, loss, len(loss), Recipe(steps=1), adam(model), tmp_path / "run", identity={"method": "lora"})
    for resume, identity in ((False, "lora"), (True, "paca")):
        with pytest.raises(UserError, match="--out"):
            train(
                model,
                loss,
                12,
                Recipe(steps=1),
                adam(model),
                tmp_path / "run",
                resume=resume,
                identity={"method": identity},
            )


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = problem()

    def full(step: int, value: float) -> None:
        if step == 3:
            monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))

    with pytest.raises(UserError, match="disk is full"):
        train(model, loss, len(loss), Recipe(steps=6, every=2), adam(model), tmp_path / "run", watch=full)
    monkeypatch.undo()
    assert Checkpoint(tmp_path / "run" / "checkpoint-2.safetensors").names()
    model, loss = problem()
    train(model, loss, len(loss), Recipe(steps=6, every=2), adam(model), tmp_path / "run", resume=True)


def test_the_chunked_loss_is_believed_only_where_it_is_the_plain_one() -> None:
    for make in (lambda: llama(2), gpt2):
        model = filled(make)
        tokens = torch.randint(0, model.config.vocab_size, (3, 9), generator=seeded(1))
        loss = Prediction({"input_ids": tokens}, tokens)
        value, count = loss(model, torch.arange(3))
        assert loss.lean and count == 24
        plain = model(input_ids=tokens, labels=tokens).loss
        assert torch.allclose(value / count, plain, rtol=1e-5)
    packed = filled(lambda: llama(2))
    tokens = torch.randint(0, packed.config.vocab_size, (3, 9), generator=seeded(1))
    packed.lm_head = PackedLinear(RTN().solve(packed.lm_head.weight.detach(), Int(4, 16)), None)
    loss = Prediction({"input_ids": tokens}, tokens)
    value, count = loss(packed, torch.arange(3))
    assert loss.lean and torch.allclose(value / count, packed(input_ids=tokens, labels=tokens).loss, rtol=1e-5)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda m, a, out: out.tanh())
    capped = Prediction({"input_ids": tokens}, tokens)
    value, count = capped(model, torch.arange(3))
    assert not capped.lean
    assert torch.allclose(value / count, model(input_ids=tokens, labels=tokens).loss, rtol=1e-5)


def test_every_item_comes_once_a_pass() -> None:
    seen = torch.cat([order(10, 3, step, seed=1) for step in range(10)])
    assert sorted(seen.tolist()) == sorted([*range(10)] * 3)


@pytest.mark.parametrize(
    "recipe", [{"steps": 0}, {"rate": 0.0}, {"schedule": "cosin"}, {"warmup": 1.0}, {"codec": "int3"}], ids=str
)
def test_recipes_that_cannot_be_are_refused(recipe: dict) -> None:
    with pytest.raises(UserError):
        Recipe(**recipe)


# ---- data


LINES = [
    {"messages": [{"role": "user", "content": "what is two and two"}, {"role": "assistant", "content": "four"}]},
    {"prompt": "def f(x):", "completion": " return x"},
    {"instruction": "add", "input": "1 2", "output": "3"},
    {"text": "import os\n" * 40},
]


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_prompts_are_read_and_answers_predicted(tmp_path: Path) -> None:
    tokenizer = open_source("pocket-lm").tokenizer()
    examples, bad = read_examples(write(tmp_path / "a.jsonl", LINES))
    assert len(examples) == 4 and not bad
    for example, answer in zip(examples, ("four\n", " return x", "3"), strict=False):
        found = windows([example], tokenizer, 64)
        wanted = found.labels[0][found.labels[0] != -100]
        assert tokenizer.decode(wanted[:-1]) == answer and int(wanted[-1]) == tokenizer.eos_token_id
        assert bool((found.tokens[found.labels != -100] == wanted).all())
    packed, apart = windows(examples, tokenizer, 64), windows(examples, tokenizer, 64, pack=False)
    assert len(packed) < len(apart) and int(packed.bytes.sum()) == int(apart.bytes.sum())


def test_examples_longer_than_a_window_are_counted(tmp_path: Path) -> None:
    tokenizer = open_source("pocket-lm").tokenizer()
    examples, _ = read_examples(write(tmp_path / "a.jsonl", [{"prompt": "x = ", "completion": "one two " * 100}]))
    assert windows(examples, tokenizer, 32).truncated == 1
    with pytest.raises(UserError, match="nothing to predict"):
        windows(
            read_examples(write(tmp_path / "b.jsonl", [{"prompt": "word " * 99, "completion": "y"}]))[0], tokenizer, 16
        )


@pytest.mark.parametrize("line", ['{"text": ', "[1]", '{"messages": []}', '{"prompt": "a"}', '{"text": 3}', "{}"])
def test_a_bad_line_is_named_or_left_out_and_counted(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "bad.jsonl", [LINES[1], "", line, LINES[2]])
    with pytest.raises(UserError, match="line 3"):
        read_examples(path)
    examples, bad = read_examples(path, skip_bad=True)
    assert (len(examples), bad) == (2, 1)
    with pytest.raises(UserError, match="no example"):
        read_examples(write(tmp_path / "none.jsonl", [line]), skip_bad=True)


def test_what_is_kept_apart_is_never_trained_on(tmp_path: Path) -> None:
    examples, _ = read_examples(
        write(tmp_path / "a.jsonl", [{"prompt": f"{i}", "completion": "y"} for i in range(200)])
    )
    ours, apart = split_examples(examples)
    assert not set(ours) & set(apart) and len(ours) + len(apart) == 200 and 5 <= len(apart) <= 40
    (tmp_path / "t.txt").write_text("word " * 1000)
    text, end = split_examples(read_examples(tmp_path / "t.txt")[0])
    assert len(text[0].pieces[0][0]) == 4500 and len(end[0].pieces[0][0]) == 500
    with pytest.raises(UserError, match="no data file"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no example"):
        read_examples(tmp_path / "empty.jsonl")
