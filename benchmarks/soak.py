"""Mixed load on a real server for a while: streams, clients that vanish, slow readers, adapters that come and go.

`trimtab serve` serves the shipped model with 24 adapters within `--memory`, on one thread. First each kind of request
(a prompt, an adapter, 40 tokens) is answered alone. Then 24 clients ask for kinds at random as streams, with a pause
between two requests; a fifth of them close their connection in the middle, two read slowly, and adapters are unloaded
and loaded by the management routes all the while. Every text that ends must be the one that the kind gives alone; a
request for an adapter that is being exchanged may be refused, and nothing else may.

Every second the resident memory of all three processes, the pages that texts hold and the share of the pool that is
taken are written down. After a fifth of the time, each process' memory is fitted by a line through the medians of 16
equal spans: `grows` where the 95 % interval of its slope lies above the tolerance of 5 % an hour, `flat` where it lies
below, else `not decided`. The verdict is `failed` where anything is lost or wrong, a process died or grows, or a
request or a page is left, `partly` where a process' growth is not decided, else `held`.

With `--disconnects N` clients do nothing but vanish, half of them in the middle of a text and half while their prompts
are read, while one client asks for the same text again and again. `beyond` is how many tokens the engine wrote that no
client saw, per client that vanished: what it did between a client's end and its own hearing of that.

A JSON line is printed and appended to records/benchmarks/soak.jsonl, or disconnects.jsonl.

    python benchmarks/soak.py --minutes 30
    python benchmarks/soak.py --minutes 1 --small      # to see that it runs; nothing is recorded
    python benchmarks/soak.py --disconnects 1000
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.serving import write_adapters

CLIENTS, SLOW, ADAPTERS, KINDS, TEXT, KEY = 24, 2, 24, 60, 40, "a-key-of-the-soak"
SPANS, TOLERANCE = 16, 0.05  # of the fit, and the share of a process' memory by which it may grow in an hour
LOST = (OSError, ValueError, IndexError, KeyError, asyncio.IncompleteReadError)  # an answer that is none


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


async def stream(
    port: int, body: dict[str, Any], *, most: int | None = None, wait: float | None = None, slow: float = 0.0
) -> tuple[int, str, bool]:
    """Status, text, and whether the stream was whole.

    Args:
        most: chunks after which the connection is closed.
        wait: seconds after which it is closed, whatever has come.
        slow: seconds before each chunk is read.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12 if slow else 1 << 16)
    asked = {"max_tokens": TEXT} | body | {"stream": True, "ignore_eos": True, "temperature": 0}
    raw = json.dumps(asked).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    if wait is not None:
        await writer.drain()
        await asyncio.sleep(wait)
        writer.transport.abort()
        return 0, "", False
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
            await asyncio.sleep(slow)
        done |= line.startswith(b"data: [DONE]")
    writer.close()
    return status, text, done


async def metric(port: int, *names: str) -> list[float]:
    """Numbers of the server by name."""
    text = (await talk(port, "GET", "/metrics"))[1].decode()
    found = (re.search(rf"^{name}[ {{].*?([0-9.e+-]+)$", text, re.M) for name in names)
    return [float(match[1]) for match in found if match]


class Soak:
    """The load, and what came of it."""

    def __init__(self, port: int, model: str, names: list[str], seed: int, pause: float) -> None:
        self.port, self.rng, self.names, self.pause = port, random.Random(seed), names, pause
        self.kinds = [
            {
                "model": self.rng.choice([model, *names]),
                "prompt": [self.rng.randrange(4000) for _ in range(self.rng.randrange(4, 120))],
            }
            for _ in range(KINDS)
        ]
        self.alone: list[str] = []
        self.counts: Counter[str] = Counter({"lost": 0, "wrong": 0})
        self.lost: Counter[str] = Counter()
        self.away: set[str] = set()

    async def learn(self) -> None:
        """What each kind gives alone."""
        for kind in self.kinds:
            status, text, done = await stream(self.port, kind)
            assert status == 200 and done, (status, text)
            self.alone.append(text)

    async def client(self, until: float, slow: bool) -> None:
        """One after the other, until the time is over."""
        while time.monotonic() < until:
            i = self.rng.randrange(KINDS)
            named = self.kinds[i]["model"]
            vanishes = self.rng.random() < 0.2
            risky = named in self.away
            most = self.rng.randrange(1, 20) if vanishes else None
            try:
                status, text, done = await stream(self.port, self.kinds[i], most=most, slow=0.2 if slow else 0.0)
            except LOST as error:
                self._lose(type(error).__name__)
                await asyncio.sleep(1)
                continue
            risky |= named in self.away
            if status == 200 and vanishes and not done:
                self.counts["vanished"] += 1
                self.counts["wrong"] += not self.alone[i].startswith(text)
            elif status == 200 and done:
                self.counts["whole, read slowly" if slow else "whole"] += 1
                self.counts["wrong"] += text != self.alone[i]
            elif status == 404 and risky:
                self.counts["refused while its adapter was away"] += 1
            elif status == 429:
                self.counts["told to come again"] += 1
                await asyncio.sleep(1)
            else:
                self._lose(f"status {status}")
            await asyncio.sleep(self.rng.expovariate(1 / self.pause) if self.pause else 0)

    async def churn(self, until: float) -> None:
        """Adapters go and come."""
        while time.monotonic() < until:
            name = self.rng.choice(self.names)
            self.away.add(name)
            for route in ("unload", "load"):
                try:
                    status, said = await talk(self.port, "POST", f"/v1/{route}_lora_adapter", {"lora_name": name}, KEY)
                except LOST as error:
                    status, said = 0, type(error).__name__.encode()
                if status == 200:
                    self.counts[f"{route}ed"] += 1
                else:
                    self._lose(f"{route}: {said[:80].decode(errors='replace')}")
                await asyncio.sleep(0.2)
            await asyncio.sleep(0.5)
            self.away.discard(name)

    def _lose(self, how: str) -> None:
        self.counts["lost"] += 1
        self.lost[how] += 1


