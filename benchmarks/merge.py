"""Merging against mergekit and against the disk: seconds and peak memory, as ratios of one run.

Three Llamas of 1.2 billion random weights in bf16 are written to a temporary folder, two of them the first with small
changes. Each method merges them in a process of its own, ours and, where it is installed, mergekit's with the same
YAML; in turn with them the floor is measured: the same inputs read, and a file of the output's size written and
synchronised, both at once, with nothing computed. Before each of these the inputs are driven out of the page cache with
`posix_fadvise(DONTNEED)`, which needs no root and which a read then confirms; what a virtual disk keeps below stays.
Seconds include the start of Python, and an `fsync` for the floor and for ours.

    python benchmarks/merge.py [--mergekit PATH]     # some minutes; appends to records/benchmarks/merge.jsonl
    python benchmarks/merge.py --small               # a few million weights, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

LARGE: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 18, "vocab_size": 32000}
SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 1000}
TUNED = "\n".join(f"  - model: {{{n}}}\n    parameters: {{{{weight: 0.5, density: DENSITY}}}}" for n in ("b", "c"))
RECIPES = {
    "linear": "merge_method: linear\nmodels:\n"
    + "\n".join(f"  - model: {{{n}}}\n    parameters: {{{{weight: 1}}}}" for n in "abc"),
    "task_arithmetic": f"merge_method: task_arithmetic\nbase_model: {{a}}\nmodels:\n{TUNED.replace('DENSITY', '1')}",
    "dare_linear": f"merge_method: dare_linear\nbase_model: {{a}}\nmodels:\n{TUNED.replace('DENSITY', '0.2')}",
    "ties": f"merge_method: ties\nbase_model: {{a}}\nmodels:\n{TUNED.replace('DENSITY', '0.2')}",
    "slerp": "merge_method: slerp\nbase_model: {a}\nmodels:\n  - model: {a}\n  - model: {b}\nparameters: {{t: 0.5}}",
}
ROOM = 700_000_000
ELEMENTWISE, THRESHOLD, AGAINST = 1.15, 2.0, 5.0


def write_models(folder: Path, sizes: dict[str, Any]) -> list[Path]:
    """Three Llamas in bf16, in two shards each; the second and third differ a little from the first."""
    import torch
    from transformers import LlamaConfig

    from trimtab.formats.checkpoint import write_safetensors

    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    wide, inner, keys = sizes["hidden_size"], sizes["intermediate_size"], sizes["hidden_size"] // 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocab_size"], wide)}
    for i in range(sizes["num_hidden_layers"]):
        block = f"model.layers.{i}."
        shapes |= {f"{block}{n}.weight": (wide,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}self_attn.{n}_proj.weight": (wide, wide) for n in "qo"}
        shapes |= {f"{block}self_attn.{n}_proj.weight": (keys, wide) for n in "kv"}
        shapes |= {f"{block}mlp.{n}_proj.weight": (inner, wide) for n in ("gate", "up")}
        shapes[f"{block}mlp.down_proj.weight"] = (wide, inner)
    shapes |= {"model.norm.weight": (wide,), "lm_head.weight": (sizes["vocab_size"], wide)}

    def tensors(seed: int) -> Any:
        first, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=first).mul_(0.02)
            if seed:
                value += torch.randn(shape, generator=own).mul_(0.002)
            yield name, value.bfloat16()

    found = []
    for seed, name in enumerate("abc"):
        config.save_pretrained(folder / name)
        write_safetensors(tensors(seed), folder / name / "model.safetensors", shard_bytes=1_500_000_000)
        found.append(folder / name)
    return found


def forget(folders: list[Path]) -> float:
    """Drive the inputs out of the page cache; the speed at which 32 MB of them are then read, MB/s."""
    files = [f for folder in folders for f in sorted(folder.glob("*.safetensors"))]
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    with open(files[0], "rb", buffering=0) as first:
        start = time.perf_counter()
        count = len(first.read(1 << 25))
        speed = count / 1e6 / (time.perf_counter() - start)
        os.posix_fadvise(first.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return speed


def floor(folders: list[Path], out: Path) -> float:
    """Seconds to read the inputs and to write and synchronise a file of the size of one of them, both at once."""
    size = sum(f.stat().st_size for f in folders[0].glob("*.safetensors"))

    def write() -> None:
        piece = memoryview(bytearray(os.urandom(1 << 20)) * 8)
        with open(out, "wb", buffering=0) as file:
            for start in range(0, size, len(piece)):
                file.write(piece[: min(len(piece), size - start)])
            os.fdatasync(file.fileno())

    start = time.perf_counter()
    writer = threading.Thread(target=write)
    writer.start()
    buffer = memoryview(bytearray(1 << 23))
    for file in (f for folder in folders for f in sorted(folder.glob("*.safetensors"))):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    writer.join()
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def timed(command: list[str], out: Path) -> dict[str, float]:
    """Seconds and peak resident bytes of a process that fills a folder, which is removed."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    with open(log, "wb") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not list(out.glob("*.safetensors")):
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text('utf-8', 'replace')[-2000:]}")
    shutil.rmtree(out)
    return {"seconds": round(seconds, 2), "peak_bytes": usage.ru_maxrss * 1024, "cpu": round(usage.ru_utime, 2)}


