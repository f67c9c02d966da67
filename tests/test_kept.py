"""Forms that are kept, so that a program runs again without its model's class."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import artifact_of
from test_session import BASE, MODELS, compiled, make, packed_at

import trimtab
from trimtab.core.errors import UserError
from trimtab.engine import kept
from trimtab.engine.program import form_of
from trimtab.engine.session import Kept, Runtime, Session, map_of
from trimtab.formats.checkpoint import Checkpoint, write_safetensors
from trimtab.models.artifact import open_artifact, write_artifact

PROMPT = "def main(args):\n    "


@pytest.fixture
def forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return kept.folder()


@pytest.fixture(autouse=True)
def calm() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
def test_every_form_is_read_as_it_was_written(name: str, forms: Path) -> None:
    model = make(*MODELS[name])
    form = form_of(model, map_of(model))
    kept.keep("k", form)
    assert kept.kept("k") == form and kept.kept("other") is None


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    plan = "rtn @ 4b/g32 | output-space @ model.layers.1.mlp.gate_proj=r16/bias"
    return artifact_of("pocket", plan, tmp_path_factory.mktemp("kept") / "artifact")


@compiled
def test_the_second_run_needs_no_module_and_writes_the_same(packed: Path, forms: Path) -> None:
    first = trimtab.load(packed, packed=True)
    text = first.generate(PROMPT, 24)
    assert isinstance(first.runtime, Runtime) and len(list(forms.iterdir())) == 1
    again = trimtab.load(packed, packed=True)
    assert isinstance(again.runtime, Kept) and again.generate(PROMPT, 24) == text
    assert isinstance(again.writer(8), Session) and again.engine == first.engine
    assert "model" not in vars(again), "no module was made"
    assert again.model.config.vocab_size == first.model.config.vocab_size  # but can be
    with pytest.raises(UserError, match="shorten the prompt"):
        again.generate("word " * 5000, 1)


@compiled
def test_a_process_with_a_kept_form_imports_no_model(packed: Path, forms: Path) -> None:
    trimtab.load(packed, packed=True).generate(PROMPT, 1)
    code = (
        "import sys, trimtab; loaded = trimtab.load(sys.argv[1], packed=True); loaded.writer(32).extend(0, [1, 2]);"
        "print([name for name in sys.modules if name.startswith('transformers.models.llama')])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@compiled
@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"rotary": 3}'])
def test_a_damaged_form_is_made_again(packed: Path, forms: Path, damage: str) -> None:
    trimtab.load(packed, packed=True).generate(PROMPT, 1)
    (file,) = forms.iterdir()
    whole = file.read_text("utf-8")
    file.write_text(damage, "utf-8")
    trimtab.load(packed, packed=True).generate(PROMPT, 1)
    assert file.read_text("utf-8") == whole


@compiled
def test_another_description_has_another_form(packed: Path, forms: Path, tmp_path: Path) -> None:
    trimtab.load(packed, packed=True).generate(PROMPT, 1)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in packed.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert isinstance(trimtab.load(copy, packed=True).runtime, Kept)
    manifest = json.loads((copy / "trimtab.json").read_text("utf-8"))
    (copy / "trimtab.json").write_text(json.dumps(manifest | {"plan": "another"}), "utf-8")
    assert trimtab.load(copy, packed=True).runtime is None


@compiled
@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"])
def test_weights_of_another_shape_are_refused(name: str, forms: Path, tmp_path: Path) -> None:
    model, folder = make("LlamaForCausalLM", BASE), tmp_path / "artifact"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    linears = {n: read() for n, read in packed_at(model, "4b/g16").items() if "layers" in n}
    tensors = {n: linears.get(n, p) for n, p in model.named_parameters()}
    shapes = {n: (list(p.shape), False) for n, p in model.named_parameters()}
    manifest = {"task": "causal-lm", "edits": [], "source": {"name": "random"}, "plan": ""}
    write_artifact(folder, iter(tensors.items()), shapes, manifest, [tmp_path / "config.json"])
    trimtab.load(folder, packed=True).writer(16).extend(0, [1])
    contents = open_artifact(folder)
    file = folder / "model.safetensors"
    stored = {n: Checkpoint(folder).read(n) for n in Checkpoint(folder).names()}
    write_safetensors(stored | {name: stored[name][:-1].clone()}, file)
    loaded = trimtab.load(folder, packed=True)
    assert isinstance(loaded.runtime, Kept) and name in contents.dense
    with pytest.raises(UserError, match="the model's configuration"):
        loaded.writer(16)
