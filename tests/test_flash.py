"""Feed-forward weights on disk: what is held and read, and that the text is that of the same model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

from trimtab.cli import app, main
from trimtab.core.errors import UserError
from trimtab.core.method import Pager, discover
from trimtab.core.view import Held
from trimtab.engine.flash import Flash, Watch, shared, write_flash
from trimtab.engine.neurons import FeedForward, activations, feed_forwards, masked
from trimtab.engine.session import map_of
from trimtab.flashing import load_flash
from trimtab.formats.bundles import Bundles
from trimtab.models.pocket import POCKET
from trimtab.parts.activity import predictor
from trimtab.parts.frozen import Frozen
from trimtab.serve.llm_in_a_flash import LLMInAFlash

TOKENS = torch.randint(99, (2, 24), generator=torch.Generator().manual_seed(1))


def made(kind: str, activation: str = "relu") -> nn.Module:
    """A small model; `opt` has biases and no gate, `gpt2` transposed matrices, `fused` one linear for gate and up."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        OPTConfig,
        OPTForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
    )

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "opt":
        config = OPTConfig(**sizes, ffn_dim=40, word_embed_proj_dim=16, activation_function=activation)
        model: nn.Module = OPTForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    elif kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=99, n_embd=16, n_inner=40, n_layer=2, n_head=2, activation_function=activation)
        )
    elif kind == "fused":
        model = Phi3ForCausalLM(Phi3Config(**sizes, intermediate_size=40, hidden_act=activation, pad_token_id=0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=40, hidden_act=activation))
    return model.eval().requires_grad_(False)


def opened(
    model: nn.Module, path: Path, room: int, rank: int = 0, window: int = 5, **options: Any
) -> tuple[Flash, tuple[FeedForward, ...]]:
    layers = feed_forwards(map_of(model))
    watch = Watch(model, layers, rank)
    activations(model, layers, TOKENS)
    watch.close()
    write_flash(path, watch, lambda p: Frozen(model.get_submodule(p)).weight(), torch.float32)
    return Flash(model, layers, Bundles(path), LLMInAFlash(window), room, **options), layers


# ---- what is held


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(0, 6), st.lists(st.sets(st.integers(0, 15), max_size=16), max_size=12))
def test_what_is_held_fits_and_is_that_of_the_window(fit: int, window: int, tokens: list[set[int]]) -> None:
    idle, held = np.full(16, 99), np.zeros(16, np.bool_)
    for at, needed in enumerate(tokens):
        idle += 1
        idle[list(needed)] = 0
        before = set(np.flatnonzero(held).tolist())
        change = LLMInAFlash(window).decide(Held(idle.copy(), held.copy(), fit * 10 + 9, 10))
        load, drop = set(change.load.tolist()), set(change.drop.tolist())
        assert load <= needed and drop <= before and not load & (before - drop)
        after = before - drop | load
        assert len(after) <= fit
        recent = set().union(*tokens[max(at - window + 1, 0) : at + 1]) if window else needed
        assert after <= recent, "what no token of the window needs is let go"
        if len(needed) <= fit:
            assert needed <= after
        if len(recent) <= fit and window and all(len(t) <= fit for t in tokens[: at + 1]):
            assert load == needed - before
        held[:] = False
        held[list(after)] = True


def test_the_oldest_go_first_and_what_cannot_be_is_said() -> None:
    view = Held(np.array([0, 1, 3, 2]), np.array([False, True, True, True]), 300, 100)
    change = LLMInAFlash().decide(view)
    assert change.load.tolist() == [0] and change.drop.tolist() == [2]
    for policy, room in ((LLMInAFlash(-1), 300), (LLMInAFlash(), 99)):
        with pytest.raises(UserError, match="a window from 0 and room for at least one neuron"):
            policy.decide(Held(view.idle, view.held, room, 100))


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6), st.integers(0, 500))
def test_a_room_is_shared_and_never_exceeded(layers: list[tuple[int, int]], room: int) -> None:
    least, most = [a for a, _ in layers], [a + b for a, b in layers]
    given_ = shared(least, most, room)
    assert (given_ is None) == (room < sum(least))
    if given_ is not None:
        assert sum(given_) <= room and all(a <= g <= m for a, g, m in zip(least, given_, most, strict=True))


