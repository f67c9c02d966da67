"""What HTTP adds: texts streamed through `trimtab serve` beside the same engine spoken to over its own socket.

A Llama of 1.1 billion random weights at 4b/g32 is served twice, each by processes of its own: by `trimtab serve`, and
by the process of the engine alone. In turns, 16 clients at once ask either for 64 tokens after prompts of 64, over HTTP
as streams of events that are read to `[DONE]`, and over the socket as lines. Tokens a second count from the first
request to the last end, and the clients run on the same cores. A JSON line is printed and appended to
records/benchmarks/streams.jsonl.

    python benchmarks/streams.py                       # five minutes, 4 GB of memory, 3 GB of disk
    python benchmarks/http.py --small                  # the shipped model; nothing is recorded
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import LARGE, rounded, write_model, write_packed

STREAMS, PROMPT, TEXT = 16, 64, 64


async def over_http(port: int) -> float:
    """Seconds for all streams."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(_stream(port, i) for i in range(STREAMS)))
    assert counts == [TEXT] * STREAMS, counts
    return time.perf_counter() - start


async def _stream(port: int, seed: int) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked = {"prompt": [(seed * 977 + i) % 4000 for i in range(PROMPT)], "max_tokens": TEXT, "temperature": 0}
    body = json.dumps(asked | {"stream": True, "ignore_eos": True, "logprobs": 0}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    tokens, done = 0, False
    async for line in reader:
        if line.startswith(b"data: {"):
            found = json.loads(line[6:])
            tokens += len((found["choices"][0]["logprobs"] or {"tokens": []})["tokens"])
        done |= line.startswith(b"data: [DONE]")
    writer.close()
    assert done, "a stream broke off"
    return tokens


def over_socket(path: Path) -> float:
    """Seconds for all texts."""
    with socket.socket(socket.AF_UNIX) as line, line.makefile("rb") as file:
        line.connect(str(path))
        start, left = time.perf_counter(), STREAMS
        for seed in range(STREAMS):
            tokens = [(seed * 977 + i) % 4000 for i in range(PROMPT)]
            order = {
                "do": "submit",
                "id": str(seed),
                "tokens": tokens,
                "limit": TEXT,
                "ignore_eos": True,
                "logprobs": 0,
            }
            line.sendall(json.dumps(order).encode() + b"\n")
        while left:
            left -= json.loads(file.readline())["is"] == "end"
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="the shipped model; nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where the packed model lies and stays; a temporary one otherwise")
    parser.add_argument("--turns", type=int, default=4)
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark
    from trimtab.models.pocket import POCKET

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        root = asked.folder or Path(temporary)
        packed = root / "4b-g32"
        if not asked.small and not packed.is_dir():
            (root / "plain").mkdir(parents=True)
            write_model(root / "plain", LARGE)
            write_packed(root / "plain", packed, "4b/g32")
            shutil.copy(POCKET["pocket"] / "tokenizer.json", packed)
        model = "pocket" if asked.small else str(packed)
        path = Path(temporary) / "engine"
        alone = subprocess.Popen([sys.executable, "-m", "trimtab.server.worker", model, "--socket", str(path)])
        line = [sys.executable, "-c", "from trimtab.cli import main; main()", "serve", model, "--port", "0", "--json"]
        served = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        try:
            assert served.stdout is not None
            said = ""
            while not said.endswith("}\n"):
                said += served.stdout.readline()
            port = int(json.loads(said)["address"].rpartition(":")[2])
            while not path.exists():
                time.sleep(0.1)
            pairs: list[tuple[float, float]] = []
            for turn in range(asked.turns + 1):
                pair = over_socket(path), asyncio.run(over_http(port))
                pairs += [pair] if turn else []
        finally:
            for process in (served, alone):
                process.terminate()
                process.wait()
    both = [statistics.median(each) for each in zip(*pairs, strict=True)]
    row: dict[str, Any] = {
        **{"benchmark": "streams", "model": "pocket" if asked.small else "1.1 billion weights at 4b/g32"},
        **{"streams": STREAMS, "prompt": PROMPT, "text": TEXT, "turns": asked.turns},
        "engine_tokens_a_second": rounded(STREAMS * TEXT / both[0]),
        "http_tokens_a_second": rounded(STREAMS * TEXT / both[1]),
        "http_over_engine": rounded(statistics.median(http / engine for engine, http in pairs)),
        "load_at_start": round(load, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
