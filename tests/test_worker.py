"""The process that runs the model, spoken to over its socket."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.engine.session import map_of
from trimtab.formats.checkpoint import write_safetensors
from trimtab.formats.peft import CONFIG, PREFIX, WEIGHTS
from trimtab.models.source import open_source
from trimtab.server.worker import main


def write_adapter(folder: Path, rank: int = 4, seed: int = 0, spoil: Callable[[dict[str, Any]], object] = dict) -> Path:
    """An adapter of the shipped model, with random factors."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for site in map_of(open_source("pocket").materialise()).sites:
        if site.kind == "linear" and site.role in ("q", "v", "down"):
            out, cols = site.shape
            tensors[f"{PREFIX}{site.path}.lora_A.weight"] = torch.randn(rank, cols, generator=rng) / cols**0.5
            tensors[f"{PREFIX}{site.path}.lora_B.weight"] = torch.randn(out, rank, generator=rng) / rank**0.5
    spoil(tensors)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    write_safetensors(tensors, folder / WEIGHTS)
    return folder


def wide(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.zeros(4, 7)


def broken_number(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "adapters"
    for i in range(4):
        write_adapter(folder / f"good{i}", rank=2 + 5 * i, seed=i)
    write_adapter(folder / "nan", spoil=broken_number)
    write_adapter(folder / "wide", spoil=wide)
    shutil.copytree(folder / "good0", folder / "cut")
    raw = (folder / "cut" / WEIGHTS).read_bytes()
    (folder / "cut" / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    shutil.copytree(folder / "good0", folder / "pickle")
    (folder / "pickle" / WEIGHTS).rename(folder / "pickle" / "adapter_model.bin")
    shutil.copytree(folder / "good0", folder / "other-base")
    (folder / "other-base" / "trimtab_adapter.json").write_text(json.dumps({"format": 1, "hash": "0123456789abcdef"}))
    return folder


class Client:
    """A connection to the process, and what it said."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.ready = self.next("ready")
        self.tokens: dict[str, list[int]] = {}
        self.state: dict[str, Any] = {}

    def do(self, what: str, **fields: Any) -> None:
        self.socket.sendall(json.dumps({"do": what, **fields}).encode() + b"\n")

    def next(self, *kinds: str, id: str | None = None) -> dict[str, Any]:
        """The next message of these kinds."""
        for raw in self.file:
            message = json.loads(raw)
            if message["is"] == "tokens":
                for name, token, *_ in message["of"]:
                    self.tokens.setdefault(name, []).append(token)
            if message["is"] == "state":
                self.state = message
            if message["is"] in kinds and (id is None or message.get("id") == id):
                return message
        raise EOFError

    def __del__(self) -> None:
        self.file.close()
        self.socket.close()

    def ask(self, id: str, *tokens: int, limit: int = 12, **fields: Any) -> list[int]:
        self.do("submit", id=id, tokens=tokens or [5, 6, 7], limit=limit, ignore_eos=True, **fields)
        assert self.next("end", "refused", id=id)["is"] == "end"
        return self.tokens[id]


@contextmanager
def worker(folder: Path, *options: Any) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    folder.mkdir(exist_ok=True)
    path = folder / "engine"
    line = [sys.executable, "-m", "trimtab.server.worker", "pocket", "--socket", path, "--users", "4", "--threads", "1"]
    process = subprocess.Popen([*map(str, line), *map(str, options)], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 90
        while not path.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        yield process, path
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def served(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The socket, and a copy of the folder of adapters that tests may change."""
    folder = tmp_path_factory.mktemp("worker")
    shutil.copytree(adapters, folder / "adapters")
    with worker(folder, "--adapters", folder / "adapters") as (_, path):
        yield path, folder / "adapters"


def test_it_says_what_fits_and_what_it_does(served: tuple[Path, Path]) -> None:
    client = Client(served[0])
    assert {"good0", "good3", "nan", "wide", "other-base"} <= set(client.ready["adapters"])
    assert not {"cut", "pickle"} & set(client.ready["adapters"])
    assert client.ready["cache_tokens"] == client.ready["pool"] // client.ready["token_bytes"] // 64 * 64 > 1000
    assert len(client.ask("a")) == 12
    state = client.next("state")
    while state["running"]:
        state = client.next("state")
    assert state["pages"] == 0 and state["tokens"] >= 12


def test_adapters_of_a_batch_do_not_touch_each_other(served: tuple[Path, Path]) -> None:
    client = Client(served[0])
    alone = [client.ask(f"alone{i}", adapter=f"good{i}" if i < 4 else None) for i in range(5)]
    for i in range(5):
        client.do(
            "submit", id=f"r{i}", tokens=[5, 6, 7], limit=12, adapter=f"good{i}" if i < 4 else None, ignore_eos=True
        )
    for _ in range(5):
        client.next("end")
    assert [client.tokens[f"r{i}"] for i in range(5)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 1


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("nan", 422, "nan"),
        ("wide", 422, "another model"),
        ("cut", 422, "cut"),
        ("other-base", 422, "0123456789abcdef"),
        ("pickle", 422, "cannot be used"),
        ("../good0", 404, "no model"),
    ],
)
def test_what_is_no_sound_adapter_is_refused_and_others_go_on(
    name: str, status: int, said: str, served: tuple[Path, Path]
) -> None:
    client = Client(served[0])
    alone = client.ask("alone", limit=40, adapter="good1")
    client.do("submit", id="running", tokens=[5, 6, 7], limit=40, adapter="good1", ignore_eos=True)
    client.do("submit", id="bad", tokens=[5], limit=4, adapter=name)
    refused = client.next("refused", id="bad")
    assert refused["status"] == status and said in refused["message"]
    assert str(served[1].parent) not in refused["message"]
    client.do("submit", id="again", tokens=[5], limit=4, adapter=name)
    assert client.next("refused", id="again")["status"] == status
    if "running" not in client.tokens or len(client.tokens["running"]) < 40:
        client.next("end", id="running")
    assert client.tokens["running"] == alone


def test_adapters_are_loaded_and_unloaded(served: tuple[Path, Path]) -> None:
    path, folder = served
    client = Client(path)
    alone = client.ask("alone", adapter="good2")
    client.do("load", id="1", name="fresh")
    assert client.next("refused", id="1")["status"] == 404
    shutil.copytree(folder / "good2", folder / "fresh")
    client.do("load", id="2", name="fresh")
    client.next("done", id="2")
    assert client.ask("fresh", adapter="fresh") == alone
    client.do("load", id="3", name="fresh")
    assert client.next("refused", id="3")["status"] == 400
    client.do("unload", id="4", name="fresh")
    client.next("done", id="4")
    client.do("submit", id="gone", tokens=[5], limit=4, adapter="fresh")
    assert client.next("refused", id="gone")["status"] == 404
    client.do("load", id="5", name="../adapters/good0")
    assert client.next("refused", id="5")["status"] == 404


def test_who_goes_away_takes_the_work_along(served: tuple[Path, Path]) -> None:
    before = Client(served[0])
    for i in range(8):
        before.do("submit", id=str(i), tokens=[5, 6, 7], limit=1000, ignore_eos=True)
    before.next("tokens")
    before.socket.shutdown(socket.SHUT_RDWR)
    client = Client(served[0])
    state = client.next("state")
    assert (state["running"], state["waiting"], state["pages"]) == (0, 0, 0) and state["finished"]["cancelled"] >= 8
    assert len(client.ask("a")) == 12


def test_nonsense_closes_the_connection_and_no_more(served: tuple[Path, Path]) -> None:
    for raw in (
        b"\xff\xfe nonsense\n",
        b"[1, 2]\n",
        b'{"do": "submit"}\n',
        b'{"do": "submit", "id": "x", "tokens": "no"}\n',
    ):
        client = Client(served[0])
        client.socket.sendall(raw)
        with pytest.raises((EOFError, ConnectionError)):
            client.next("tokens")
    assert len(Client(served[0]).ask("a")) == 12


def test_it_drains_and_ends_with_its_keeper(tmp_path: Path) -> None:
    with worker(tmp_path) as (process, path):
        client = Client(path)
        client.do("submit", id="a", tokens=[5, 6, 7], limit=60, ignore_eos=True)
        client.next("tokens")
        process.send_signal(signal.SIGINT)  # of the terminal: it is for whoever keeps watch
        client.do("drain")
        client.do("submit", id="b", tokens=[5], limit=1)
        assert client.next("refused")["status"] == 503
        assert client.next("end")["reason"] == "length" and len(client.tokens["a"]) == 60
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--memory", "200000000"), "give as much, or take a smaller artifact"),
        (("--context", "9999"), "the model's is 1024"),
        (("--adapters", "nowhere"), "nowhere is no folder"),
        (("--policy", "gptq"), "no policy of serving"),
        (("--cache", "int7"), "unknown cache"),
    ],
)
def test_what_cannot_begin_is_refused_in_a_sentence(
    options: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["pocket", "--socket", str(tmp_path / "engine"), *options])
    assert ended.value.code == 2 and not list(tmp_path.iterdir())
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