# ---- what is written


@pytest.mark.parametrize("kind", ["llama", "opt", "fused", "gpt2"])
@pytest.mark.parametrize(("room", "window"), [(1 << 20, 5), (11_000, 5), (11_000, 0), (11_000, 100)])
def test_exact_gives_what_the_whole_model_gives(tmp_path: Path, kind: str, room: int, window: int) -> None:
    model = made(kind)
    flash, layers = opened(model, tmp_path / "a.safetensors", room, window=window)
    expected = model(input_ids=TOKENS).logits
    for path in (p for at in layers for p in (*at.paths, at.down)):
        model.get_submodule(path).weight = nn.Parameter(torch.empty(0), requires_grad=False)
    writer = flash.open(TOKENS.shape[1])
    for row, text in enumerate(TOKENS.tolist()):
        found = torch.cat([writer.outputs(text[:9], row), writer.extend(row, text[9:])[None]])
        assert torch.allclose(found[:9], expected[row, :9], rtol=0, atol=1e-5)
        assert torch.allclose(found[-1], expected[row, -1], rtol=0, atol=1e-5)
    assert flash.held_bytes <= room
    tally = flash.tally
    assert tally.tokens == TOKENS.numel() and tally.met <= tally.needed
    assert (tally.met == 0) == (window == 0)


@pytest.mark.parametrize("kind", ["llama", "opt", "fused"])
def test_predicted_neurons_give_what_they_give_in_memory(tmp_path: Path, kind: str) -> None:
    model = made(kind)
    flash, layers = opened(model, tmp_path / "a.safetensors", 16_000, rank=4, threshold=0.6)
    found = torch.stack([flash.open(TOKENS.shape[1]).outputs(text) for text in TOKENS.tolist()])
    read: dict[int, Tensor] = {}
    for i, at in enumerate(layers):
        module = model.get_submodule(at.paths[0])
        module.register_forward_pre_hook(lambda m, a, i=i: read.__setitem__(i, a[0]))
    taken: list[Tensor] = []

    def keep(i: int, h: Tensor) -> Tensor:
        taken.append(flash.layers[i].deciding(read[i]) > flash.layers[i].limit)
        return taken[-1].reshape(h.shape)

    with masked(model, layers, keep):
        expected = model(input_ids=TOKENS).logits
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert flash.tally.needed == sum(int(t.sum()) for t in taken) > 0
    assert not all(bool(t.all()) for t in taken)


def test_more_window_reads_less(tmp_path: Path) -> None:
    sizes = []
    for window in (0, 1, 4):
        flash, _ = opened(made("llama"), tmp_path / f"{window}.safetensors", 1 << 20, window=window)
        flash.open(TOKENS.shape[1]).outputs(TOKENS[0].tolist())
        sizes.append(flash.tally.bytes)
        assert flash.tally.report()["bytes_per_token"] == flash.tally.bytes / TOKENS.shape[1]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give at least 1MB"):
        opened(made("llama"), tmp_path / "a.safetensors", 2000)
    for name in ("silu", "gelu"):
        with pytest.raises(UserError, match="take a model with ReLU"):
            opened(made("llama", name), tmp_path / "b.safetensors", 1 << 20)
    with pytest.raises(UserError, match="a probability above 0"):
        opened(made("llama"), tmp_path / "c.safetensors", 1 << 20, threshold=1.0)
    flash, _ = opened(made("llama"), tmp_path / "d.safetensors", 1 << 20)
    with pytest.raises(UserError, match="keeps keys and values plain"):
        flash.open(24, cache="kivi2")
    with pytest.raises(UserError, match="adapter"):
        flash.bank()