def compare(name: str, folder: Path, folders: list[Path], mergekit: str | None, rounds: int) -> dict[str, Any]:
    """One method: the floor, ours, and mergekit's, in turn."""
    places = dict(zip("abc", map(str, folders), strict=True))
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPES[name].format(**places) + "\ndtype: bfloat16\n", "utf-8")
    used = folders[:2] if name == "slerp" else folders
    ours, floors, theirs, speeds = [], [], [], []
    command = [
        sys.executable,
        "-c",
        "from trimtab.cli import main; main()",
        "merge",
        str(recipe),
        "--out",
        str(folder / "out"),
        "--quiet",
    ]
    for turn in range(rounds):
        speeds.append(forget(used))
        floors.append(round(floor(used, folder / "floor"), 2))
        speeds.append(forget(used))
        ours.append(timed(command, folder / "out"))
        if mergekit and not turn:
            speeds.append(forget(used))
            theirs.append(timed([mergekit, str(recipe), str(folder / "theirs")], folder / "theirs"))
    ratios = [o["seconds"] / f for o, f in zip(ours, floors, strict=True)]
    row: dict[str, Any] = {"method": name, "floor": floors, "ours": ours, "mergekit": theirs}
    row |= {"cold_read_mb_s": round(statistics.median(speeds)), "ratio_to_floor": round(statistics.median(ratios), 3)}
    limit = THRESHOLD if name == "ties" else ELEMENTWISE
    peak = max(o["peak_bytes"] for o in ours)
    checks = {f"at most {limit} of the floor": row["ratio_to_floor"] <= limit, "under 700 MB": peak < ROOM}
    if theirs:
        row["times_as_fast"] = round(theirs[0]["seconds"] / statistics.median(o["seconds"] for o in ours), 2)
        if name == "ties":
            checks["five times as fast as mergekit"] = row["times_as_fast"] >= AGAINST
    return row | {"checks": checks, "verdict": "held" if all(checks.values()) else "missed"}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="mergekit's command mergekit-yaml; by default the one on the path, if any")
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keeps the models there, and uses those that it finds")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    from trimtab.catalogue import keep_benchmark

    mergekit = given.mergekit or shutil.which("mergekit-yaml")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folders = [folder / n for n in "abc"]
        if not all((f / "config.json").is_file() for f in folders):
            with ProcessPoolExecutor(1, get_context("spawn")) as writer:  # a child's peak counts what its parent held
                folders = writer.submit(write_models, folder, SMALL if given.small else LARGE).result()
        size = sum(f.stat().st_size for f in folders[0].glob("*.safetensors"))
        for name in given.methods.split(","):
            row = compare(name, folder, folders, mergekit, given.rounds)
            row |= {"model_bytes": size, "cores": os.cpu_count()}
            keep_benchmark({"benchmark": "merge", **row}, kept=not given.small)


if __name__ == "__main__":
    main()
