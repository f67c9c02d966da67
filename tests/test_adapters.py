"""Adapters of PEFT beside a model, many in one batch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said, artifact_of
from test_session import BASE, MODELS, compiled, error, make
from torch import Tensor

import trimtab
from trimtab.core.errors import UserError
from trimtab.engine.adapters import half
from trimtab.engine.session import Runtime, map_of
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.formats.peft import CONFIG, PREFIX, WEIGHTS, Adapter, read_adapter
from trimtab.models.adapter import ABOUT, check_base
from trimtab.models.source import open_source


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_adapter(model: Any, rank: int, seed: int, roles: tuple[str, ...] = ()) -> Adapter:
    rng, factors = torch.Generator().manual_seed(seed), {}
    for site in map_of(model).sites:
        if site.kind == "linear" and (not roles or site.role in roles):
            out, cols = site.shape
            down, up = torch.randn(rank, cols, generator=rng), torch.randn(out, rank, generator=rng)
            factors[site.path] = down / cols**0.5, up / rank**0.5
    return Adapter(factors, f"adapter {seed}", {})


@torch.no_grad()
def merged_logits(model: Any, adapter: Adapter | None, tokens: Tensor) -> Tensor:
    """Logits of the last token by the model with the adapter in its weights."""
    sites = {site.path: site for site in map_of(model).sites}
    deltas = {}
    for path, (down, up) in (adapter.factors if adapter else {}).items():
        delta = half(up).float() @ half(down).float()
        deltas[path] = delta.T if sites[path].transposed else delta
    for path, delta in deltas.items():
        model.get_submodule(path).weight += delta
    found = model(input_ids=tokens[None]).logits[0, -1].float()
    for path, delta in deltas.items():
        model.get_submodule(path).weight -= delta
    return found


@compiled
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_batch_gives_what_each_merged_model_gives(name: str, plain: bool) -> None:
    model = make(*MODELS[name])
    runtime = Runtime(model, plain=plain)
    bank = runtime.bank()
    held = {
        "one": random_adapter(model, 4, 1),
        "two": random_adapter(model, 17, 2, ("q", "v", "qkv", "down")),
        "three": random_adapter(model, 1, 3),
    }
    for key, adapter in held.items():
        bank.add(key, adapter)
    writer = runtime.open(64, sequences=5, chunk=16, cache="fp32", bank=bank)
    users = ["one", None, "two", "two", "three"]
    texts = [torch.randint(99, (n,), generator=torch.Generator().manual_seed(n)) for n in (20, 3, 9, 11, 30)]
    found = []
    for i, (user, tokens) in enumerate(zip(users, texts, strict=True)):
        writer.use(i, user)
        found.append(writer.extend(i, tokens.tolist()).clone())
    new = {i: 7 * i for i in range(5)}
    stepped = writer.step(new)
    for i, (user, tokens) in enumerate(zip(users, texts, strict=True)):
        adapter = held[user] if user else None
        assert error(found[i], merged_logits(model, adapter, tokens)) < 2e-5
        longer = torch.cat([tokens, torch.tensor([new[i]])])
        assert error(stepped[i], merged_logits(model, adapter, longer)) < 2e-5
    writer.use(0, None)
    writer.forget(0)
    assert error(writer.extend(0, texts[0].tolist()), merged_logits(model, None, texts[0])) < 2e-5


@compiled
def test_adapters_come_and_go_between_steps() -> None:
    model = make("LlamaForCausalLM", BASE)
    runtime = Runtime(model)
    bank = runtime.bank()
    one, two = random_adapter(model, 4, 1), random_adapter(model, 8, 2)
    bank.add("a", one)
    writer = runtime.open(32, bank=bank, cache="fp32")
    tokens = torch.tensor([1, 2, 3])
    writer.use(0, "a")
    assert error(writer.extend(0, tokens.tolist()), merged_logits(model, one, tokens)) < 2e-5
    bank.add("a", two)  # in the place of the first
    writer.forget(0)
    assert error(writer.extend(0, tokens.tolist()), merged_logits(model, two, tokens)) < 2e-5
    assert bank.pool.numbers == [1]
    bank.remove("a")
    assert bank.pool.numbers == [] and bank.pool.nbytes == 0
    with pytest.raises(UserError, match="no adapter 'a'"):
        writer.step({0: 1})


def write(folder: Path, factors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_safetensors(factors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 8, **config}))
    return folder


def pair(path: str, out: int = 48, cols: int = 48, rank: int = 4) -> dict[str, Tensor]:
    name = f"{PREFIX}{path}.lora_"
    return {f"{name}A.weight": torch.ones(rank, cols), f"{name}B.weight": torch.ones(out, rank)}


def test_scales_are_those_of_the_configuration(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    folder = write(tmp_path / "a", pair(path))
    assert torch.equal(read_adapter(folder).factors[path][1], torch.full((48, 4), 2.0))
    write(folder, pair(path), use_rslora=True)
    assert torch.equal(read_adapter(folder).factors[path][1], torch.full((48, 4), 4.0))
    write(folder, pair(path), alpha_pattern={"q_proj": 2})
    assert torch.equal(read_adapter(folder).factors[path][1], torch.full((48, 4), 0.5))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's own
def test_the_real_library_writes_what_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = make("LlamaForCausalLM", BASE)
    tokens = torch.tensor([5, 6, 7, 8])
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 6}, use_rslora=True
    )
    adapted = peft.get_peft_model(make("LlamaForCausalLM", BASE), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).half() * 0.25)
        expected = adapted(input_ids=tokens[None]).logits[0, -1]
    adapted.save_pretrained(tmp_path)
    assert error(merged_logits(model, read_adapter(tmp_path), tokens), expected) < 1e-3  # the scale is in halves here


GOOD = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("factors", "config", "said"),
    [
        (pair(GOOD), {"peft_type": "IA3"}, "type IA3"),
        (pair(GOOD), {"use_dora": True}, "use_dora=True"),
        (pair(GOOD), {"bias": "all"}, "bias='all'"),
        (pair(GOOD), {"lora_alpha": "x"}, "damaged, or no configuration"),
        (pair(GOOD), {"alpha_pattern": {"(": 2}}, "alpha_pattern"),
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}, {}, "lora_embedding_A"),
        (dict([pair(GOOD).popitem()]), {}, "do not fit together"),
        ({k: v * float("nan") for k, v in pair(GOOD).items()}, {}, "NaN"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(
    factors: dict[str, Tensor], config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        read_adapter(write(tmp_path / "a", factors, **config))


@compiled
@pytest.mark.parametrize(
    ("factors", "said"),
    [
        (pair("model.layers.9.self_attn.q_proj"), "another model"),
        (pair("model.layers.0.self_attn.q_prj"), "did you mean 'model.layers.0.self_attn.q_proj'"),
        (pair(GOOD, 47), "48 x 48 here"),
        (pair(GOOD, rank=65), "rank 65, and there is room for 64"),
        ({k: v * 1e6 for k, v in pair(GOOD).items()}, "halves end at 65504"),
    ],
)
def test_an_adapter_of_another_model_is_refused(factors: dict[str, Tensor], said: str, tmp_path: Path) -> None:
    bank = Runtime(make("LlamaForCausalLM", BASE)).bank()
    with pytest.raises(UserError, match=said):
        bank.add("a", read_adapter(write(tmp_path / "a", factors)))
    assert not bank.held


def test_text_is_written_through_an_adapter(tmp_path: Path, cli: Any) -> None:
    loaded = trimtab.load("pocket")
    site = next(s for s in map_of(loaded.model).sites if s.role == "down")
    rng = torch.Generator().manual_seed(0)
    name = f"{PREFIX}{site.path}.lora_"
    out, cols = site.shape
    factors = {
        f"{name}A.weight": torch.randn(4, cols, generator=rng),
        f"{name}B.weight": torch.randn(out, 4, generator=rng),
    }
    folder = write(tmp_path / "adapter", factors)
    plain = loaded.generate("import os", 12)
    loaded.add_adapter("mine", folder)
    assert loaded.generate("import os", 12) == plain
    changed = loaded.generate("import os", 12, adapter="mine")
    assert changed != plain
    said: Said = cli("run", "pocket", "--prompt", "import os", "--tokens", "12", "--adapter", folder, "--json")
    assert said.code == 0 and said.json()["text"] == changed
    wrong = cli("run", "pocket", "--prompt", "import os", "--adapter", tmp_path)
    assert wrong.code == 2 and "is no adapter" in wrong.err
    (folder / ABOUT).write_text('{"hash": "0123456789abcdef"}')
    line = ("run", "pocket", "--prompt", "import os", "--tokens", "12", "--adapter", folder, "--json")
    wrong = cli(*line)
    assert wrong.code == 2 and "was trained on a model of hash 0123456789abcdef" in wrong.err
    assert cli(*line, "--force").json()["text"] == changed


def test_an_adapter_of_the_original_or_of_the_artifact_is_taken_by_the_artifact(tmp_path: Path) -> None:
    home = artifact_of("pocket", "rtn @ 4b/g32", tmp_path / "artifact")
    loaded = trimtab.load(home, packed=True)
    folder = write(tmp_path / "adapter", {})
    for known in (Checkpoint(home).hash()[:16], open_source("pocket").hash):
        (folder / ABOUT).write_text(json.dumps({"hash": known}))
        check_base(folder, loaded.hashes)
    (folder / ABOUT).write_text(json.dumps({"hash": "0" * 16}))
    with pytest.raises(UserError, match="insist with --force"):
        check_base(folder, loaded.hashes)