def test_another_model_s_file_is_refused(tmp_path: Path) -> None:
    opened(made("llama"), tmp_path / "a.safetensors", 1 << 20)
    other = made("opt")
    with pytest.raises(UserError, match="delete"):
        Flash(other, feed_forwards(map_of(other)), Bundles(tmp_path / "a.safetensors"), LLMInAFlash(), 1 << 20)


def test_predictors_learn_what_can_be_learned() -> None:
    rng = torch.Generator().manual_seed(0)
    x, way = torch.randn(2000, 8, generator=rng), torch.randn(8, 30, generator=rng)
    active = x @ way > 2
    deciding = predictor(x[:1500], active[:1500], 8, epochs=40)
    found = deciding(x[1500:]) > 0
    missed = (active[1500:] & ~found).sum() / active[1500:].sum()
    needless = (found & ~active[1500:]).sum() / (~active[1500:]).sum()
    assert missed < 0.1 and needless < 0.1
    assert deciding.nbytes == 4 * (8 * 8 + 30 * 8 + 30)


def test_it_is_a_policy_of_its_own_kind() -> None:
    assert issubclass(discover()["llm-in-a-flash"], Pager)


# ---- from the command line


@pytest.fixture(scope="module")
def relu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with ReLU."""
    folder = tmp_path_factory.mktemp("relu") / "model"
    folder.mkdir()
    for file in POCKET["pocket"].iterdir():
        if file.name == "config.json":
            config = json.loads(file.read_text("utf-8")) | {"hidden_act": "relu"}
            (folder / file.name).write_text(json.dumps(config), "utf-8")
        else:
            (folder / file.name).symlink_to(file)
    return folder


def test_run_writes_the_model_s_own_text(relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("trimtab.flashing.SAMPLE", (2, 64))
    arguments = ["run", str(relu), "--prompt", "import os", "--tokens", "8", "--json"]
    done = CliRunner().invoke(app, [*arguments, "--flash", "10MB"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["text"] == json.loads(CliRunner().invoke(app, [*arguments, "--cache", "fp32"]).stdout)["text"]
    assert 0 < found["flash"]["held_bytes"] <= 10_000_000 and 0 < found["flash"]["hit_share"] < 1
    assert found["flash"]["bytes_per_token"] > 0 and "on disk" in found["engine"]
    files = list((tmp_path / "trimtab" / "flash").iterdir())
    before = files[0].stat().st_mtime_ns
    assert len(files) == 1
    again = CliRunner().invoke(app, [*arguments[:-1], "--flash", "10MB"])
    assert again.exit_code == 0 and "of the neurons in memory" in again.stderr
    assert files[0].stat().st_mtime_ns == before, "bundles are written once"
    files[0].write_bytes(files[0].read_bytes()[:-100])
    with pytest.raises(UserError, match="cut off"):
        load_flash(str(relu), 10_000_000)


@pytest.mark.parametrize(
    ("model", "rest", "said"),
    [
        ("pocket-lm", ["--flash", "64MB"], "take a model with ReLU"),
        ("pocket-cnn", ["--flash", "64MB"], "give a causal language model"),
        ("pocket-lm", ["--flash", "much"], "is not a positive number"),
        ("pocket-lm", ["--flash-rank", "8"], "without --flash"),
        ("pocket-lm", ["--flash", "64MB", "--draft", "pocket-lm"], "leave one of the two out"),
        ("no-model", ["--flash", "64MB"], "there is no model"),
    ],
)
def test_what_run_cannot_do_is_one_sentence(
    model: str,
    rest: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("trimtab.flashing.SAMPLE", (1, 64))
    with pytest.raises(SystemExit) as stopped:
        main(["run", model, "--prompt", "a", *rest])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is written of what cannot be run"
