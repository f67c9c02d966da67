"""Programs made of whole models, beside the models themselves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import artifact_of
from torch import Tensor, nn

import trimtab
from trimtab.core.errors import UserError
from trimtab.core.level import parse_level
from trimtab.core.method import method
from trimtab.engine import memory
from trimtab.engine import session as sessions
from trimtab.engine.drawing import draw
from trimtab.engine.program import compile_form
from trimtab.engine.session import Runtime, Session, Timing, TorchSession, Writer, generate, map_of
from trimtab.formats.cache import CacheFormat
from trimtab.formats.packed import Packed
from trimtab.kernels.native import native
from trimtab.models.source import open_source

compiled = pytest.mark.skipif(native() is None, reason="no kernels were compiled")
EXACT = 2e-6  # fp32 in another order, as a share of the largest logit
BASE: dict[str, Any] = {
    **{"vocab_size": 99, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}
OPT: dict[str, Any] = {
    **{"vocab_size": 99, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 128, "word_embed_proj_dim": 48, "bos_token_id": 0, "eos_token_id": 1},
}
GPT2: dict[str, Any] = {
    **{"vocab_size": 99, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
    **{"scale_attn_by_inverse_layer_idx": True, "bos_token_id": 0, "eos_token_id": 1},
}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BIASED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", BASE),
    "llama, tied, biased, gelu": ("LlamaForCausalLM", BASE | BIASED),
    "llama, scaled rope": (
        "LlamaForCausalLM",
        BASE | {"rope_parameters": ROPE | {"original_max_position_embeddings": 32}, "head_dim": 10},
    ),
    "llama, one head of keys": ("LlamaForCausalLM", BASE | {"num_key_value_heads": 1, "head_dim": 256}),
    "qwen2": ("Qwen2ForCausalLM", BASE),
    "qwen3": ("Qwen3ForCausalLM", BASE | {"head_dim": 16}),
    "mistral": ("MistralForCausalLM", BASE | {"sliding_window": 9}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "opt": ("OPTForCausalLM", OPT),
    "opt, gelu, no bias": ("OPTForCausalLM", OPT | {"activation_function": "gelu", "enable_bias": False}),
}


def make(name: str, options: dict[str, Any]) -> Any:
    """A model with random weights; norms and biases too, which would otherwise be ones and zeros."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter *= 4
    return model


def packed_at(model: nn.Module, level: str) -> dict[str, Callable[[], Packed]]:
    """Every weight of a model rounded to a level, by the name of its parameter."""
    found, solver = map_of(model), method("rtn")
    first = {name: names[0] for names in found.tied for name in names}
    made: dict[str, Callable[[], Packed]] = {}
    for site in found.sites:
        if site.role == "position":
            continue
        weight = model.get_submodule(site.path).weight.detach()
        packed = solver.solve((weight.T if site.transposed else weight).contiguous(), parse_level(level))
        name = f"{site.path}.weight"
        made[first.get(name, name)] = lambda packed=packed: packed
    return made


