"""How fast text is written when every sequence has an adapter of its own: our batch beside PEFT's.

A Llama of 1.1 billion random weights is packed at 4b/g32, and random LoRA adapters for all its linears are taken in.
Then, in turns, eight sequences write text after prompts of 128 tokens: through no adapter, all through one, each
through its own of rank 16, and each through its own of ranks 8 to 64; and, where peft is installed, the same model in
bf16 with PEFT's mixed batch of the same eight adapters of rank 16, and without them. Figures are medians of tokens a
second. `ratio` is the time of a step over the time of the same engine's step without adapters. A JSON line is printed
and appended to records/benchmarks/adapters.jsonl.

    python benchmarks/adapters.py              # ten minutes, 10 GB of memory, 4 GB of disk
    python benchmarks/adapters.py --small      # two blocks, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode import LARGE, PROMPT, SMALL, Clock, rounded, step_seconds, write_model, write_packed

USERS, RANK = 8, 16
MIXED = (8, 16, 32, 64, 8, 16, 32, 64)


class Ours:
    """The compiled program with a bank of adapters."""

    def __init__(self, folder: Path) -> None:
        from trimtab.engine.session import Runtime
        from trimtab.formats.peft import Adapter
        from trimtab.loading import load

        loaded = load(folder, packed=True)
        runtime = Runtime(loaded.model, loaded.packed, share=True)
        self.bank = runtime.bank()
        for user in range(USERS):
            for name, rank in ((f"equal {user}", RANK), (f"mixed {user}", MIXED[user])):
                rng = torch.Generator().manual_seed(user)
                sizes = {p: (m.rows, m.cols) for p, m in self.bank.matrices.items()}
                factors = {
                    path: (torch.randn(rank, c, generator=rng) / c**0.5, torch.randn(r, rank, generator=rng) / 50)
                    for path, (r, c) in sizes.items()
                }
                self.bank.add(name, Adapter(factors, name, {}))
        self.writer = runtime.open(1024, sequences=USERS, bank=self.bank)

    def decode(self, users: list[str | None], prompt: list[int], steps: int) -> list[float]:
        for sequence, user in enumerate(users):
            self.writer.use(sequence, user)
            self.writer.forget(sequence)
            self.writer.extend(sequence, prompt)
        return step_seconds(self.writer, len(users), steps)


class Peft:
    """The model in bf16 with PEFT's adapters, mixed in one batch by `adapter_names`."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        config = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
        self.model = get_peft_model(model, config, adapter_name="equal 0")
        for user in range(1, USERS):
            self.model.add_adapter(f"equal {user}", config)
        self.model.eval().to(torch.bfloat16)

    def decode(self, users: list[str | None], prompt: list[int], steps: int) -> list[float]:
        clock, ids = Clock(), torch.tensor([prompt] * len(users))
        options: dict[str, Any] = {"min_new_tokens": steps + 1, "max_new_tokens": steps + 1, "do_sample": False}
        options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(ids), "streamer": clock}
        if any(users):
            self.model.generate(ids, adapter_names=users, **options)
        else:
            with self.model.disable_adapter():
                self.model.generate(ids, **options)
        return [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two blocks; nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where the models lie and stay; a temporary folder otherwise")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()

    from trimtab.catalogue import keep_benchmark
    from trimtab.kernels.native import native

    kernels = native()
    assert kernels is not None, "no kernels were compiled, so there is nothing to measure"
    kernels.set_threads(asked.threads)
    torch.set_num_threads(asked.threads)
    load, sizes = os.getloadavg()[0], SMALL if asked.small else LARGE
    prompt = torch.randint(1000, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        root = (asked.folder or Path(temporary)) / ("small" if asked.small else "large")
        plain, packed = root / "plain", root / "4b-g32"
        if not (plain / "config.json").is_file():
            plain.mkdir(parents=True)
            write_model(plain, sizes)
        if not packed.is_dir():
            write_packed(plain, packed, "4b/g32")
        ours = Ours(packed)
        equal: list[str | None] = [f"equal {user}" for user in range(USERS)]
        mixed: list[str | None] = [f"mixed {user}" for user in range(USERS)]
        cases: dict[str, Callable[[int], list[float]]] = {
            "ours, none": lambda n: ours.decode([None] * USERS, prompt, n),
            "ours, one": lambda n: ours.decode(["equal 0"] * USERS, prompt, n),
            "ours, rank 16 each": lambda n: ours.decode(equal, prompt, n),
            "ours, ranks 8 to 64": lambda n: ours.decode(mixed, prompt, n),
        }
        if importlib.util.find_spec("peft") is not None:
            theirs = Peft(plain)
            cases["peft, none"] = lambda n: theirs.decode([None] * USERS, prompt, n)
            cases["peft, rank 16 each"] = lambda n: theirs.decode(equal, prompt, n)
        spent: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(asked.turns + 1):
            for name, decode in cases.items():
                each = decode(16 if turn and not asked.small else 3)
                spent[name] += each if turn else []
    step = {name: statistics.median(each) for name, each in spent.items()}
    found = {
        name: {
            "tokens_a_second": rounded(USERS / seconds),
            "ratio": rounded(seconds / step[f"{name.partition(',')[0]}, none"]),
        }
        for name, seconds in step.items()
    }
    row = {
        **{"benchmark": "adapters", "sizes": sizes, "threads": asked.threads, "users": USERS, "turns": asked.turns},
        **{"variant": kernels.__name__.rpartition("._")[2], "adapter_bytes": ours.bank.pool.nbytes, "found": found},
        "load_at_start": round(load, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
