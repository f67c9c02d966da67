"""How fast text is written: our program beside what else runs the same model on this machine, and beside its memory.

A Llama of 1.1 billion random weights is written to a temporary folder, block by block, and packed by rounding to
nearest at several levels. Then, all in one process and in turns, each engine reads prompts of 128 and 512 tokens and
writes text for 1, 4, 8 and 16 sequences at once, after prompts of 128 tokens: our program at each level, `generate` of
transformers in bf16, the same with linears that torch quantises dynamically to 8 bits, and, where llama-cpp-python is
installed, llama.cpp on the GGUF export of our 4b/g32; where onnxruntime-genai is, ONNX Runtime on what its builder
makes of the model at 4 bits in groups of 32. Figures are medians. `share_of_bandwidth` is the bytes that a
token reads, weights and cache, times tokens a second, over the best rate at which the same threads read 1 GiB right
before and after. Last, a process of its own for each engine loads the model from the folder and gives its
first token: with nothing in the cache, when our program proves itself, and then three times more. A JSON line is
printed and appended to records/benchmarks/decode.jsonl.

    python benchmarks/decode.py                        # half an hour, 14 GB of memory, 5 GB of disk
    python benchmarks/decode.py --levels 4b/g32        # one level
    python benchmarks/decode.py --small                # two blocks, to see that it runs; nothing is recorded
    python benchmarks/decode.py --ours --profile       # where our program spends its time; nothing is recorded
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.level import parse_level
from trimtab.core.method import Solver, method
from trimtab.formats.packed import Packed

LARGE: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 2048},
}
SMALL: dict[str, Any] = LARGE | {"num_hidden_layers": 2}
LEVELS = ("4b/g32", "4b/g128", "8b/g128", "2b/g32", "bf16")
BATCHES, LENGTHS = (1, 4, 8, 16), (128, 512)
PROMPT = 128  # tokens before a text is written
OURS = """
import time, trimtab
loaded = trimtab.load({0!r}, packed=True)
int(loaded.writer(256).extend(0, list(range(16))).numpy().argmax())
print(time.time())
"""
THEIRS = """
import time, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({0!r}, dtype=torch.bfloat16)
with torch.no_grad():
    int(model(input_ids=torch.arange(16)[None], use_cache=True).logits[0, -1].argmax())
