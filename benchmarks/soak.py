"""Mixed load on a real server for a while: streams, clients that vanish, adapters that come and go.

`trimtab serve` serves the shipped model with 24 adapters within `--memory`. First each kind of request (a prompt, an
adapter, 40 tokens) is answered alone. Then 24 clients ask for kinds at random as streams, a fifth of them close their
connection in the middle, and adapters are unloaded and loaded by the management routes all the while. Every text that
ends must be the one that the kind gives alone; a request for an adapter that is being exchanged may be refused, and
nothing else may. The memory of the engine and of the HTTP process is looked at every second. When the load ends no
request may be left and no page held. A JSON line is printed and appended to records/benchmarks/soak.jsonl.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 1 --small      # to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.serving import write_adapters

CLIENTS, ADAPTERS, KINDS, TEXT, KEY = 24, 24, 60, 40, "a key of the soak".replace(" ", "-")


async def talk(port: int, method: str, path: str, body: Any = None, key: str = "") -> tuple[int, bytes]:
    """A whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    found = await reader.read()
    writer.close()
    return int(found.split(b" ", 2)[1]), found.partition(b"\r\n\r\n")[2]


async def stream(port: int, body: dict[str, Any], most: int | None = None) -> tuple[int, str, bool]:
    """Status, text, and whether the stream was whole; after `most` chunks the connection is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = json.dumps(body | {"stream": True, "ignore_eos": True, "temperature": 0, "max_tokens": TEXT}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    status, text, seen, done = int((await reader.readline()).split(b" ", 2)[1]), "", 0, False
    async for line in reader:
        if line.startswith(b"data: {"):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                status = 500
                break
            text += chunk["choices"][0]["text"]
            seen += 1
            if seen == most:
                writer.transport.abort()
                return status, text, False
        done |= line.startswith(b"data: [DONE]")
    writer.close()
    return status, text, done


class Soak:
    """The load, and what came of it."""

    def __init__(self, port: int, model: str, names: list[str], seed: int) -> None:
        self.port, self.rng, self.names = port, random.Random(seed), names
        self.kinds = [
            {
                "model": self.rng.choice([model, *names]),
                "prompt": [self.rng.randrange(4000) for _ in range(self.rng.randrange(4, 120))],
            }
            for _ in range(KINDS)
        ]
        self.alone: list[str] = []
        self.counts: Counter[str] = Counter()
        self.away: set[str] = set()

    async def learn(self) -> None:
        """What each kind gives alone."""
        for kind in self.kinds:
            status, text, done = await stream(self.port, kind)
            assert status == 200 and done, (status, text)
            self.alone.append(text)

    async def client(self, until: float) -> None:
        """One after the other, until the time is over."""
        while time.monotonic() < until:
            i = self.rng.randrange(KINDS)
            named = self.kinds[i]["model"]
            vanishes = self.rng.random() < 0.2
            risky = named in self.away
            status, text, done = await stream(self.port, self.kinds[i], self.rng.randrange(1, 20) if vanishes else None)
            risky |= named in self.away
            if status == 200 and vanishes and not done:
                self.counts["vanished"] += 1
                self.counts["wrong"] += not self.alone[i].startswith(text)
            elif status == 200 and done:
                self.counts["whole"] += 1
                self.counts["wrong"] += text != self.alone[i]
            elif status == 404 and risky:
                self.counts["refused while its adapter was away"] += 1
            elif status == 429:
                self.counts["told to come again"] += 1
                await asyncio.sleep(1)
            else:
                self.counts[f"lost, status {status}"] += 1

    async def churn(self, until: float) -> None:
        """Adapters go and come."""
        while time.monotonic() < until:
            name = self.rng.choice(self.names)
            self.away.add(name)
            for route in ("unload", "load"):
                status, said = await talk(self.port, "POST", f"/v1/{route}_lora_adapter", {"lora_name": name}, KEY)
                self.counts[f"{route}ed" if status == 200 else f"not {route}ed: {said[:80]!r}"] += 1
                await asyncio.sleep(0.2)
            await asyncio.sleep(0.5)
            self.away.discard(name)


async def watched(pid: int, until: float) -> dict[str, list[int]]:
    """Bytes of the server's processes, every second."""
    import psutil

    found: dict[str, list[int]] = {"engine": [], "http": []}
    while time.monotonic() < until:
        for child in psutil.Process(pid).children():
            line = " ".join(child.cmdline())
            which = "engine" if "server.worker" in line else "http" if "server.front" in line else ""
            if which:
                found[which].append(child.memory_info().rss)
        await asyncio.sleep(1)
    return found


async def soaked(port: int, pid: int, model: str, names: list[str], minutes: float, seed: int) -> dict[str, Any]:
    """Everything."""
    soak = Soak(port, model, names, seed)
    await soak.learn()
    until = time.monotonic() + 60 * minutes
    memory, *_ = await asyncio.gather(
        watched(pid, until), soak.churn(until), *(soak.client(until) for _ in range(CLIENTS))
    )
    await asyncio.sleep(2)
    _, metrics = await talk(port, "GET", "/metrics")
    left = {
        name: float(re.search(rf"^vllm:{name}[ {{].*?([0-9.e+-]+)$", metrics.decode(), re.M)[1])  # type: ignore[index]
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    }
    tenth = max(1, len(memory["engine"]) // 10)
    grown = {
        which: {
            "after_a_tenth": int(statistics.median(each[tenth : 2 * tenth])),
            "at_the_end": int(statistics.median(each[-tenth:])),
            "most": max(each),
        }
        for which, each in memory.items()
    }
    return {"counts": dict(soak.counts), "left": left, "memory": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--memory", default="700MB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="nothing is recorded")
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark
    from trimtab.models.pocket import POCKET

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        adapters = Path(temporary) / "adapters"
        write_adapters(adapters, json.loads((POCKET["pocket"] / "config.json").read_text("utf-8")), ADAPTERS, ADAPTERS)
        line = [
            sys.executable,
            "-c",
            "from trimtab.cli import main; main()",
            "serve",
            "pocket",
            "--port",
            "0",
            "--json",
        ]
        line += ["--adapters", str(adapters), "--memory", asked.memory, "--admin-key", KEY]
        served = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        try:
            assert served.stdout is not None
            said = ""
            while not said.endswith("}\n"):
                said += served.stdout.readline()
            ready = json.loads(said)
            port = int(ready["address"].rpartition(":")[2])
            names = list(ready["adapters"])
            found = asyncio.run(soaked(port, served.pid, ready["model"], names, asked.minutes, asked.seed))
        finally:
            served.terminate()
            code = served.wait()
    row = {
        **{"benchmark": "soak", "minutes": asked.minutes, "memory_asked": asked.memory, "seed": asked.seed},
        **{"clients": CLIENTS, "adapters": ADAPTERS, "pool": ready["pool"], "exit_code": code},
        **found,
        "load_at_start": round(load, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
