"""What cannot be run or served is refused in one sentence, exit code 2, before a model is there; nothing stays."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import command
from server_running import adapter_folder, until

from trimtab.core.errors import UserError
from trimtab.core.method import discover
from trimtab.formats.cache import CacheFormat
from trimtab.models.pocket import POCKET
from trimtab.server.worker import _alone, main

OUT_OF_RANGE = (
    *("kivi(bits=0)", "kivi(bits=9)", "kivi(group=0)", "kivi(residual=0)", "kivi(key_axis='row')"),
    *("think(prune=2)", "think(prune=1.0)", "think(prune=-0.1)", "think(observed=-1)"),
    *("xquant(bits=99)", "xquant(bits=0)", "xquant(group=0)"),
    *("xquant-cl(bits=99)", "xquant-cl(base_bits=12)", "xquant-cl(base=-1)", "xquant-cl(group=0)"),
    *("cskv(keep=0.0)", "cskv(keep=1.5)", "cskv(keep=-1.0)", "cskv(bits=9)", "cskv(init='none')"),
    *("retrievalattention(beam=3)", "retrievalattention(top=0)", "retrievalattention(links=0)"),
    *("retrievalattention(sinks=-1)", "retrievalattention(index='all')", "retrievalattention(near=0)"),
    *("sirllm(start=-1)", "sirllm(decay=2.0)", "sirllm(start=0, memory=0)", "sirllm(residual=-1)"),
)
KEEPERS = [name for name, cls in discover().items() if cls.family() == "kv"]


@pytest.mark.parametrize("text", OUT_OF_RANGE)
def test_a_cache_whose_fields_are_out_of_range_is_refused_as_it_is_named(text: str) -> None:
    field = text.partition("(")[2].partition("=")[0]
    with pytest.raises(UserError, match=field if field != "residual" else "window") as caught:
        CacheFormat.parse(text)
    assert text.partition("(")[0] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KEEPERS)
def test_every_method_of_caches_is_refused_something_and_runs_as_the_paper_has_it(name: str) -> None:
    assert any(text.startswith(f"{name}(") for text in OUT_OF_RANGE)
    assert CacheFormat.parse(name).keeper is not None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("run", "pocket", "--cache", "think(prune=2)"), "prune=2"),
        (("run", "pocket", "--cache", "kivi(bits=0)"), "bits=0"),
        (("run", "pocket", "--cache", "xquant(bits=99)"), "bits=99"),
        (("train", "pocket", "--freeze", "sirllm"), "sirllm freezes nothing"),
        (("train", "pocket", "--freeze", "s-lora"), "s-lora freezes nothing"),
        (("adapt", "pocket", "--freeze", "sirllm"), "--freeze"),
        (("adapt", "pocket", "--method", "sirllm"), "sirllm adapts nothing"),
    ],
)
def test_a_method_of_another_kind_is_refused_before_a_model_is_there(
    line: tuple[str, ...], said: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trimtab.loading._load", loaded)
    monkeypatch.setattr("trimtab.models.source.open_source", loaded)
    done = cli(*line)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_a_policy_that_serves_nobody_is_refused_before_a_model_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.loading.load", None)
    with pytest.raises(SystemExit) as ended:
        main(["pocket", "--socket", str(tmp_path / "engine"), "--policy", "sirllm"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "sirllm is no policy of serving" in said and said.count("\n") == 1


def test_two_engines_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = _alone(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["pocket", "--socket", str(tmp_path / "engine")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "another engine has its socket in" in said and said.count("\n") == 1
    os.close(held)
    os.close(_alone(tmp_path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folders that will not do."""
    shutil.copytree(POCKET["pocket"], tmp_path / "no-tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no-tokenizer" / name).unlink()
    for adapter in adapter_folder(tmp_path / "pickles").iterdir():
        (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    return tmp_path


@pytest.fixture
def left() -> Iterator[str]:
    """Where temporary files go, with a name short enough for a socket in it."""
    with tempfile.TemporaryDirectory() as name:
        yield name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("artifact", "options", "said"),
    [
        ("no-tokenizer", (), "has no tokenizer"),
        ("pocket", ("--adapters", "pickles"), "this is a pickle"),
        ("pocket", ("--memory", "1MB"), "give as much, or take a smaller artifact"),
        ("pocket", ("--policy", "sirllm"), "no policy of serving"),
    ],
)
def test_a_server_that_cannot_begin_says_so_once_and_leaves_nothing(
    artifact: str, options: tuple[str, ...], said: str, folder: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", left)
    done = command("serve", artifact, "--port", "0", *options, timeout=300)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err
    assert not done.out and not list(Path(left).glob("trimtab-*"))

    def there() -> list[int]:
        found = [(p.pid, p.info["environ"] or {}) for p in psutil.process_iter(["environ"])]
        return [pid for pid, environ in found if environ.get("TMPDIR") == left]

    until(lambda: not there())