class Watch:
    """What the server's processes hold, second by second."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid
        self.seconds: list[float] = []
        self.rows: list[dict[str, float]] = []
        self.pids: set[tuple[str, int]] = set()

    async def look(self) -> dict[str, float]:
        """Bytes of each process, pages of texts, and the taken share of the pool."""
        import psutil

        parent = psutil.Process(self.pid)
        row = {"parent": float(parent.memory_info().rss)}
        for child in parent.children():
            line = " ".join(child.cmdline())
            which = "engine" if "server.worker" in line else "http" if "server.front" in line else ""
            if which:
                row[which] = float(child.memory_info().rss)
                self.pids.add((which, child.pid))
        row["pages"], row["pool"] = await metric(self.port, "trimtab:pages", "vllm:kv_cache_usage_perc")
        return row

    async def run(self, until: float) -> None:
        """Look every second."""
        import psutil

        begun = time.monotonic()
        while time.monotonic() < until:
            try:
                row = await self.look()
            except (psutil.Error, *LOST):
                await asyncio.sleep(1)
                continue
            self.seconds.append(time.monotonic() - begun)
            self.rows.append(row)
            await asyncio.sleep(1)

    @property
    def restarts(self) -> int:
        """How many processes there were beyond one of each."""
        return len(self.pids) - len({which for which, _ in self.pids})

    def grown(self) -> dict[str, dict[str, Any]]:
        """By process: how its memory went."""
        found = {}
        for which in ("engine", "http", "parent"):
            pairs = [(at, row[which]) for at, row in zip(self.seconds, self.rows, strict=True) if which in row]
            found[which] = growth(*zip(*pairs, strict=True))
        return found


def growth(seconds: Sequence[float], held: Sequence[float]) -> dict[str, Any]:
    """The slope of memory after a fifth of the time, in bytes a minute, with a 95 % interval, and what it says.

    >>> leak = growth(range(1000), [1e8 + 1e5 * i for i in range(1000)])
    >>> leak["verdict"], round(leak["slope"]), growth(range(1000), [1e8] * 1000)["verdict"]
    ('grows', 6000000, 'flat')
    """
    from scipy import stats

    begin, end = seconds[0] + (seconds[-1] - seconds[0]) / 5, seconds[-1]
    spans: list[list[tuple[float, float]]] = [[] for _ in range(SPANS)]
    for at, value in zip(seconds, held, strict=True):
        if at >= begin:
            spans[min(SPANS - 1, int(SPANS * (at - begin) / (end - begin)))].append((at / 60, value))
    points = [[statistics.median(column) for column in zip(*span, strict=True)] for span in spans if span]
    fit = stats.linregress(*zip(*points, strict=True))
    half = float(stats.t.ppf(0.975, len(points) - 2) * fit.stderr) if len({held for _, held in points}) > 1 else 0.0
    low, high, allowed = fit.slope - half, fit.slope + half, TOLERANCE * points[0][1] / 60
    return {
        **{"first": int(points[0][1]), "last": int(points[-1][1]), "most": int(max(held))},
        **{"slope": float(fit.slope), "low": float(low), "high": float(high), "allowed": allowed},
        "verdict": "grows" if low > allowed else "flat" if high <= allowed else "not decided",
    }


async def left(port: int) -> dict[str, float]:
    """What is still asked for, and the pages that texts hold."""
    await asyncio.sleep(2)
    names = ("num_requests_running", "num_requests_waiting")
    found = await metric(port, *(f"vllm:{name}" for name in names), "trimtab:pages")
    return dict(zip((*names, "pages"), found, strict=True))


async def soaked(port: int, pid: int, ready: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """The load of some minutes, and its verdict."""
    soak, watch = Soak(port, ready["model"], list(ready["adapters"]), asked.seed, asked.pause), Watch(port, pid)
    await soak.learn()
    until = time.monotonic() + 60 * asked.minutes
    clients = (soak.client(until, slow=i < SLOW) for i in range(CLIENTS))
    await asyncio.gather(watch.run(until), soak.churn(until), *clients)
    rest, memory = await left(port), watch.grown()
    bad = soak.counts["lost"] or soak.counts["wrong"] or watch.restarts or any(rest.values())
    trends = {each["verdict"] for each in memory.values()}
    return {
        "minutes": asked.minutes,
        **{"clients": CLIENTS, "slow": SLOW, "pause": asked.pause, "adapters": ADAPTERS},
        **{"counts": dict(soak.counts), "lost": dict(soak.lost), "restarts": watch.restarts, "left": rest},
        **{"memory": memory, "samples": len(watch.rows), "pages_most": max(row["pages"] for row in watch.rows)},
        "verdict": "failed" if bad or "grows" in trends else "held" if trends == {"flat"} else "partly",
    }


async def vanished(port: int, pid: int, ready: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Clients that do nothing but go away, and what is left of them."""
    rng, watch, turns = random.Random(asked.seed), Watch(port, pid), list(range(asked.disconnects))
    steady = {"prompt": [5, 6, 7], "max_tokens": 24}
    alone, counts, seen = (await stream(port, steady))[1], Counter({"lost": 0, "wrong": 0}), 0
    width = ready["context"] - 300

    async def away() -> None:
        nonlocal seen
        while turns:
            reading = turns.pop() % 2 == 0
            try:
                if reading:
                    prompt = [rng.randrange(4000) for _ in range(rng.randrange(width // 2, width))]
                    await stream(port, {"prompt": prompt, "max_tokens": 200}, wait=rng.uniform(0, 0.1))
                else:
                    most = rng.randrange(1, 20)
                    status, _, done = await stream(port, {"prompt": [9, 8, 7], "max_tokens": 200}, most=most)
                    assert not done
                    seen += most if status == 200 else 0
                    counts["lost"] += status != 200
            except LOST:
                counts["lost"] += 1
            counts["while the prompt was read" if reading else "in the middle of a text"] += 1

    async def other() -> None:
        nonlocal seen
        while turns:
            _, text, done = await stream(port, steady)
            counts["whole"] += 1
            counts["wrong"] += text != alone or not done
            seen += steady["max_tokens"]  # type: ignore[operator]

    await left(port)
    before, (written,) = await watch.look(), await metric(port, "trimtab:engine_tokens")
    begun = time.monotonic()
    await asyncio.gather(other(), *(away() for _ in range(16)))
    seconds = time.monotonic() - begun
    rest, after = await left(port), await watch.look()
    beyond = (await metric(port, "trimtab:engine_tokens"))[0] - written - seen
    counts["wrong"] += (await stream(port, steady))[1] != alone
    equal = after["pages"] == before["pages"] and after["pool"] == before["pool"] and not any(rest.values())
    return {
        **{"disconnects": asked.disconnects, "seconds": seconds, "counts": dict(counts), "left": rest},
        **{"before": before, "after": after, "beyond": beyond / asked.disconnects, "restarts": watch.restarts},
        "verdict": "held" if equal and not (counts["lost"] or counts["wrong"] or watch.restarts) else "failed",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--disconnects", type=int, help="so many clients that vanish, in place of some minutes of all")
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds between two requests of a client")
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
        line += ["--adapters", str(adapters), "--memory", asked.memory, "--admin-key", KEY, "--threads", "1"]
        served = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        try:
            assert served.stdout is not None
            said = ""
            while not said.endswith("}\n"):
                heard = served.stdout.readline()
                if not heard:
                    raise SystemExit("the server did not begin; what it says of that stands above")
                said += heard
            ready = json.loads(said)
            port = int(ready["address"].rpartition(":")[2])
            work = vanished if asked.disconnects else soaked
            found = asyncio.run(work(port, served.pid, ready, asked))
        finally:
            served.terminate()
            code = served.wait()
    row = {
        **{"benchmark": "disconnects" if asked.disconnects else "soak", "seed": asked.seed},
        **{"memory_asked": asked.memory, "pool": ready["pool"]},
        **found,
        **{"exit_code": code, "load_at_start": round(load, 1)},
    }
    row["verdict"] = row["verdict"] if code == 0 else "failed"
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
