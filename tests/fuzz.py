"""Hostile input for everything that reads what others wrote: it loads, or it is refused in a sentence; nothing else.

Inputs grow from sound ones. With atheris installed (the extra `fuzz`) its coverage of our Python guides them; without
it, and under the sanitizers, they are changed at random. What breaks is kept, and running that file again repeats it.

    python tests/fuzz.py                          # every target, a minute in all
    python tests/fuzz.py gguf weights --seconds 600 --seed 7
    python tests/fuzz.py gguf --input broken.bin
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

GUIDED = "--corpus"
if GUIDED in sys.argv:  # what atheris is to guide by must be imported under its eyes
    import atheris

    watched = atheris.instrument_imports(include=["trimtab.core", "trimtab.formats", "trimtab.models"])
else:
    watched = contextlib.nullcontext()
with watched:
    import conftest  # noqa: F401  kernels of another build take the installed ones' place

    import trimtab.models.artifact
    import trimtab.models.quantised  # noqa: F401
    from trimtab.core.errors import UserError
    from trimtab.core.level import Level, Plus, parse_level
    from trimtab.core.plan import Plan
    from trimtab.formats.packed import Packed, layout

SHAPE = (5, 70)
LEVELS = (
    *("1b/g64", "2b/g32", "3b/g64/sym", "4b/g32", "4b/g50", "5b/row", "8b/g128", "50%", "2:4", "2:5", "r4", "r4/bias"),
    *("mxint8", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "vq/d4/k16", "vq/d4/k256/r16", "4b/g32+r2", "50%+r2", "bf16"),
)
Target = Callable[[bytes], object]


class Reader:
    """Numbers and bytes out of a fuzzer's bytes; zeros at their end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count].ljust(count, b"\0")
        self.at += count
        return found

    def below(self, count: int) -> int:
        return int.from_bytes(self.take(2), "little") % count


# ---- targets: each makes its seeds in a folder of its own, and gives what tries one input


def weights(folder: Path) -> tuple[list[bytes], Target]:
    """Stored tensors of any bytes: a flaw is found, or kernels and plain torch read the same numbers."""
    from trimtab.kernels.native import native
    from trimtab.kernels.weight import weight_of

    kernels = native()

    def one(data: bytes) -> None:
        reader = Reader(data)
        level = parse_level(LEVELS[reader.below(len(LEVELS))])
        shape = (1 + reader.below(40), 1 + reader.below(150))
        packed = Packed(level, shape, tensors(level, shape, reader))
        if packed.flaw() is not None:
            return
        dense = packed.dense()
        assert tuple(dense.shape) == shape
        if kernels is None or isinstance(level, Plus):
            return
        weight = weight_of(kernels, [packed])
        rows = torch.from_numpy(np.stack([weight.row(r) for r in range(shape[0])]))
        assert torch.allclose(rows, dense, rtol=2e-3, atol=2e-3 * float(dense.abs().max())), (str(level), shape)
        for m in (1, 3, 17):
            weight.apply(np.ones((m, shape[1]), np.float32))

    seeds = [struct.pack("<3H", i, *SHAPE) + random.Random(i).randbytes(900) for i in range(len(LEVELS))]
    return seeds, one


def tensors(level: Level, shape: tuple[int, int], reader: Reader) -> dict[str, torch.Tensor]:
    """What a weight of this level stores, of the reader's bytes; scales small enough for sums to be compared."""
    found = {}
    for name, (dtype, size) in layout(level, shape).items():
        count = int(np.prod(size))
        raw = torch.frombuffer(bytearray(reader.take(max(1, count * dtype.itemsize))), dtype=torch.uint8)
        value = raw[: count * dtype.itemsize].view(dtype).reshape(size).clone()
        found[name] = value
    return found


