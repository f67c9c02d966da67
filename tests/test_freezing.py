"""Freezing: what is frozen has no gradient and no state, and a run goes on with the same bytes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from test_adapt_train import weights
from test_structure import filled, llama
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Policy, method
from trimtab.core.view import Layer, Turn
from trimtab.engine.freezing import Freezing
from trimtab.engine.train import Recipe, train
from trimtab.tasks.training import Prediction


def blocks(model: nn.Module) -> dict[str, int]:
    names = [name for name, _ in model.named_modules() if name.startswith("model.layers.")]
    return {name: int(name.split(".")[2]) for name in names}


def problem(policy: str, **config: float) -> tuple[nn.Module, Prediction, torch.optim.Optimizer, Freezing]:
    model = filled(lambda: llama(3)).requires_grad_(True)
    tokens = torch.randint(0, model.config.vocab_size, (12, 16), generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    chosen = method(policy, **config)
    assert isinstance(chosen, Policy)
    return (
        model,
        Prediction({"input_ids": tokens}, tokens, {"use_cache": False}),
        optimiser,
        Freezing(model, blocks(model), chosen, optimiser, 8),
    )


def test_only_drawn_blocks_move_and_hold_anything() -> None:
    model, loss, optimiser, freezing = problem("lisa", blocks=1, every=3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, loss, len(loss), Recipe(steps=3), optimiser, freezing=freezing)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    found = {int(n.split(".")[2]) for n in moved if n.startswith("model.layers.")}
    assert len(found) == 1 and "model.embed_tokens.weight" in moved
    for name, param in model.named_parameters():
        assert (param in optimiser.state) is (name in moved) and (param.grad is not None) is (name in moved)


def test_blocks_change_when_their_time_is_over() -> None:
    model, loss, optimiser, freezing = problem("lisa", blocks=1, every=1)
    seen = set()
    train(
        *(model, loss, len(loss), Recipe(steps=8), optimiser),
        freezing=freezing,
        watch=lambda step, value: seen.add(freezing.active),
    )
    assert len(seen) == 3


def test_each_layer_has_its_turn_and_then_those_that_move_most() -> None:
    model, loss, optimiser, freezing = problem("slimfit", frozen=0.5)
    seen: list[tuple[str, ...]] = []
    train(
        *(model, loss, len(loss), Recipe(steps=6), optimiser),
        freezing=freezing,
        watch=lambda step, value: seen.append(freezing.active),
    )
    assert set(seen[0]) | set(seen[1]) == set(freezing.layers) and set(freezing.changes) == set(freezing.layers)
    assert all(0 < change < 1 for change in freezing.changes.values())


@pytest.mark.parametrize(("policy", "config"), [("lisa", {"blocks": 1, "every": 3}), ("slimfit", {"frozen": 0.7})])
def test_a_run_that_was_cut_off_goes_on_with_the_same_bytes(
    policy: str, config: dict[str, float], tmp_path: Path
) -> None:
    def run(folder: Path, resume: bool, stop: int | None) -> Tensor:
        model, loss, optimiser, freezing = problem(policy, **config)

        def watch(step: int, value: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            train(
                *(model, loss, len(loss), Recipe(steps=8, every=2), optimiser, folder),
                **{"freezing": freezing, "resume": resume, "watch": watch},
            )
        return weights(model.requires_grad_(True))

    whole = run(tmp_path / "whole", False, None)
    run(tmp_path / "cut", False, 5)
    assert torch.equal(run(tmp_path / "cut", True, None), whole)


def test_what_cannot_be_is_refused() -> None:
    layers = tuple(Layer(f"layers.{i}", i, 1) for i in range(3))
    turn = Turn(0, 10, layers, ())
    for config in ({"blocks": 4}, {"blocks": 0}, {"every": 0}):
        with pytest.raises(UserError, match="1 to 3 blocks"):
            method("lisa", **config).decide(turn, rng=torch.Generator())  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="0 to below 1"):
        method("slimfit", frozen=1.0).decide(turn, changes={})  # type: ignore[attr-defined]
