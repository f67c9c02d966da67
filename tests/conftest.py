"""What several test files share: a tiny model, a text, finished runs of it, the command line in this process."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trimtab.models.pocket import POCKET

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: no test reaches for a network

if folder := os.environ.get("TRIMTAB_TEST_KERNELS"):  # kernels of another build take the installed ones' place
    for file in Path(folder).glob("_*.so"):
        spec = importlib.util.spec_from_file_location(f"trimtab.kernels.{file.name.partition('.')[0]}", file)
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # tests that run side by side have a core each
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

SMALL = ("--effort", "quick", "--length", "32", "--methods", "gptq,rtn")


@dataclass(frozen=True)
class Said:
    """What a command gave: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


def command(*args: str | Path, timeout: float = 100, **options: Any) -> Said:
    """`trimtab ...` as a process of its own."""
    line = [sys.executable, "-c", "from trimtab.cli import main; main()", *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, **options)
    return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`trimtab ...` in this process, which saves the imports."""
    from trimtab.cli import main

    def call(*args: str | Path) -> Said:
        capsys.readouterr()
        code = 0
        try:
            main([str(a) for a in args])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, in which nothing of the user's is found or left."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """One thread of torch: models this small lose by more, and a run's bytes depend on no machine's number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 kB of text: a module that every Python brings along."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text("utf-8")[:40_000], "utf-8")
    return path


def artifact_of(model: str, plan: str, folder: Path) -> Path:
    """The artifact that a plan makes of a model, without a search."""
    from types import SimpleNamespace

    from trimtab.core.plan import Plan
    from trimtab.engine.apply import apply
    from trimtab.evidence import Evidence
    from trimtab.lab import Bench
    from trimtab.models.source import open_source

    bench = Bench(open_source(model), calibration=2, items=1)
    applied = apply(bench.stream(), Plan.parse(plan).resolve(bench.sites), bench.calibration, bench.chunk)
    Evidence(SimpleNamespace(source=bench.source, journal=None)).write(applied, plan, folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, text: Path, one_thread: None) -> Path:
    """A Llama of two blocks with pocket's tokenizer, trained on the text for a moment: enough for damage to be seen."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=4096, max_position_embeddings=256))
    tokens = torch.tensor(AutoTokenizer.from_pretrained(POCKET["pocket"])(text.read_text("utf-8"))["input_ids"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        starts = torch.randint(len(tokens) - 32, (16,))
        batch = torch.stack([tokens[s : s + 32] for s in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Pocket's tokenizer for another model."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(POCKET["pocket"] / name, folder / name)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass(frozen=True)
class Run:
    """A finished fit: its folder and its evidence."""

    folder: Path
    report: dict[str, Any]

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"


SIZE = 620_000  # of the tiny model's 1.46 MB, of which 0.26 MB are the tokenizer's: about four bits a weight


def fitted(model: str | Path, out: Path, **options: Any) -> Run:
    """A fit in this process; the text and other small settings unless told otherwise."""
    from trimtab.core.budget import Budget
    from trimtab.fitting import fit

    limits = {k: options.pop(k) for k in ("size", "memory", "latency", "quality") if k in options}
    small = {"effort": "quick", "length": 32, "methods": ("gptq", "rtn")}
    done = fit(str(model), budget=Budget.of(**limits), out=out, **{**small, **options})
    return Run(out, done.report())


@pytest.fixture(scope="session")
def run(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny model fitted to a size."""
    return fitted(tiny, tmp_path_factory.mktemp("runs") / "size", data=str(text), size=SIZE)


@pytest.fixture(scope="session")
def symmetric(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny model at a plan that every export format can say."""
    return fitted(tiny, tmp_path_factory.mktemp("runs") / "symmetric", data=str(text), plan="gptq @ 4b/g32/sym")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of simple code to train on."""
    text = "".join(f"def f{i}(value):\n    return value * {i} + offset\n\n\n" for i in range(150))
    path = tmp_path_factory.mktemp("data") / "lines.jsonl"
    parts = [text[i : i + 240] for i in range(0, len(text), 240)]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return path