def logits(runtime: Runtime, tokens: Tensor, cuts: list[int], cache: str = "fp32") -> Tensor:
    """Logits of all positions, the tokens given in chunks."""
    assert runtime.form is not None
    sizes = {"rows": max(cuts), "outputs": max(cuts), "sequences": 1, "context": sum(cuts)}
    session = Session(*compile_form(runtime.form, runtime.weights, **sizes, cache=CacheFormat.parse(cache)))
    return torch.cat([session.outputs(part.tolist()) for part in tokens.split(cuts)])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    """One thread of torch, with which models this small are fastest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- every architecture


@compiled
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_program_gives_the_models_logits(name: str) -> None:
    model = make(*MODELS[name])
    tokens = torch.randint(99, (120,), generator=torch.Generator().manual_seed(1))
    runtime = Runtime(model)
    assert isinstance(runtime.open(128), Session)
    expected = model(input_ids=tokens[None]).logits[0]
    assert error(logits(runtime, tokens, [70, 33, *[1] * 17]), expected) < EXACT
    assert error(logits(runtime, tokens, [1] * 120), expected) < EXACT
    assert error(logits(runtime, tokens, [120], "fp16"), expected) < 2e-3
    assert error(logits(runtime, tokens, [120], "bf16"), expected) < 2e-2


@compiled
@pytest.mark.parametrize("name", ["llama, tied, biased, gelu", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("level", ["4b/g16", "8b/row", "2b/g16", "nvfp4"])
@torch.no_grad()
def test_program_of_packed_weights(name: str, level: str) -> None:
    """With the arithmetic of the kernels in both: torch by its plain statement, the program by the kernels."""
    model = make(*MODELS[name])
    packed = packed_at(model, level)
    for path, read in packed.items():  # what a table is read as is the unpacked weight, on either side
        module = model.get_submodule(path.removesuffix(".weight"))
        if isinstance(module, nn.Embedding):
            module.weight.copy_(read().dense())
    runtime = Runtime(model, packed)
    assert isinstance(runtime.open(128), Session)
    plain = Runtime(model, packed, plain=True).open(128)
    assert isinstance(plain, TorchSession)
    tokens = torch.randint(99, (40,), generator=torch.Generator().manual_seed(1))
    with sessions.lent(model, plain.forwards):
        expected = model(input_ids=tokens[None]).logits[0]
    assert error(logits(runtime, tokens, [25, *[1] * 15]), expected) < 2e-2


@compiled
@torch.no_grad()
def test_weights_give_way_and_the_model_still_runs() -> None:
    model = make(*MODELS["llama, tied, biased, gelu"])
    tokens = torch.randint(99, (1, 20))
    expected = model(input_ids=tokens).logits
    Runtime(model, share=True).open(64)
    assert all(p.is_meta for p in model.parameters() if p.ndim > 1)
    assert error(model(input_ids=tokens).logits, expected) < EXACT


# ---- refusals


@compiled
def test_unknown_models_run_on_torch_and_say_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = make("OPTForCausalLM", OPT | {"do_layer_norm_before": False})
    runtime = Runtime(model)
    assert isinstance(runtime.open(64), TorchSession) and isinstance(runtime.open(128), TorchSession)
    assert capsys.readouterr().err.count("runs on torch, slower: it has a norm after the branch") == 1


@compiled
@pytest.mark.parametrize("spoilt", ["scaling", "eps", "embedding"])
def test_program_that_is_wrong_is_refused(spoilt: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The form takes facts from attributes; what changes behind its back shows in the outputs."""
    model = make(*MODELS["llama"])
    runtime = Runtime(model)
    if spoilt == "scaling":
        model.model.layers[1].self_attn.scaling *= 2
    elif spoilt == "eps":
        model.model.norm.variance_epsilon = 10.0
    else:
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 3)
    assert isinstance(runtime.open(64), TorchSession)
    assert "outputs that a program of its form gives with an error of" in capsys.readouterr().err


@compiled
def test_what_does_not_fit_into_memory_is_refused_with_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(make(*MODELS["llama"]))
    monkeypatch.setattr(memory, "free_bytes", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"needs .* MB, and 1 MB are free: .*ask for a context of at most \d+ tokens"):
        runtime.open(100_000)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    with pytest.raises(UserError, match="take a smaller artifact or free memory"):
        runtime.open(100)


