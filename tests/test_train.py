"""`trimtab train`: end to end, killed and resumed, within memory, and what is refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Said
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.adapting import adapt
from trimtab.core.errors import BudgetError, UserError
from trimtab.report.events import Events
from trimtab.training import train

Cli = Callable[..., Said]
OPTIONS: dict[str, Any] = {"steps": 6, "batch": 2, "length": 64, "rate": 1e-2}


def test_it_learns_and_its_folder_is_a_plain_one(tiny: Path, data: Path, tmp_path: Path) -> None:
    made = train(str(tiny), str(data), optimizer="apollo(rank=4)", out=tmp_path / "run", **OPTIONS)
    report = made.report
    assert report["verdict"] == "better" and report["difference"][1] < 0
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    plain = AutoModelForCausalLM.from_pretrained(made.folder)
    tokens = torch.arange(20)[None] + 5
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, made.model(tokens).logits)
    assert AutoTokenizer.from_pretrained(made.folder)("def f")["input_ids"]
    assert report["trained"] == sum(p.numel() for p in plain.parameters())
    assert 0 < report["state_bytes"] < 2 * report["weight_bytes"]


def test_fresh_weights_are_drawn_from_the_seed(tiny: Path, data: Path, tmp_path: Path) -> None:
    runs = [
        train(str(tiny), str(data), fresh=True, out=tmp_path / f"{i}", **OPTIONS | {"steps": 1, "seed": seed}).report
        for i, seed in enumerate((0, 0, 1))
    ]
    values = [run["before"]["value"] for run in runs]
    assert values[0] == values[1] != values[2]
    assert runs[0]["after"] == runs[1]["after"]


def test_killed_and_resumed_it_ends_with_the_same_weights(tiny: Path, data: Path, tmp_path: Path) -> None:
    code = "import sys; from trimtab.cli import main; main(sys.argv[1:])"
    line = ["train", str(tiny), "--data", str(data), "--every", "1", "--batch", "2", "--length", "64", "--steps", "60"]
    start = [sys.executable, "-c", code, *line, "--optimizer", "apollo(rank=8, every=7)", "-q", "--out"]
    process = subprocess.Popen([*start, str(tmp_path / "cut")])
    while not list((tmp_path / "cut").glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "model").exists(), "it was over before it was killed"
    subprocess.run([*start, str(tmp_path / "cut"), "--resume"], check=True)
    subprocess.run([*start, str(tmp_path / "whole")], check=True)
    cut, whole = (tmp_path / name / "model" / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


def test_weights_of_8_bits_are_trained_and_a_run_goes_on_with_the_same_bytes(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    def go(name: str, resume: bool = False) -> Any:
        options = OPTIONS | {"optimizer": "q-galore(rank=4)", "every": 2, "rate": 0.02}
        return train(str(tiny), str(data), out=tmp_path / name, resume=resume, **options)

    whole = go("whole")
    assert whole.report["verdict"] == "better"
    assert whole.report["weight_bytes"] < 0.75 * 4 * whole.report["trained"]

    def stop(what: str, done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            *(str(tiny), str(data)),
            **OPTIONS | {"optimizer": "q-galore(rank=4)", "every": 2, "rate": 0.02},
            **{"out": tmp_path / "cut", "progress": stop},
        )
    cut = go("cut", resume=True)
    files = [run.folder / "model.safetensors" for run in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_classifier_is_trained_by_forward_passes_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"gradient": "mezo", "optimizer": "sgd", "steps": 2, "batch": 16, "rate": 1e-6}
    made = train("pocket-vit", out=tmp_path / "run", **options)
    assert made.report["metric"] == "accuracy" and (made.folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {"form": "sltrain", "level": "r4", "fresh": True, "optimizer": "adamw"},
        {"optimizer": "mkor", "rate": 0.05},
        {"freeze": "lisa(blocks=1)", "optimizer": "adamw"},
        {"gradient": "wta-crs"},
        {"gradient": "mezo", "optimizer": "sgd", "rate": 1e-4},
    ],
    ids=str,
)
def test_parts_of_a_training_go_together(options: dict[str, Any], tiny: Path, data: Path, tmp_path: Path) -> None:
    made = train(str(tiny), str(data), out=tmp_path / "run", **OPTIONS | options)
    plain = AutoModelForCausalLM.from_pretrained(made.folder)
    tokens = torch.arange(20)[None] + 5
    with torch.no_grad():
        assert torch.allclose(plain(tokens).logits, made.model(tokens).logits, atol=1e-4)
    if options.get("gradient") != "mezo":
        assert made.report["verdict"] == "better"
    if "form" in options:
        assert made.report["weight_bytes"] < 0.95 * plain.num_parameters() * 4


@pytest.mark.parametrize("verb", ["adapt", "train"])
def test_curves_are_written_for_tensorboard_while_it_trains(
    verb: str, tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run: Any = adapt if verb == "adapt" else train
    options = {"steps": 6, "batch": 2, "length": 32, "every": 2, "tensorboard": True, "out": tmp_path / "run"}

    def cut(self: Events, row: Any) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt
        whole(self, row)

    whole = Events.row
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Events, "row", cut)
        run(str(tiny), str(data), **options)
    report = run(str(tiny), str(data), resume=True, **options).report
    found = reader(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "train-log.jsonl").read_text().splitlines()]
    for name in ("loss", "norm", "rate"):
        scalars = found.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [1, 2, 3, 4, 5, 6]
        assert [s.value for s in scalars] == pytest.approx([row[name] for row in rows], rel=1e-6)
    metric = found.Scalars(f"held-out/{report['metric']}")
    assert [(s.step, s.value) for s in metric] == [
        (0, pytest.approx(report["before"]["value"])),
        (6, pytest.approx(report["after"]["value"])),
    ]


@pytest.mark.parametrize("verb", ["adapt", "train"])
def test_without_tensorboard_it_is_said_before_anything_runs(
    verb: str, tiny: Path, data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = cli(verb, tiny, "--data", data, "--tensorboard", "--out", tmp_path / "run")
    assert said.code == 2 and "pip install 'trimtab[tensorboard]'" in said.err and not (tmp_path / "run").exists()


def test_memory_is_kept_or_refused_with_what_would_fit(tiny: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"least that fits is .*for one item in flight"):
        train(str(tiny), str(data), memory="20MB", out=tmp_path / "none", **OPTIONS)
    assert not (tmp_path / "none").exists()
    made = train(str(tiny), str(data), memory="30GB", out=tmp_path / "run", **OPTIONS | {"steps": 1})
    assert made.report["memory"]["state"] == made.report["weight_bytes"] + made.report["state_bytes"]


def test_the_command_prints_one_json_object_or_a_few_lines(tiny: Path, data: Path, tmp_path: Path, cli: Cli) -> None:
    line = ("train", tiny, "--data", data, "--steps", "1", "--batch", "1", "--length", "32", "--out")
    assert cli(*line, tmp_path / "one", "--json").json()["steps"] == 1
    said = cli(*line, tmp_path / "two", "-q")
    assert said.code == 0 and "by apollo-mini" in said.out and str(tmp_path / "two" / "model") in said.out
    again = cli(*line, tmp_path / "two", "-q")
    assert again.code == 2 and "already holds a run" in again.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "gptq"}, "updates no parameters"),
        ({"optimizer": "apolo"}, "did you mean 'apollo'"),
        ({"optimizer": "apollo(rank=0)"}, "1 or more"),
        ({"gradient": "adamw"}, "estimates no gradient"),
        ({"freeze": "adamw"}, "freezes nothing"),
        ({"form": "sltrain"}, "--fresh"),
        ({"form": "adamw", "fresh": True}, "is no form"),
        ({"form": "sltrain", "fresh": True, "level": "r999"}, r"model\.layers\.0.*rank 999"),
        ({"memory": "lots"}, "memory"),
        ({"rate": -1.0}, "learning rate"),
        ({"length": 4}, "8 or more"),
        ({"steps": 0}, "1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(
    tiny: Path, options: dict[str, Any], said: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(str(tiny), str(data), out=tmp_path / "run", **{**OPTIONS, **options})
    assert not (tmp_path / "run" / "model").exists()
