"""What happens to `trimtab serve` and its clients when something breaks, stalls or lies."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from server_engine import CONTEXT, CRASH, HANG, LOOP, NEVER, NOISE
from server_running import ENGINE, PATIENCE, Running, running, until

from trimtab.server.pulse import Ear, Pulse

SLOW = {"header_seconds": 1.0, "body_seconds": 1.0, "patience": 200, "drain": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("faults"), "--delay", "0.005", **SLOW) as started:
        yield started


def read_all(connection: socket.socket) -> bytes:
    """All that comes until the other side closes; a reset counts as that."""
    parts = []
    with connection:
        try:
            while part := connection.recv(65_536):
                parts.append(part)
        except ConnectionResetError:
            pass
    return b"".join(parts)


@pytest.mark.parametrize("seed", [CRASH, NOISE])
def test_an_engine_that_dies_or_babbles_ends_what_it_had_and_comes_back(server: Running, seed: int) -> None:
    until(server.healthy)
    other = server.raw(server.post("/v1/completions", prompt="a b", max_tokens=10_000, stream=True))
    other.recv(1)
    streamed = server.events("/v1/completions", prompt="a b c", max_tokens=50, seed=seed)
    assert "engine ended" in streamed[-1]["error"]["message"] and streamed[-1]["error"]["type"] == "server_error"
    assert b"[DONE]" not in read_all(other)
    until(server.healthy)
    status, answer, headers = server.ask("/v1/completions", {"prompt": "a b c", "max_tokens": 50, "seed": seed})
    assert status == 503 and int(headers["retry-after"]) > 0 and "try again" in answer["error"]["message"]
    until(server.healthy)
    assert server.ask("/v1/completions", {"prompt": "a b", "max_tokens": 2})[1]["choices"][0]["text"] == "a b"


@pytest.mark.parametrize("how", ["stopped", "in an endless loop"])
def test_an_engine_that_hangs_is_killed_and_started_again(tmp_path: Path, how: str) -> None:
    with running(tmp_path, "--delay", "0.02", silence=2.0) as server:
        engine = server.child("engine")
        other = server.raw(server.post("/v1/completions", prompt="a b", max_tokens=10_000, stream=True))
        other.recv(1)
        if how == "stopped":
            engine.send_signal(signal.SIGSTOP)
        else:
            asking = server.raw(server.post("/v1/completions", prompt="a b", max_tokens=9, seed=LOOP))
            assert b" 503 " in read_all(asking)
        told = read_all(other).decode()
        assert "the engine gave no sign of life for 2 seconds and was killed; try again" in told
        until(lambda: not engine.is_running())
        until(server.healthy)
        assert server.ask("/v1/completions", {"prompt": "a b", "max_tokens": 2})[1]["choices"][0]["text"] == "a b"
        assert "no sign of life" in server.err.read_text() and "the engine is back" in server.err.read_text()


def test_an_engine_is_not_taken_for_hung_because_it_begins_late_or_its_keeper_slept(tmp_path: Path) -> None:
    (hold := tmp_path / "hold").touch()
    with running(tmp_path, "--hold", str(hold), wait=False, silence=1.5) as server:
        engine = server.child("engine")
        time.sleep(3)
        hold.unlink()
        server.ready()
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(3)
        server.process.send_signal(signal.SIGCONT)
        time.sleep(1)
        assert server.healthy() and engine.is_running() and server.child("engine").pid == engine.pid


def test_a_pulse_stops_with_its_loop_and_an_ear_hears_that(tmp_path: Path) -> None:
    ear = Ear(tmp_path / "beat", silence=1.2)
    assert not ear.hung()
    pulse = Pulse(tmp_path / "beat", longest=1.0)
    late = time.monotonic() + 3
    while time.monotonic() < late:
        pulse.turn()
        assert not ear.hung()
        time.sleep(0.05)
    until(ear.hung, 20)
    ear.forget()
    assert not ear.hung()


def test_health_says_when_there_is_no_engine(tmp_path: Path) -> None:
    (hold := tmp_path / "hold").touch()
    with running(tmp_path, "--hold", str(hold), wait=False) as server:
        front = server.child("server.front")
        server.port = until(
            lambda: next((c.laddr.port for c in front.net_connections("tcp") if c.status == "LISTEN"), 0)
        )
        until(lambda: server.ask("/health")[0] == 503)
        status, answer, headers = server.ask("/v1/completions", {"prompt": "a"})
        assert status == 503 and "not ready" in answer["error"]["message"] and "retry-after" in headers
        assert server.ask("/v1/models")[0] == 503 and server.ask("/metrics")[0] == 200
        hold.unlink()
        server.ready()
        assert server.healthy()
        hold.touch()
        server.child("engine").send_signal(signal.SIGKILL)
        until(lambda: not server.healthy())
        hold.unlink()
        until(server.healthy)


def test_the_http_process_comes_back_and_the_address_never_goes(server: Running) -> None:
    streaming = server.raw(server.post("/v1/completions", prompt="a b", max_tokens=10_000, stream=True))
    streaming.recv(1)
    connected = len(server.orders("connected"))
    server.child("server.front").send_signal(signal.SIGKILL)
    read_all(streaming)
    status, answer, _ = server.ask("/v1/completions", {"prompt": "a b", "max_tokens": 2})  # waits at the open door
    assert status == 503 or answer["choices"][0]["text"] == "a b"
    until(server.healthy)
    assert len(server.orders("connected")) == connected + 1
    assert server.ask("/v1/completions", {"prompt": "a b", "max_tokens": 2})[0] == 200


def test_a_client_that_goes_away_is_cancelled(server: Running) -> None:
    until(server.healthy)
    aborted = 'vllm:request_success_total{model_name="pocket",engine="0",finished_reason="abort"}'
    before = server.metric(aborted)
    for stream in (True, False):
        for seed in (None, HANG, NEVER):
            many = len(server.orders("cancel")), len(server.orders("submit"))
            connection = server.raw(
                server.post("/v1/completions", prompt="a b", max_tokens=9_000, stream=stream, seed=seed, n=2)
            )
            until(lambda: len(server.orders("submit")) == many[1] + 2)  # noqa: B023
            connection.close()
            until(lambda: len(server.orders("cancel")) == many[0] + 2)  # noqa: B023
    until(lambda: server.metric(aborted) == before + 12)


def test_a_reader_who_does_not_read_is_cut_and_holds_up_nobody(server: Running) -> None:
    until(server.healthy)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    cancelled = len(server.orders("cancel"))
    connection.sendall(
        server.post("/v1/completions", prompt="a b c d", max_tokens=CONTEXT - 10, n=8, stream=True, logprobs=20)
    )
    slowest = 0.0
    while len(server.orders("cancel")) < cancelled + 8:
        begun = time.monotonic()
        assert server.ask("/v1/completions", {"prompt": "a b", "max_tokens": 1})[0] == 200
        slowest = max(slowest, time.monotonic() - begun)
        assert psutil.Process(server.child("server.front").pid).memory_info().rss < 300_000_000
    assert b"[DONE]" not in read_all(connection)
    assert slowest < PATIENCE / 4


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET /health HT", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"],
)
def test_who_sends_drop_by_drop_is_let_go(server: Running, begun: bytes) -> None:
    until(server.healthy)
    connection = server.raw(begun)
    begun_at = time.monotonic()
    stopped = threading.Event()

    def drip() -> None:
        while not stopped.wait(0.2):
            try:
                connection.send(b"a" if begun else b"")
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    said = read_all(connection)
    stopped.set()
    thread.join()
    assert time.monotonic() - begun_at < PATIENCE / 2 and (not said or said.startswith(b"HTTP/1.1 4"))
    assert server.healthy()


def test_a_kept_connection_may_wait_between_requests(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    for _ in range(2):
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        time.sleep(1.3)  # longer than its headers may take
    connection.close()


def test_hostile_bytes_break_nothing(server: Running) -> None:
    good = server.post("/v1/completions", prompt="a b", max_tokens=2, stream=True)
    rng = random.Random(0)
    cases = [
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /%00%ff/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"\xff" * 30_000 + b"\r\n\r\n",
        good + good[: len(good) // 2],
    ]
    for _ in range(40):
        mutant = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            mutant[rng.randrange(len(mutant))] = rng.randrange(256)
        cases.append(bytes(mutant))
    for case in cases:
        connection = server.raw(case)
        connection.settimeout(5)
        connection.shutdown(socket.SHUT_WR)
        said = read_all(connection)
        assert not said or said.startswith(b"HTTP/1.1 ")
        assert b" 500 " not in said[:20]
    chunks = b"".join(b"10000\r\n" + b" " * 65_536 + b"\r\n" for _ in range(40))
    head = server.post("/tokenize").partition(b"Connection")[0] + b"Transfer-Encoding: chunked\r\n\r\n"
    connection = server.raw(head)
    try:
        connection.sendall(chunks + b"0\r\n\r\n")
        assert b" 413 " in connection.recv(100)
    finally:
        connection.close()
    assert server.healthy() and "Traceback" not in server.err.read_text()


def test_more_connections_than_are_held_get_an_answer_and_harm_nobody(tmp_path: Path) -> None:
    with running(tmp_path, "--delay", "0.02", clients=30) as server:
        streaming = server.raw(server.post("/v1/completions", prompt="a b", max_tokens=60, stream=True))
        streaming.recv(1)
        idle = [server.raw() for _ in range(300)]
        refused = read_all(idle.pop()).decode()
        assert refused.startswith("HTTP/1.1 503 ") and "30 connections are open" in refused
        assert len(psutil.Process(server.child("server.front").pid).net_connections("tcp")) <= 32
        assert b"[DONE]" in read_all(streaming)
        for connection in idle:
            connection.close()
        until(server.healthy)
        assert "Traceback" not in server.err.read_text()


def test_headers_that_go_on_and_on_are_said_to_be_too_long(server: Running) -> None:
    until(server.healthy)
    connection = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 17_000)
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 431 ") and b"16,384" in answer


def test_many_at_once_all_get_their_own(server: Running) -> None:
    until(server.healthy)
    said: dict[int, str] = {}

    def ask(place: int) -> None:
        chunks = server.events("/v1/completions", prompt=[10 + place], max_tokens=20)
        said[place] = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    from trimtab.models.pocket import POCKET
    from trimtab.server.text import Vocabulary

    vocabulary = Vocabulary(POCKET["pocket"])
    assert said == {place: vocabulary.text([10 + place] * 20) for place in range(24)}


@pytest.mark.parametrize(("tokens", "drain"), [(40, 50.0), (10_000, 1.0)])
def test_a_server_that_is_stopped_lets_texts_end_within_their_time(tmp_path: Path, tokens: int, drain: float) -> None:
    with running(tmp_path, "--delay", "0.02", drain=drain) as server:
        children = [server.child("server.front"), server.child("engine")]
        connection = server.raw(server.post("/v1/completions", prompt="a b", max_tokens=tokens, stream=True))
        head = connection.recv(10)
        server.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                server.raw().close()
            except OSError:
                return True
            return False

        until(refused)
        text = (head + read_all(connection)).decode()
        assert ("[DONE]" in text) == (tokens == 40)
        assert ("its time for this is over" in text) == (tokens != 40)
        assert server.process.wait(PATIENCE) == 0
        assert not any(child.is_running() for child in children)
        assert "Traceback" not in server.err.read_text()


def test_children_have_no_key_of_the_environment_and_end_with_a_parent_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_API_KEY", "s3cret")
    with running(tmp_path, key="s3cret") as server:
        front, engine = server.child("server.front"), server.child("engine")
        assert "TRIMTAB_API_KEY" in psutil.Process(server.process.pid).environ()
        assert not any("s3cret" in child.environ().values() for child in (front, engine))
        folder = Path(engine.cmdline()[engine.cmdline().index("--socket") + 1]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        server.process.kill()
        server.process.wait()
        front.wait(PATIENCE)
        engine.wait(PATIENCE)
        shutil.rmtree(folder)


def test_what_cannot_be_served_is_said_once_with_exit_code_2(tmp_path: Path) -> None:
    def told(*engine: str, **settings: Any) -> tuple[int, str]:
        line = [sys.executable, str(ENGINE), "serve", json.dumps({"engine": engine, "settings": settings})]
        done = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)
        assert "Traceback" not in done.stderr and done.stdout == ""
        return done.returncode, done.stderr

    assert told("--fail", "2") == (2, "trimtab: this engine cannot serve that\n")
    code, said = told("--folder", str(tmp_path))
    assert code == 2 and said.count("\n") == 1 and "no tokenizer" in said
    code, said = told("--fail", "1")
    assert code == 2 and said.splitlines()[-1].startswith("trimtab: the engine") and said.count("started again") == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "no key was given"),
        (["--host", "no.such.host.invalid"], "no address"),
        (["--adapters", "nowhere"], "no folder"),
        (["--cache", "int1"], "choose fp16"),
        (["--memory", "much"], "memory"),
        (["--key", ""], "--key"),
        (["--key", "a", "--admin-key", "a"], "the same"),
        (["--port", "65536"], "65535"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(cli: Any, options: list[str], said: str) -> None:
    done = cli("serve", "pocket", *options)
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1


def test_a_taken_port_and_missing_packages_are_one_sentence(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = cli("serve", "pocket", "--port", str(taken.getsockname()[1]))
    assert done.code == 2 and "choose another --port" in done.err
    monkeypatch.setattr("trimtab.server.parent.find_spec", lambda name: None if name == "uvicorn" else name)
    done = cli("serve", "pocket")
    assert done.code == 2 and "uvicorn" in done.err and "pip install 'trimtab[serve]'" in done.err


def test_the_parent_and_the_http_process_load_no_torch() -> None:
    heavy = "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    for module in (
        "trimtab.cli, trimtab.cli.serve, trimtab.server.parent",
        "trimtab.server.front, trimtab.server.chat",
    ):
        done = subprocess.run([sys.executable, "-c", f"import sys, {module}; {heavy}"], capture_output=True, text=True)
        assert done.stdout == "[]\n", done.stderr