def test_artifact_that_does_not_fit_is_refused_before_it_is_read(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = sum(p.stat().st_size for p in run.artifact.rglob("*"))
    monkeypatch.setattr(memory, "free_bytes", lambda: stored + 100)
    with pytest.raises(UserError, match=r"needs .* are free; load it with packed=True"):
        trimtab.load(run.artifact)
    assert trimtab.load(run.artifact, packed=True).task == "causal-lm"
    monkeypatch.setattr(memory, "free_bytes", lambda: stored // 2)
    with pytest.raises(UserError, match="free some, or fit the model to fewer"):
        trimtab.load(run.artifact, packed=True)


# ---- writing


@compiled
@torch.no_grad()
def test_sequences_written_together_are_those_written_alone() -> None:
    model = make(*MODELS["qwen3"])
    writer = Runtime(model).open(128, sequences=3, chunk=16, cache="fp32")
    prompts = [list(range(3, 50)), [7], list(range(90, 70, -1))]
    texts = [[int(writer.extend(i, prompt).argmax())] for i, prompt in enumerate(prompts)]
    for step in range(12):
        alive = [i for i in range(3) if i != 1 or step < 6]  # one ends early
        found = writer.step({i: texts[i][-1] for i in alive})
        for row, i in zip(found, alive, strict=True):
            texts[i].append(int(row.argmax()))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == list(generate(TorchSession(model, {}, 128), prompt, len(text)))


@compiled
def test_forgotten_tokens_are_written_over() -> None:
    writer = Runtime(make(*MODELS["llama"])).open(128)
    first = writer.extend(0, [1, 2, 3, 4, 5]).clone()
    writer.extend(0, [9, 9, 9])
    writer.forget(0, 3)
    assert torch.allclose(writer.extend(0, [4, 5]), first, rtol=0, atol=1e-4)
    writer.forget(0)
    with pytest.raises(ValueError, match="not within the context of 128"):
        writer.extend(0, [1] * 129)


def agreed(writer: Writer, other: Writer, ids: list[int], steps: int) -> int:
    """How many tokens are the same, each reading what the first wrote. Where an activation lies between two of its
    8-bit steps, noise in the last bit of fp32 decides; so two tokens that are as good as equal may change places.
    """
    writer.forget(0)
    other.forget(0)
    ours, theirs = writer.extend(0, ids), other.extend(0, ids)
    same = 0
    for _ in range(steps):
        token, size = int(ours.argmax()), float(theirs.abs().max())
        assert error(ours, theirs) < 5e-2 and float(theirs.max() - theirs[token]) < 5e-3 * size
        same += token == int(theirs.argmax())
        ours, theirs = (w.step({0: token})[0] for w in (writer, other))
    return same


@compiled
@pytest.mark.parametrize("level", ["4b/g32", "8b/g32", "3b/g64"])
def test_compiled_and_plain_torch_write_the_same(level: str) -> None:
    source = open_source("pocket")
    model, tokenizer = source.materialise(), source.tokenizer()
    packed = packed_at(model, level)
    model.get_input_embeddings().weight.data = packed["model.embed_tokens.weight"]().dense()
    writer, other = Runtime(model, packed).open(256), Runtime(model, packed, plain=True).open(256)
    assert isinstance(writer, Session) and isinstance(other, TorchSession)
    prompts = ("import os", "def main(args):\n    ", "class Foo(object):\n")
    texts = [[0, *tokenizer(prompt, add_special_tokens=False)["input_ids"]] for prompt in prompts]
    assert sum(agreed(writer, other, ids, 64) for ids in texts) >= 185  # of 192


@compiled
@pytest.mark.parametrize("cache", ["kivi2", "kivi4", "kivi2/g64/r64"])
def test_packed_caches_write_what_torch_writes(cache: str) -> None:
    """However the prompt was cut, and after cuts back into a packed window."""
    source = open_source("pocket")
    model, tokenizer = source.materialise(), source.tokenizer()
    ids = [0, *tokenizer(Path(sessions.__file__).read_text("utf-8"), add_special_tokens=False)["input_ids"]][:300]
    runtime, plain = Runtime(model), Runtime(model, plain=True)
    writer, other = runtime.open(512, cache=cache), plain.open(512, cache=cache)
    assert isinstance(writer, Session) and isinstance(other, TorchSession) and runtime.form is not None
    assert writer.program.cache_bytes == runtime.form.cache_bytes(512, 1, CacheFormat.parse(cache))
    assert agreed(writer, other, ids, 64) == 64
    pieces = runtime.open(512, chunk=37, cache=cache)
    writer.forget(0)
    assert torch.equal(pieces.extend(0, ids), writer.extend(0, ids))
    for length in (256, 200, 40):
        found = []
        for one in (writer, other):
            one.forget(0, length)
            found.append(one.extend(0, ids[length:290]).clone())
        assert error(*found) < 1e-2


def test_a_packed_cache_takes_a_fraction_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(make(*MODELS["qwen2"]))
    if runtime.form is not None:
        full, packed = (runtime.form.cache_bytes(100_000, 2, CacheFormat.parse(c)) for c in ("fp16", "kivi2"))
        monkeypatch.setattr(memory, "free_bytes", lambda: full)
        with pytest.raises(UserError, match="ask for a context of at most"):
            runtime.open(100_000, sequences=2)
        assert packed < full / 3
    with pytest.raises(UserError, match=r"unknown cache 'int3'; a cache is fp16"):
        runtime.open(64, cache="int3")


@compiled
@torch.no_grad()
def test_threads_may_change_between_steps() -> None:
    kernels, model = native(), make(*MODELS["llama"])
    assert kernels is not None
    before, writer = kernels.threads(), Runtime(model, packed_at(model, "4b/g16")).open(128)
    try:
        found = []
        for threads in (1, 3):
            kernels.set_threads(threads)
            writer.forget(0)
            found.append(writer.extend(0, list(range(90))).clone())
        assert error(*found) < 5e-2
    finally:
        kernels.set_threads(before)


@compiled
def test_timing() -> None:
    writer, timing = Runtime(make(*MODELS["llama"])).open(64), Timing()
    found = list(generate(writer, [1, 2, 3], 9, timing=timing))
    assert len(found) == timing.tokens == 9 and timing.prompt == 3 and timing.decode > 0 and timing.prefill > 0
    assert list(generate(writer, [1, 2, 3], 9, stop=frozenset({found[4]}))) == found[: found.index(found[4])]


def test_tokens_are_drawn_by_their_chance() -> None:
    logits = np.array([2.0, -np.inf, 0.5, 1.0], np.float32)
    rng = np.random.default_rng(0)
    assert draw(logits, rng) == 0
    drawn = np.bincount([draw(logits, rng, 0.7) for _ in range(4000)], minlength=4) / 4000
    chance = torch.softmax(torch.from_numpy(logits) / 0.7, 0).numpy()
    assert drawn[1] == 0 and np.abs(drawn - chance).max() < 0.03
    assert draw(np.array([900.0, -900.0], np.float32), rng, 1e-6) == 0


# ---- an artifact of many levels

MIXED = (
    "rtn @ q=4b/g32, down=8b/g32 | magnitude @ k=50%, o=2:4 | vptq @ v=vq/d4/k16/r16 | lrt @ gate=r24 | "
    "output-space @ model.layers.1.mlp.gate_proj=r16/bias | zeroquant-v2 @ up=4b/g32+r4"
)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return artifact_of("pocket", MIXED, tmp_path_factory.mktemp("mixed") / "artifact")


@compiled
@pytest.mark.parametrize("packed", [False, True])
def test_mixed_levels_run_in_the_program_and_write_what_torch_writes(mixed: Path, packed: bool) -> None:
    loaded, plain = trimtab.load(mixed, packed=packed), trimtab.load(mixed)
    held = {type(read().level).__name__ for read in plain.packed.values()}
    assert held == {"Int", "Sparse", "NM", "Codebook", "Rank", "Plus"}
    writer = loaded.writer(128)
    assert isinstance(writer, Session)
    other = Runtime(plain.model, plain.packed, plain=True).open(128)
    assert isinstance(other, TorchSession)
    for prompt in ("import os", "def main(args):\n    "):
        ids = [0, *plain.tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        assert agreed(writer, other, ids, 32) >= 31


@compiled
def test_mixed_levels_run_from_the_command_line(mixed: Path, cli: Any) -> None:
    said = cli("run", mixed, "--prompt", "import os", "--tokens", "8", "--json")
    found = said.json()
    assert "kernels" in found["engine"] and found["tokens"] == 8 and "slower" not in said.err


# ---- the face


@compiled
def test_load_writes_with_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = trimtab.load("pocket")
    text = loaded.generate("import os", 12)
    assert "kernels" in loaded.engine and loaded.timing is not None and loaded.timing.tokens == 12

    def drawn(seed: int) -> str:
        return loaded.generate("import os", 12, temperature=1.5, seed=seed)

    assert drawn(3) == drawn(3) != drawn(4)
    assert loaded.generate("import os", 300).startswith(text)  # a longer text needs a larger cache
    assert capsys.readouterr().err == ""


def test_prompts_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = trimtab.load("pocket")
    with pytest.raises(UserError, match="no UTF-8 at character 3"):
        loaded.generate("ab\udcff")
    loaded.context = 16
    with pytest.raises(UserError, match="context is 16; shorten the prompt"):
        loaded.generate("x y z " * 20)
    loaded.tokenizer.bos_token = None
    with pytest.raises(UserError, match="the prompt is empty"):
        loaded.generate("")


@compiled
def test_an_interrupt_ends_a_text_within_a_moment() -> None:
    code = (  # a job in the background starts with interrupts ignored, and so do its children
        "import signal, trimtab\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "loaded = trimtab.load('pocket')\n"
        "for piece in loaded.stream('import os', 900, temperature=1.0):\n    print('.', flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    start = time.monotonic()
    child.send_signal(2)
    _, err = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in err and time.monotonic() - start < 10


def test_run_says_how_fast_it_was(cli: Any) -> None:
    said = cli("run", "pocket", "--prompt", "import os", "--tokens", "5", "--threads", "1", "--context", "64")
    assert said.code == 0 and "3 tokens of prompt at" in said.err and "4 more at" in said.err
    found = cli("run", "pocket", "--prompt", "import os", "--tokens", "5", "--json").json()
    assert found["tokens"] == 5 and found["decode_tokens_per_second"] > 0 and "threads" in found["engine"]
    packed = cli("run", "pocket", "--prompt", "import os", "--tokens", "5", "--cache", "kivi2", "--json").json()
    assert packed["text"] == found["text"]  # all of it in the newest window, which is not packed
    said = cli("run", "pocket", "--cache", "kivi3")
    assert said.code == 2 and "unknown cache 'kivi3'" in said.err
    said = cli("run", "pocket", "--prompt", "import os " * 20, "--context", "16")
    assert said.code == 2 and "context is 16" in said.err
