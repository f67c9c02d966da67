"""`trimtab serve` with a model and an adapter: it writes what they write alone."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from server_running import Running, until
from test_adapters import write

import trimtab
from trimtab.engine.session import map_of
from trimtab.formats.peft import PREFIX

PROMPTS = ("import os", "def main(", "class Point:\n", "for line in")


def adapter(folder: Path, loaded: trimtab.Loaded) -> None:
    site = next(s for s in map_of(loaded.model).sites if s.role == "down")
    rng = torch.Generator().manual_seed(0)
    out, cols = site.shape
    name = f"{PREFIX}{site.path}.lora_"
    factors = {"A": torch.randn(4, cols, generator=rng), "B": torch.randn(out, 4, generator=rng)}
    write(folder, {f"{name}{which}.weight": value for which, value in factors.items()})


@pytest.mark.slow
def test_many_users_of_two_models_get_what_each_model_writes(tmp_path: Path) -> None:
    loaded = trimtab.load("pocket")
    (tmp_path / "adapters").mkdir()
    adapter(tmp_path / "adapters" / "mine", loaded)
    loaded.add_adapter("mine", tmp_path / "adapters" / "mine")
    alone = {(p, name): "".join(loaded.stream(p, 24, adapter=name)) for p in PROMPTS for name in (None, "mine")}
    assert len(set(alone.values())) > len(PROMPTS)
    options = ["--port", "0", "--adapters", str(tmp_path / "adapters"), "--threads", "1", "--json", "--context", "256"]
    line = [sys.executable, "-c", "from trimtab.cli import main; main()", "serve", "pocket", *options]
    server = Running(tmp_path, line)
    try:
        said = server.ready(seconds=90)
        assert said["model"] == "pocket" and said["adapters"] == ["mine"] and said["context"] == 256
        got: dict[tuple[str, str | None], str] = {}

        def ask(prompt: str, name: str | None) -> None:
            chunks = server.events("/v1/completions", model=name, prompt=prompt, max_tokens=24, temperature=0)
            assert chunks[-1] == "[DONE]", chunks[-1]
            got[prompt, name] = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])

        threads = [threading.Thread(target=ask, args=key) for key in alone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Bytes that are no characters: alone, a text that ends with one waits for more.
        assert {key: text.rstrip("\ufffd") for key, text in got.items()} == alone
        scored = server.ask("/v1/completions", {"prompt": "import os", "max_tokens": 0, "echo": True, "logprobs": 1})[1]
        told = scored["choices"][0]["logprobs"]
        assert told["token_logprobs"][0] is None and all(value < 0 for value in told["token_logprobs"][1:])
        too_long = server.ask("/v1/completions", {"prompt": "a " * 300, "max_tokens": 1})
        assert too_long[0] == 400 and "256" in too_long[1]["error"]["message"]
        until(lambda: server.metric("vllm:num_requests_running") == 0)
        assert server.metric("vllm:generation_tokens_total") == 24 * len(alone)
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, json.dumps(server.err.read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_is_stopped_is_killed_and_comes_back(tmp_path: Path) -> None:
    line = [sys.executable, "-c", "from trimtab.cli import main; main()", "serve", "pocket", "--port", "0", "--json"]
    server = Running(tmp_path, [*line, "--threads", "1", "--context", "256"])
    try:
        server.ready(seconds=120)
        (engine := server.child("server.worker")).send_signal(signal.SIGSTOP)
        status, said, _ = server.ask("/v1/completions", {"prompt": "import os"})
        assert status == 503 and "no sign of life for 15 seconds" in said["error"]["message"]
        assert not server.healthy()
        until(server.healthy, 120)
        assert server.child("server.worker").pid != engine.pid
        assert server.ask("/v1/completions", {"prompt": "import os", "max_tokens": 4})[0] == 200
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.err.read_text()
