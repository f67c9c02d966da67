"""An engine without a model, for tests of `trimtab serve`: it says the prompt again, and does as the seed tells it.

python tests/server_engine.py serve JSON    the server, with this engine in place of the real one
python tests/server_engine.py engine --socket PATH OPTIONS
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError
from trimtab.models.pocket import POCKET
from trimtab.server.pulse import Pulse, beat_of
from trimtab.server.wire import LONGEST, Ready, State, described, line

REFUSE, CRASH, HANG, EOS, NOISE, BUSY, NEVER, LOOP = 9000, 9100, 9200, 9300, 9400, 9500, 9600, 9700
CONTEXT = 16_384


class Engine:
    """One connection's requests."""

    def __init__(self, options: argparse.Namespace, writer: asyncio.StreamWriter) -> None:
        self.options, self.writer = options, writer
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.prompt_tokens = self.tokens = 0

    def send(self, kind: str, **fields: Any) -> None:
        if not self.writer.is_closing():
            self.writer.write(line(kind, **fields))

    def log(self, **what: Any) -> None:
        if self.options.log:
            with open(self.options.log, "a") as file:
                file.write(json.dumps(what) + "\n")

    def ready(self) -> Ready:
        adapters = (
            tuple(sorted(path.name for path in Path(self.options.adapters).iterdir())) if self.options.adapters else ()
        )
        sizes = {"places": 8, "cache_tokens": 4 * CONTEXT, "token_bytes": 96.0, "adapter_bytes": 1000}
        return Ready(
            "pocket",
            self.options.folder,
            CONTEXT,
            4096,
            (1,),
            **sizes,
            pool=10**6,
            memory=None,
            adapters=adapters,
            engine="none",
        )

    async def hear(self, message: dict[str, Any]) -> None:
        kept = {k: v for k, v in message.items() if k != "tokens"} | {"length": len(message.get("tokens", ()))}
        self.log(**kept)
        name = message.get("id", "")
        if message["do"] == "submit":
            self.tasks[name] = asyncio.create_task(self.write(message))
        elif message["do"] == "cancel" and name in self.tasks:
            self.tasks.pop(name).cancel()
            self.send("end", id=name, reason="cancelled")
        elif message["do"] == "load" and not Path(message["path"]).is_dir():
            self.send("refused", id=name, status=404, message=f"no folder {message['path']}", retry_after=None)
        elif message["do"] in ("load", "unload"):
            self.send("done", id=name)

    async def write(self, asked: dict[str, Any]) -> None:
        """The prompt's own tokens, again and again."""
        name, tokens, seed = asked["id"], asked["tokens"], asked["seed"]
        if seed == REFUSE:
            self.send("refused", id=name, status=429, message="too many wait already", retry_after=3)
            return
        if seed == BUSY:
            self.send("refused", id=name, status=503, message="there is no memory for it", retry_after=None)
            return
        if seed == NEVER:
            return
        self.prompt_tokens += len(tokens)
        if asked["echo"]:
            scores = [None, *(-0.1 * (1 + token % 7) for token in tokens[1:])]
            tops = [
                None if s is None else self.top(t, s, asked["logprobs"]) for t, s in zip(tokens, scores, strict=True)
            ]
            self.send("prompt", id=name, logprobs=scores, top=tops)
        said = [token for token in tokens if token > 1] or [5]
        for step in range(asked["limit"]):
            token = 1 if seed == EOS and step == 3 else said[step % len(said)]
            if seed == NOISE and step == 2:
                self.writer.write(b"\xff\xfe not a message\n")
            if seed == CRASH and step == 2:
                os.kill(os.getpid(), 9)
            if seed == HANG and step == 2:
                return
            while seed == LOOP and step == 2:
                pass
            score = None if asked["logprobs"] is None else -0.1 * (1 + token % 7)
            self.send("tokens", of=[[name, token, score, score and self.top(token, score, asked["logprobs"])]])
            self.tokens += 1
            if token in asked["stop"]:
                return self.end(name, "stop")
            await asyncio.sleep(self.options.delay)
        self.end(name, "length")

    @staticmethod
    def top(token: int, score: float, many: int) -> list[list[Any]]:
        return [[token, score], *([token + 1 + i, score - 1 - i] for i in range(many - 1))][:many]

    def end(self, name: str, reason: str) -> None:
        del self.tasks[name]
        self.send("end", id=name, reason=reason)
        self.state()

    def state(self) -> None:
        counts = {"tick": self.tokens, "running": len(self.tasks), "waiting": 2, "pages": 3, "known": 1, "loads": 1}
        used = {"pool": 10**6, "taken": 250_000, "prompt_tokens": self.prompt_tokens, "tokens": self.tokens}
        self.send("state", **described(State(**counts, **used, resident=("a",), finished={}, evictions=0, rss=10**7)))


async def turn(pulse: Pulse) -> None:
    while True:
        pulse.turn()
        await asyncio.sleep(0.1)


async def serve(options: argparse.Namespace) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine = Engine(options, writer)
        engine.send("ready", **described(engine.ready()))
        engine.log(do="connected")
        try:
            while text := await reader.readline():
                await engine.hear(json.loads(text))
        except ConnectionError:
            pass
        finally:
            for task in engine.tasks.values():
                task.cancel()

    server = await asyncio.start_unix_server(client, options.socket, limit=LONGEST)
    pulse = Pulse(beat_of(Path(options.socket)), options.longest)
    turns = asyncio.create_task(turn(pulse))
    asyncio.get_running_loop().add_reader(0, lambda: os.read(0, 1) or os.kill(os.getpid(), 9))  # the parent is gone
    async with server:
        await server.serve_forever()
    turns.cancel()


def main() -> None:
    if sys.argv[1] == "serve":
        from trimtab.server.parent import serve as watch
        from trimtab.server.settings import Settings

        given = json.loads(sys.argv[2])
        engine = [sys.executable, __file__, "engine", *given.get("engine", ())]
        try:
            watch(Settings(socket="", **given.get("settings", {})), engine, host="127.0.0.1", port=0, json=True)
        except UserError as error:
            sys.exit(print(f"trimtab: {error}", file=sys.stderr) or error.exit_code)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--folder", default=str(POCKET["pocket"]))
    parser.add_argument("--adapters")
    parser.add_argument("--log")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--hold", type=Path, help="begin once this file is gone")
    parser.add_argument("--fail", type=int, default=0)
    parser.add_argument("--longest", type=float, default=2.0)
    options = parser.parse_args(sys.argv[2:])
    if options.fail:
        print("trimtab: this engine cannot serve that", file=sys.stderr)
        sys.exit(options.fail)
    while options.hold and options.hold.exists():
        time.sleep(0.05)
    asyncio.run(serve(options))


if __name__ == "__main__":
    main()