print(time.time())
"""


def kernels_on(threads: int) -> Any:
    """The kernels, they and torch on so many threads."""
    from trimtab.kernels.native import native

    kernels = native()
    assert kernels is not None, "no kernels were compiled, so there is nothing to measure"
    kernels.set_threads(threads)
    torch.set_num_threads(threads)
    return kernels


# ---- the model


def write_model(folder: Path, sizes: dict[str, Any]) -> None:
    """Random weights in bf16, one shard at a time in memory."""
    from transformers import LlamaConfig

    from trimtab.formats.checkpoint import write_safetensors
    from trimtab.models.source import skeleton_of

    config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    shapes = {name: tuple(p.shape) for name, p in skeleton_of(config.to_dict(), str(folder)).named_parameters()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        rng = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            random = torch.randn(shape, generator=rng) / shape[-1] ** 0.5
            yield name, (random if len(shape) > 1 else torch.ones(shape)).bfloat16()

    write_safetensors(tensors(), folder / "model.safetensors", shard_bytes=250_000_000)


def write_packed(source: Path, folder: Path, text: str) -> int:
    """The model at one level, without a fit; bytes of its folder."""
    from trimtab.formats.checkpoint import Checkpoint
    from trimtab.models.artifact import write_artifact

    checkpoint, level, solver = Checkpoint(source), parse_level(text), method("rtn")
    assert isinstance(solver, Solver)
    shapes = {n: (list(checkpoint.shape(n)), False) for n in checkpoint.names() if len(checkpoint.shape(n)) > 1}

    def tensors() -> Iterator[tuple[str, Tensor | Packed]]:
        for name in checkpoint.names():
            weight = checkpoint.read(name)
            yield name, solver.solve(weight.float(), level) if name in shapes and text != "bf16" else weight

    manifest = {"task": "causal-lm", "edits": [], "source": {"name": "random"}, "plan": f"rtn @ {text}"}
    return write_artifact(folder, tensors(), shapes, manifest, [source / "config.json"])


# ---- the engines


def step_seconds(writer: Any, batch: int, steps: int) -> list[float]:
    """Seconds of each step of as many sequences, whose prompts were read."""
    spent, tokens = [], dict.fromkeys(range(batch), 1)
    for _ in range(steps):
        start = time.perf_counter()
        tokens = dict(enumerate(writer.step(tokens).numpy().argmax(1).tolist()))
        spent.append(time.perf_counter() - start)
    return spent


class Ours:
    """The compiled program at one level."""

    def __init__(self, folder: Path) -> None:
        from trimtab.engine.session import Runtime, Session
        from trimtab.loading import load

        loaded = load(folder, packed=True)
        runtime = Runtime(loaded.model, loaded.packed, share=True)
        writer = runtime.open(1024, sequences=max(BATCHES))
        assert isinstance(writer, Session) and runtime.form is not None, "there is no program to measure"
        self.writer = writer
        self.read = runtime.weights.read_bytes(runtime.form) + runtime.form.cache_bytes(PROMPT)

    def prefill(self, tokens: Tensor) -> float:
        self.writer.forget(0)
        start = time.perf_counter()
        int(self.writer.extend(0, tokens.tolist()).numpy().argmax())
        return time.perf_counter() - start

    def decode(self, batch: int, prompt: Tensor, steps: int) -> list[float]:
        for sequence in range(batch):
            self.writer.forget(sequence)
            self.writer.extend(sequence, prompt.tolist())
        return step_seconds(self.writer, batch, steps)

    def profile(self, work: Callable[[], Any]) -> dict[str, float]:
        """Share of the time of each kind of operation."""
        program = self.writer.program
        before = dict(program.profile())
        program.timed = True
        work()
        program.timed = False
        spent = {name: seconds - before[name] for name, seconds in program.profile()}
        whole = sum(spent.values())
        return {name: round(s / whole, 3) for name, s in sorted(spent.items(), key=lambda p: -p[1]) if s > whole / 500}


class Clock:
    """What `generate` hands its tokens to: when each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """`generate` of transformers, in bf16 or with linears that torch quantises dynamically."""

    def __init__(self, folder: Path, dynamic: bool) -> None:
        from transformers import AutoModelForCausalLM

        dtype = torch.float32 if dynamic else torch.bfloat16
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        if dynamic:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.ao.quantization.quantize_dynamic(self.model, {nn.Linear}, torch.qint8, inplace=True)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> float:
        start = time.perf_counter()
        int(self.model(input_ids=tokens[None], use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
        return time.perf_counter() - start

    def decode(self, batch: int, prompt: Tensor, steps: int) -> list[float]:
        clock = Clock()
        ids = prompt.expand(batch, -1)
        options = {"min_new_tokens": steps + 1, "max_new_tokens": steps + 1, "do_sample": False, "pad_token_id": 0}
        self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **options)
        return [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]


class LlamaCpp:
    """llama.cpp on the GGUF export of an artifact, called at its own face, without Python's sampling around it."""

    def __init__(self, artifact: Path, threads: int) -> None:
        from trimtab.exporting import export
        from trimtab.models.pocket import POCKET

        llama_cpp: Any = importlib.import_module("llama_cpp")
        file = artifact.with_suffix(".gguf")
        if not file.is_file():
            for name in ("tokenizer.json", "tokenizer_config.json"):  # GGUF wants one; no text is made into tokens
                shutil.copyfile(POCKET["pocket"] / name, artifact / name)
            export(artifact, "gguf", file, type="Q4_0")
        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept, for C calls it
        llama_cpp.llama_log_set(self.quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx = max(BATCHES), 1024 * max(BATCHES)
        settings.n_batch = settings.n_ubatch = max(LENGTHS)
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        assert self.model and self.context, f"llama.cpp does not load {file}"
        self.rows = llama_cpp.llama_batch_init(max(LENGTHS), 0, 1)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _forget(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Tokens, each with its place, its sequence and whether its outputs are wanted; the likeliest next ones."""
        self.rows.n_tokens = len(rows)
        for i, (token, place, sequence, wanted) in enumerate(rows):
            self.rows.token[i], self.rows.pos[i], self.rows.logits[i] = token, place, wanted
            self.rows.n_seq_id[i], self.rows.seq_id[i][0] = 1, sequence
        assert self.api.llama_decode(self.context, self.rows) == 0
        found = [self.api.llama_get_logits_ith(self.context, i) for i, row in enumerate(rows) if row[3]]
        return [int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()) for logits in found]

    def prefill(self, tokens: Tensor) -> float:
        self._forget()
        rows = [(token, i, 0, i == len(tokens) - 1) for i, token in enumerate(tokens.tolist())]
        start = time.perf_counter()
        self._run(rows)
        return time.perf_counter() - start

    def decode(self, batch: int, prompt: Tensor, steps: int) -> list[float]:
        self._forget()
        for sequence in range(batch):
            self._run([(t, i, sequence, i == len(prompt) - 1) for i, t in enumerate(prompt.tolist())])
        spent, tokens = [], [1] * batch
        for step in range(steps):
            rows = [(token, len(prompt) + step, sequence, True) for sequence, token in enumerate(tokens)]
            start = time.perf_counter()
            tokens = self._run(rows)
            spent.append(time.perf_counter() - start)
        return spent


class OnnxRuntime:
    """ONNX Runtime's own loop on the model as its builder makes it: 4 bits in groups of 32, inputs in 8 bits."""

    def __init__(self, plain: Path, threads: int) -> None:
        from trimtab.models.pocket import POCKET

        og: Any = importlib.import_module("onnxruntime_genai")
        target = plain.with_name("onnx")
        if not target.is_dir():
            for name in ("tokenizer.json", "tokenizer_config.json"):  # it wants one; no text is made into tokens
                shutil.copyfile(POCKET["pocket"] / name, plain / name)
            line = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(plain), "-o", str(target)]
            line += ["-p", "int4", "-e", "cpu", "-c", str(plain.with_name("onnx-cache"))]
            options = ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
            subprocess.run([*line, *options], check=True, capture_output=True)
        config = og.Config(str(target))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.api, self.model = og, og.Model(config)

    def _started(self, batch: int, prompt: Tensor, steps: int) -> Any:
        settings, length = self.api.GeneratorParams(self.model), len(prompt) + steps + 2
        settings.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
        generator = self.api.Generator(self.model, settings)
        generator.append_tokens(np.tile(prompt.numpy().astype(np.int32), (batch, 1)))
        generator.generate_next_token()
        return generator

    def prefill(self, tokens: Tensor) -> float:
        start = time.perf_counter()
        self._started(1, tokens, 1)
        return time.perf_counter() - start

    def decode(self, batch: int, prompt: Tensor, steps: int) -> list[float]:
        generator, spent = self._started(batch, prompt, steps), []
        for _ in range(steps):
            start = time.perf_counter()
            generator.generate_next_token()
            spent.append(time.perf_counter() - start)
        return spent


# ---- measuring


def bandwidth(kernels: Any) -> float:
    """Bytes a second at which the kernels' threads read 1 GiB: the best slice of a short time."""
    return max(kernels.read_rates(1 << 30, 0.4))


def cold(code: str, folder: Path, cache: Path) -> float:
    """Seconds from the start of a process, with a cache of its own, to the first token of the model that it loads."""
    line, env = [sys.executable, "-c", code.format(str(folder))], os.environ | {"XDG_CACHE_HOME": str(cache)}
    start = time.time()
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=env)
    return float(done.stdout.split()[-1]) - start


def read_seconds(folder: Path) -> float:
    """Seconds that reading the weights' files takes after the system was asked to forget them."""
    files = [os.open(file, os.O_RDONLY) for file in sorted(folder.glob("*.safetensors"))]
    for file in files:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    for file in files:
        while os.read(file, 1 << 22):
            pass
    spent = time.perf_counter() - start
    for file in files:
        os.close(file)
    return spent


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def measure(
    engines: dict[str, Any], prompt: Tensor, steps: int, turns: int, kernels: Any
) -> dict[str, dict[str, float]]:
    """Tokens a second of every engine, in turns: medians; and the share of the bandwidth that our one sequence takes.

    The rate of the memory can change while this runs, so that it is taken right before and after each such text.
    """
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    shares: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(turns + 1):
        for length in LENGTHS:
            for name, engine in engines.items():
                spent[name].setdefault(f"prefill_{length}", []).append(engine.prefill(prompt[:length]) / length)
        for batch in BATCHES:
            for name, engine in engines.items():
                alone = batch == 1 and isinstance(engine, Ours) and turn > 0
                before = bandwidth(kernels) if alone else 0.0
                each = engine.decode(batch, prompt[:PROMPT], steps if turn else 2)
                spent[name].setdefault(f"decode_{batch}", []).extend(seconds / batch for seconds in each)
                if alone:
                    reads = max(before, bandwidth(kernels))
                    shares[name].append(engine.read / statistics.median(each) / reads)
        if turn == 0:  # it warmed up
            spent = {name: {} for name in engines}
    found = {
        name: {what: rounded(1 / statistics.median(seconds)) for what, seconds in times.items()}
        for name, times in spent.items()
    }
    for name, each in shares.items():
        if each:
            found[name] |= {"bytes_a_token": engines[name].read, "share_of_bandwidth": rounded(statistics.median(each))}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two blocks; nothing is recorded")
    parser.add_argument("--levels", nargs="+", default=LEVELS, help="what our program is measured at")
    parser.add_argument("--ours", action="store_true", help="our program alone; nothing is recorded")
    parser.add_argument("--profile", action="store_true", help="shares of time by operation, on standard error")
    parser.add_argument("--folder", type=Path, help="where the models lie and stay; a temporary folder otherwise")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark

    kernels = kernels_on(asked.threads)
    load = os.getloadavg()[0]
    sizes = SMALL if asked.small else LARGE
    prompt = torch.randint(1000, (max(PROMPT, *LENGTHS),), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as temporary:
        root = (asked.folder or Path(temporary)) / ("small" if asked.small else "large")
        plain = root / "plain"
        if not (plain / "config.json").is_file():
            plain.mkdir(parents=True)
            write_model(plain, sizes)
        engines: dict[str, Any] = {}
        starts: list[tuple[str, str, Path]] = []
        for level in asked.levels:
            folder = root / level.replace("/", "-")
            if not folder.is_dir():
                write_packed(plain, folder, level)
            engines[f"ours {level}"] = Ours(folder)
            starts.append((f"ours {level}", OURS, folder))
        if not asked.ours:
            engines["transformers bf16"] = Transformers(plain, False)
            engines["transformers dynamic int8"] = Transformers(plain, True)
            starts.append(("transformers bf16", THEIRS, plain))
        four = root / "4b-g32"
        if not asked.ours and importlib.util.find_spec("llama_cpp") is not None and four.is_dir():
            engines["llama.cpp Q4_0"] = LlamaCpp(four, asked.threads)
        if not asked.ours and importlib.util.find_spec("onnxruntime_genai") is not None:
            engines["onnxruntime int4"] = OnnxRuntime(plain, asked.threads)
        reads = bandwidth(kernels)
        found = measure(engines, prompt, 8 if asked.small else 16, asked.turns, kernels)
        reads = max(reads, bandwidth(kernels))
        for name, engine in engines.items():
            if isinstance(engine, Ours) and asked.profile:
                for batch in BATCHES:
                    shares = engine.profile(lambda e=engine, b=batch: e.decode(b, prompt[:2], 8))
                    print(name, "decode", batch, shares, file=sys.stderr)
                print(name, "prefill", engine.profile(lambda e=engine: e.prefill(prompt)), file=sys.stderr)
        engines.clear()
        for name, code, folder in starts:
            first, *others = (cold(code, folder, Path(temporary) / "cache") for _ in range(4))
            found[name]["first_run_seconds"] = rounded(first)
            found[name]["first_token_seconds"] = rounded(statistics.median(others))
            found[name]["read_seconds"] = rounded(min(read_seconds(folder) for _ in range(3)))
    row = {
        **{"benchmark": "decode", "sizes": sizes, "threads": asked.threads},
        **{"variant": kernels.__name__.rpartition("._")[2], "prompt": PROMPT, "turns": asked.turns},
        **{"read_bytes_a_second": rounded(reads), "tokens_a_second": found},
        "load_at_start": round(load, 1),
    }
    keep_benchmark(row, kept=not (asked.small or asked.ours))


if __name__ == "__main__":
    main()
