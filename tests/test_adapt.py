"""`trimtab adapt` and its adapters: end to end, on packed bases, within memory, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said, artifact_of

from trimtab.adapting import adapt, open_base
from trimtab.core.errors import BudgetError, UserError
from trimtab.engine.run import PackedEmbedding, PackedLinear, decoded
from trimtab.models.adapter import ABOUT, CONFIG, DELTA, attach, frames, merge
from trimtab.models.source import open_source

Cli = Callable[..., Said]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's

OPTIONS: dict[str, Any] = {"steps": 6, "batch": 2, "length": 64, "rate": 2e-2}


@pytest.fixture(scope="module")
def tiny(tiny: Path) -> str:
    """The folder that all test files share, as a user names it."""
    return str(tiny)


@pytest.fixture(scope="module")
def run(tiny: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return adapt(tiny, str(data), level="r4", out=tmp_path_factory.mktemp("runs") / "lora", **OPTIONS)


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(40)[None] + 5
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


def test_it_learns_and_says_so_with_an_interval(run: Any) -> None:
    report = run.report
    assert report["after"]["value"] < report["before"]["value"] and report["verdict"] == "better"
    low, high = report["difference"]
    assert low < high < 0 and report["trained"] == sum(f.a.numel() + f.b.numel() for f in frames(run.model).values())
    assert report["saved_bytes"] > 0 and json.loads((run.folder.parent / "report.json").read_text()) == report


@pytest.mark.parametrize(
    "method",
    ["lora(scaling='root')", "dora", "paca", "s2ft", "lora-ga", "corda", "hydra", "smora", "mos", "bi-lora", "loram"],
)
def test_an_adapter_comes_back_from_its_files(tiny: str, method: str, data: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "steps": 2}
    made = adapt(tiny, str(data), method=method, level="r8", out=tmp_path / "run", **options)
    again = attach(open_source(tiny).materialise(), made.folder)
    assert set(frames(again)) == set(made.report["sites"])
    assert torch.allclose(logits(again), logits(made.model), atol=2e-4)
    expressible = (made.folder / CONFIG).is_file()
    assert expressible is not (made.folder / DELTA).is_file() and expressible is (
        method not in ("smora", "mos", "bi-lora")
    )
    if method != "smora":
        assert torch.allclose(logits(merge(again)), logits(made.model), atol=5e-4)
    else:
        with pytest.raises(UserError, match="cannot be merged"):
            merge(again)


@pytest.mark.parametrize("method", ["lora", "dora", "paca", "lora-ga"])
def test_stock_peft_loads_what_is_saved(tiny: str, method: str, data: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = adapt(tiny, str(data), method=method, level="r4", out=tmp_path / "run", **{**OPTIONS, "steps": 2})
    theirs = peft.PeftModel.from_pretrained(open_source(tiny).materialise(), made.folder)
    assert torch.allclose(logits(theirs), logits(made.model), atol=2e-4)


def test_what_peft_saves_is_taken(tiny: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    theirs = peft.get_peft_model(open_source(tiny).materialise(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = attach(open_source(tiny).materialise(), tmp_path / "theirs")
    assert torch.allclose(logits(ours), logits(theirs), atol=2e-4)


def test_a_fitted_base_stays_packed(tiny: str, data: Path, tmp_path: Path) -> None:
    artifact_of(tiny, "rtn @ model.layers.*=4b/g32, model.embed_tokens=4b/g32", tmp_path / "fit")
    made = adapt(str(tmp_path / "fit"), str(data), level="r4", out=tmp_path / "run", **OPTIONS)
    below = [frame.base for frame in frames(made.model).values()]
    assert below and all(isinstance(module, PackedLinear) for module in below)
    assert isinstance(made.model.get_input_embeddings(), PackedEmbedding)
    assert made.report["verdict"] == "better"
    again = attach(open_base(str(tmp_path / "fit")).model, made.folder, open_base(str(tmp_path / "fit")).hash)
    assert torch.allclose(logits(again), logits(made.model), atol=2e-4)
    with pytest.raises(UserError, match="other"):
        attach(open_source(tiny).materialise(), made.folder, open_source(tiny).hash)
    attach(open_source(tiny).materialise(), made.folder, open_source(tiny).hash, force=True)


@pytest.mark.parametrize("method", ["peqa", "l4q(rank=4)", "aqt(inputs=16)"])
def test_a_fitted_base_is_trained_on_its_grid_and_stays_packed(
    tiny: str, method: str, data: Path, tmp_path: Path
) -> None:
    artifact_of(tiny, "rtn @ model.layers.*=3b/g32", tmp_path / "fit")
    made = adapt(str(tmp_path / "fit"), str(data), method=method, level="3b/g32", out=tmp_path / "run", **OPTIONS)
    assert made.report["verdict"] == "better"
    base = open_base(str(tmp_path / "fit"))
    before = {path: module.packed for path, module in base.model.named_modules() if isinstance(module, PackedLinear)}
    again = merge(attach(base.model, made.folder, base.hash))
    assert torch.equal(logits(again), logits(made.model)), "merged is what was trained, bit for bit"
    for path in made.report["sites"]:
        ours = again.get_submodule(path).packed
        assert ours.level == before[path].level and ours.nbytes == before[path].nbytes
        same = torch.equal(ours.tensors["codes"], before[path].tensors["codes"])
        assert same is (method == "peqa")
    written = tmp_path / "run" / "artifact"
    assert made.report["artifact"] == str(written)
    assert torch.equal(logits(open_base(str(written)).model), logits(made.model))
    sizes = [sum(p.stat().st_size for p in (tmp_path / name).iterdir()) for name in ("fit", "run/artifact")]
    assert sizes[0] == sizes[1]


def test_a_ladder_leaves_the_blocks_without_gradients_and_comes_back(tiny: str, data: Path, tmp_path: Path) -> None:
    lora = adapt(tiny, str(data), level="r4", out=tmp_path / "lora", **OPTIONS)
    made = adapt(tiny, str(data), method="lst", level="w25%", out=tmp_path / "run", **OPTIONS)
    assert made.report["verdict"] == "better" and made.report["saved_bytes"] < lora.report["saved_bytes"]
    rungs = frames(made.model)
    assert list(rungs) == ["model.layers.0", "model.layers.1"]
    seen: list[bool] = []

    def see(block: Any, args: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).requires_grad)

    for rung in rungs.values():
        rung.base.register_forward_hook(see)
    made.model(input_ids=torch.arange(9)[None])
    assert seen == [False, False]
    again = attach(open_source(tiny).materialise(), made.folder)
    assert torch.allclose(logits(again), logits(made.model), atol=1e-5)
    tokens = torch.arange(12)[None]
    assert torch.allclose(decoded(again, tokens), again(input_ids=tokens).logits, atol=1e-3)
    with pytest.raises(UserError, match="cannot be merged"):
        merge(again)
    with pytest.raises(UserError, match="takes no targets"):
        adapt(tiny, str(data), method="lst", level="w25%", targets=("q",), out=tmp_path / "no", **OPTIONS)
    with pytest.raises(UserError, match="it takes a width"):
        adapt(tiny, str(data), method="lst", level="r4", out=tmp_path / "no", **OPTIONS)


def test_killed_and_resumed_it_ends_with_the_same_adapter(tiny: str, data: Path, tmp_path: Path, run: Any) -> None:
    code = "import sys; from trimtab.cli import main; main(sys.argv[1:])"
    line = ["adapt", tiny, "--data", str(data), "--rank", "4", "--every", "1", "--batch", "2", "--length", "64"]
    start = [sys.executable, "-c", code, *line, "--rate", "2e-2", "-q", "--steps", "60", "--out"]
    process = subprocess.Popen([*start, str(tmp_path / "cut")])
    while not list((tmp_path / "cut").glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "adapter").exists(), "it was over before it was killed"
    subprocess.run([*start, str(tmp_path / "cut"), "--resume"], check=True)
    subprocess.run([*start, str(tmp_path / "whole")], check=True)
    assert (tmp_path / "cut/adapter/adapter_model.safetensors").read_bytes() == (
        tmp_path / "whole/adapter/adapter_model.safetensors"
    ).read_bytes()


def test_memory_is_kept_or_refused_with_what_would_fit(tiny: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"least that fits is .*for one item in flight"):
        adapt(tiny, str(data), level="r4", memory="20MB", out=tmp_path / "none", **OPTIONS)
    assert not (tmp_path / "none").exists()
    made = adapt(tiny, str(data), level="r4", memory="30GB", out=tmp_path / "run", **{**OPTIONS, "steps": 1})
    assert made.report["recipe"]["codec"] == "exact" and made.report["memory"]["expected"] < 30e9


def test_auto_tries_methods_and_says_what_it_found(tiny: str, data: Path, tmp_path: Path) -> None:
    made = adapt(tiny, str(data), method="auto", level="r4", targets=("q", "down"), out=tmp_path / "run", **OPTIONS)
    assert any(note.startswith("auto: ") and "paca" in note for note in made.report["notes"])
    assert all(path.endswith(("q_proj", "down_proj")) for path in made.report["sites"])


def test_a_classifier_learns_too(tmp_path: Path) -> None:
    made = adapt("pocket-vit", level="r4", out=tmp_path / "run", steps=3, batch=16, rate=1e-3)
    assert made.report["metric"] == "accuracy" and 0 <= made.report["after"]["value"] <= 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ("q_prj",)}, r"'q_prj'; did you mean 'q_proj'"),
        ({"level": "r999"}, r"model\.layers\.0.*rank 999"),
        ({"level": "4b/g64"}, "4b/g64"),
        ({"method": "gptq"}, "adapts nothing"),
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"dtype": "fp8"}, "fp8"),
        ({"memory": "lots"}, "memory"),
        ({"length": 4}, "8 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    tiny: str, options: dict[str, Any], said: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        adapt(tiny, str(data), out=tmp_path / "run", **{**OPTIONS, **options})
    assert not (tmp_path / "run").exists()


def test_bad_data_and_bad_adapters_are_refused(tiny: str, data: Path, tmp_path: Path, run: Any, cli: Cli) -> None:
    (tmp_path / "bad.jsonl").write_text(data.read_text() + '{"text": \n')
    said = cli("adapt", tiny, "--data", tmp_path / "bad.jsonl", "--out", tmp_path / "run", "-q")
    assert said.code == 2 and "--skip-bad" in said.err and not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="nothing to train on"):
        adapt(tiny, out=tmp_path / "run", **OPTIONS)
    with pytest.raises(UserError, match="already holds a run"):
        adapt(tiny, str(data), level="r4", out=run.folder.parent, **OPTIONS)
    with pytest.raises(UserError, match="another job"):
        adapt(tiny, str(data), level="r2", out=run.folder.parent, resume=True, **OPTIONS)
    model = open_source(tiny).materialise()
    with pytest.raises(UserError, match="no adapter"):
        attach(model, tmp_path)
    other = shutil.copytree(run.folder, tmp_path / "other")
    (other / ABOUT).write_text(json.dumps({**json.loads((other / ABOUT).read_text()), "hash": "0" * 16}))
    with pytest.raises(UserError, match="0000000000000000"):
        attach(model, other, open_source(tiny).hash)