def safetensors(folder: Path) -> tuple[list[bytes], Target]:
    """Files of tensors."""
    from trimtab.formats.checkpoint import Checkpoint, write_safetensors

    path = folder / "model.safetensors"
    write_safetensors({"a": torch.ones(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}, path, {"made": "here"})

    def one(data: bytes) -> None:
        path.write_bytes(data)
        checkpoint = Checkpoint(path)
        for name in checkpoint.names():
            checkpoint.read(name)

    return [path.read_bytes()], one


def gguf(folder: Path) -> tuple[list[bytes], Target]:
    """GGUF files."""
    from conftest import artifact_of

    from trimtab.exporting import export
    from trimtab.models.quantised import open_quantised

    path = folder / "m.gguf"
    export(artifact_of("pocket", "rtn @ 4b/g32", folder / "artifact"), "gguf", path)

    def one(data: bytes) -> None:
        path.write_bytes(data)
        opened = open_quantised(path)
        for read in list(opened.contents.packed.values())[:3]:
            read()

    return [path.read_bytes()], one


def artifact(folder: Path) -> tuple[list[bytes], Target]:
    """An artifact's description."""
    from conftest import artifact_of

    from trimtab.models.artifact import build, open_artifact

    home = artifact_of("pocket", "rtn @ 4b/g32", folder / "artifact")
    path = home / "trimtab.json"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        build(open_artifact(home), packed=True)

    return [path.read_bytes()], one


def adapter(folder: Path) -> tuple[list[bytes], Target]:
    """Configurations of adapters."""
    from trimtab.formats.checkpoint import write_safetensors
    from trimtab.formats.peft import CONFIG, PREFIX, WEIGHTS, read_adapter

    pair = {
        f"{PREFIX}layer.q_proj.lora_{half}.weight": torch.ones(size) for half, size in (("A", (4, 8)), ("B", (6, 4)))
    }
    write_safetensors(pair, folder / WEIGHTS)

    def one(data: bytes) -> None:
        (folder / CONFIG).write_bytes(data)
        read_adapter(folder)

    config = {"peft_type": "LORA", "lora_alpha": 8, "alpha_pattern": {"q_proj": 4}, "use_rslora": True, "bias": "none"}
    return [json.dumps(config).encode()], one


def texts(folder: Path) -> tuple[list[bytes], Target]:
    """Levels, plans and budgets: what is read is written as it was."""
    from trimtab.core.budget import Budget

    def one(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        for read in (parse_level, Plan.parse):
            try:
                found = read(text)
            except UserError:
                continue
            assert read(str(found)) == found, text
        for place in range(4):
            try:
                Budget.of(*(text if i == place else None for i in range(4)))
            except UserError:
                continue

    return [
        text.encode()
        for text in (*LEVELS, "awq @ 4b/g64 | gptq(damp=0.05) @ 3b/g64, lm_head=8b/g64", "60MB", "15ms", "98%")
    ], one


TARGETS = {made.__name__: made for made in (weights, safetensors, gguf, artifact, adapter, texts)}


# ---- engines


def tried(one: Target, data: bytes) -> None:
    """One input, which may be refused."""
    try:
        one(data)
    except UserError as refusal:
        assert str(refusal) and "\n" not in str(refusal).strip()[:400]


def changed(data: bytes, rng: random.Random) -> bytes:
    """A few random changes of an input."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 512) + 1)
        match rng.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(found):
                found[at] = rng.choice((0, 1, 127, 128, 255, 34, 123, 125, 48, 57))
            case 2:
                del found[at : at + rng.choice((1, 2, 8, 64))]
            case 3:
                found[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
            case 4:
                found[at : at + 8] = struct.pack("<q", rng.choice((-1, 0, 1, 1 << 31, (1 << 63) - 1, -(1 << 63))))
            case 5:
                found[at:at] = found[at : at + rng.choice((1, 8, 32))]
    return bytes(found)


def at_random(name: str, seeds: list[bytes], one: Target, seconds: float, seed: int, kept: Path) -> int:
    """Change seeds at random until the time is over; how many were tried."""
    rng, end, count = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = changed(rng.choice(seeds), rng) if count >= len(seeds) else seeds[count]
        count += 1
        try:
            tried(one, data)
        except Exception:
            file = kept / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
            file.write_bytes(data)
            traceback.print_exc()
            sys.exit(f"{name} broke on input {count}; repeat it with: python tests/fuzz.py {name} --input {file}")
    return count


def guided(name: str, seconds: float, seed: int, kept: Path) -> None:
    """Have atheris guide the changes, in a process of its own, which it ends itself."""
    limits = ["-rss_limit_mb=6000", "-timeout=60", "-max_len=300000", f"-seed={seed}"]
    limits.append(f"-max_total_time={max(1, int(seconds))}")
    with tempfile.TemporaryDirectory() as corpus:
        line = [sys.executable, __file__, name, GUIDED, corpus, *limits, f"-artifact_prefix={kept}/{name}-"]
        done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
        sys.exit(f"{name} broke; repeat it with: python tests/fuzz.py {name} --input {kept}/{name}-crash-...")
    tried = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
    print(f"{name}: {tried[-1] if tried else 'done'}, guided by coverage, nothing broke it", flush=True)


def run_atheris(name: str, corpus: Path, options: list[str]) -> None:
    """The process that atheris takes over."""
    with tempfile.TemporaryDirectory() as folder:
        seeds, one = TARGETS[name](Path(folder))
        for i, seed in enumerate(seeds):
            (corpus / str(i)).write_bytes(seed)
        atheris.Setup([sys.argv[0], str(corpus), *options], lambda data: tried(one, data))
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all where none is named")
    parser.add_argument("--seconds", type=float, default=60, help="in all")
    parser.add_argument("--seed", type=int, default=1, help="of the changes")
    parser.add_argument("--random", action="store_true", help="change at random even where atheris is installed")
    parser.add_argument("--input", type=Path, help="try this one input of the one target")
    parser.add_argument(GUIDED, type=Path, help=argparse.SUPPRESS)
    asked, options = parser.parse_known_args()
    torch.set_num_threads(1)
    if asked.corpus is not None:
        return run_atheris(asked.targets[0], asked.corpus, options)
    if options:
        parser.error(f"unknown options {' '.join(options)}")
    names, kept = asked.targets or list(TARGETS), Path(tempfile.mkdtemp(prefix="fuzz-"))
    by_chance = asked.random or importlib.util.find_spec("atheris") is None
    for name in names:
        if by_chance or asked.input:
            with tempfile.TemporaryDirectory() as folder:
                seeds, one = TARGETS[name](Path(folder))
                if asked.input:
                    tried(one, asked.input.read_bytes())
                    continue
                count = at_random(name, seeds, one, asked.seconds / len(names), asked.seed, kept)
            print(f"{name}: {count} inputs changed at random, none broke it", flush=True)
        else:
            guided(name, asked.seconds / len(names), asked.seed, kept)
    shutil.rmtree(kept)  # nothing broke: inputs that a busy machine took long over may lie there


if __name__ == "__main__":
    main()
