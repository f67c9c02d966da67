"""How fast text is written when every sequence has an adapter of its own: our batch beside peers, measured in turns.

A Llama of 1.1 billion random weights, packed at 4b/g32, and random LoRA adapters for all linears of its blocks, eight
of rank 16 and eight of ranks 8 to 64. Eight sequences write text behind prompts of 128 tokens on the same threads:

- ours: through no adapter, all through one, each through its own of rank 16, and each through its own of ranks 8 to 64;
- PEFT in bf16: without, its mixed batch, and sequence by sequence with `set_adapter` between;
- llama.cpp on the GGUF export (Q4_0) of the same weights: without, and sequence by sequence, for an adapter is there
  the whole batch's;
- vLLM in bf16 on processors: an engine without room for adapters, and one with an adapter for each request.

Every engine is a process of its own, in the Python that it is told; all stay loaded, and take turns. `tokens_a_second`
are medians over turns, of the median step of each; `ratio` is the time of a step over that of the same engine's without
adapters. The checks are of the turns' rates, with 95 % intervals over turns. A peer that is absent is named as absent.
A JSON line is printed and appended to records/benchmarks/adapters.jsonl.

    python benchmarks/adapters.py --llama PYTHON --vllm PYTHON    # ten minutes, 14 GB of memory, 5 GB of disk
    python benchmarks/adapters.py --small --only ours peft        # two blocks, to see that it runs; nothing is recorded
    python benchmarks/adapters.py --page                          # docs/adapters.md anew from the newest row
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.adapter_engines import EACH, ENGINES, MIXED, NONE, RANK, RANKS, SWITCHED, USERS, adapter
from trimtab.core.claim import Check, judge, verdict

STEPS, SLOW_STEPS, REST = 16, 4, 0.5  # of a turn; of one whose sequences go one by one; seconds between turns
GGUF_NAMES = {
    **{"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"},
    **{"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"},
    "mlp.down_proj": "ffn_down",
}
TARGETS = (  # (ours, theirs, comparator, how many times theirs), in tokens a second
    (f"ours, {EACH}", f"peft, {EACH}", ">=", 6.0),
    (f"ours, {EACH}", f"vllm adapters, {EACH}", ">=", 5.0),
    (f"ours, {EACH}", f"llama.cpp, {NONE}", ">=", 2.0),
    (f"ours, {NONE}", f"ours, {EACH}", "<=", 1.15),
    (f"ours, {NONE}", f"ours, {RANKS}", "<=", 1.3),
)


# ---- what the engines read


def shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linears of a block."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    narrow = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    outputs = (width, narrow, narrow, width, inner, inner, width)
    return {n: (out, inner if n == "mlp.down_proj" else width) for n, out in zip(GGUF_NAMES, outputs, strict=True)}


def write_adapter(folder: Path, rank: int, seed: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A random adapter in PEFT's format; its factors, path -> (down, up)."""
    import torch

    from trimtab.formats.checkpoint import write_safetensors
    from trimtab.formats.peft import CONFIG, PREFIX, WEIGHTS

    rng, factors, tensors = torch.Generator().manual_seed(seed), {}, {}
    for block in range(sizes["num_hidden_layers"]):
        for name, (rows, cols) in shapes(sizes).items():
            down = (torch.randn(rank, cols, generator=rng) / cols**0.5).half()
            up = (torch.randn(rows, rank, generator=rng) / 50).half()
            path = f"model.layers.{block}.{name}"
            factors[path] = (down, up)
            tensors |= {f"{PREFIX}{path}.lora_A.weight": down, f"{PREFIX}{path}.lora_B.weight": up}
    folder.mkdir(parents=True)
    names = sorted({path.rpartition(".")[2] for path in GGUF_NAMES})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": names}
    (folder / CONFIG).write_text(json.dumps(told | {"bias": "none", "base_model_name_or_path": None}))
    write_safetensors(tensors, folder / WEIGHTS)
    return factors


def write_gguf_adapter(file: Path, factors: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """The same adapter as llama.cpp reads it; rows of queries and keys in its order."""
    from trimtab.formats.gguf import package, rotary_order

    heads = {"attn_q": sizes["num_attention_heads"], "attn_k": sizes["num_key_value_heads"]}
    writer = package().GGUFWriter(file, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for path, (down, up) in factors.items():
        block, name = path.split(".", 3)[2:]
        rows, target = up.numpy(), GGUF_NAMES[name]
        if target in heads:
            rows = rows[rotary_order(len(rows), heads[target])]
        writer.add_tensor(f"blk.{block}.{target}.weight.lora_a", down.numpy())
        writer.add_tensor(f"blk.{block}.{target}.weight.lora_b", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_all(root: Path, sizes: dict[str, Any], engines: Sequence[str]) -> None:
    """Models and adapters, as far as they do not lie there."""
    from benchmarks.decode import write_model, write_packed
    from trimtab.exporting import export
    from trimtab.models.pocket import POCKET

    plain, packed, gguf = root / "plain", root / "4b-g32", root / "4b-g32.gguf"
    if not (plain / "config.json").is_file():
        plain.mkdir(parents=True)
        write_model(plain, sizes)
    if not packed.is_dir():
        write_packed(plain, packed, "4b/g32")
    if "llama.cpp" in engines and not gguf.is_file():
        for name in ("tokenizer.json", "tokenizer_config.json"):  # GGUF wants one; no text is made into tokens
            shutil.copyfile(POCKET["pocket"] / name, packed / name)
        export(packed, "gguf", gguf, type="Q4_0")
    if not (root / "lora").is_dir():
        for user in range(USERS):
            factors = write_adapter(adapter(root, user), RANK, user, sizes)
            write_gguf_adapter(adapter(root, user).with_suffix(".gguf"), factors, sizes)
            write_adapter(adapter(root, user, "mixed"), MIXED[user], user, sizes)


# ---- measuring


class Engine:
    """A process of `adapter_engines.py`."""

    def __init__(self, name: str, python: str, folder: Path, threads: int) -> None:
        file = Path(__file__).with_name("adapter_engines.py")
        self.name = name
        self.heard = tempfile.TemporaryFile("w+")  # noqa: SIM115 - held while it lives
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.heard}
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if python == sys.executable:
            paths = [str(Path(__file__).resolve().parent.parent), env.get("PYTHONPATH", "")]
            env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.process = subprocess.Popen([python, file, name, folder, str(threads)], **pipes, env=env, text=True)
        said = self._answer()
        self.cases, self.versions, self.told = said["cases"], said["versions"], said["told"]

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.heard.seek(0)
            raise SystemExit(f"the engine {self.name} ended without an answer: {self.heard.read().strip()[-1500:]}")
        return json.loads(line)

    def seconds(self, case: str, steps: int) -> list[float]:
        """Of each step."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": case, "steps": steps}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def in_turns(engines: Sequence[Engine], turns: int, steps: int) -> list[dict[str, float]]:
    """Tokens a second of every case, turn by turn, behind one that warms up."""
    rates: list[dict[str, float]] = []
    for turn in range(turns + 1):
        found = {}
        for engine in engines:
            for case in engine.cases:
                time.sleep(REST)  # threads of the one before stop waiting for work
                each = engine.seconds(case, min(steps, SLOW_STEPS) if case == SWITCHED else steps)
                found[f"{engine.name}, {case}"] = USERS / statistics.median(each)
        rates += [found] if turn else []
        print(f"turn {turn}: " + "; ".join(f"{n} {r:.1f}" for n, r in found.items()), file=sys.stderr, flush=True)
    return rates


def checked(rates: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The targets whose cases were measured, and the verdict over them."""
    judged = []
    for ours, theirs, comparator, times in TARGETS:
        if ours in rates[0] and theirs in rates[0]:
            say = f"{ours} {comparator} {times:g} x {theirs}"
            check = Check(say, "ratio", comparator, times)  # type: ignore[arg-type]
            judged.append(judge(check, [{"ratio": turn[ours] / turn[theirs]} for turn in rates]))
    return {"checks": [asdict(j) for j in judged], "verdict": verdict(judged)} if judged else {}


def write_page() -> None:
    """docs/adapters.md from the newest row."""
    from trimtab.catalogue import ROOT

    lines = (ROOT / "records" / "benchmarks" / "adapters.jsonl").read_text("utf-8").splitlines()
    row = json.loads(lines[-1])
    names = {f"{name}, {case}" for pair in TARGETS for name, _, case in (n.partition(", ") for n in pair[:2])}
    missing = sorted(names - set(row["found"]))
    rates = [f"| {n} | {r['tokens_a_second']:.1f} | {r.get('ratio', '')} |" for n, r in row["found"].items()]
    said = [
        f"- {c['say']}: {c['left']:.2f} ± {c['half_width']:.2f}, {'held' if c['held'] else 'not held'}"
        for c in row.get("checks", ())
    ]
    versions = [" ".join(pair) for each in row.get("engines", {}).values() for pair in each.items()]
    table = "\n".join(["| | tokens a second | time of a step to that without adapters |", "|---|---|---|", *rates])
    text = f"""# Adapters in a batch, beside peers

How fast do eight sequences write text, each with an adapter of its own? `benchmarks/adapters.py` says how it is
measured, and writes this page from the newest row of `records/benchmarks/adapters.jsonl`: a Llama of 1.1 billion random
weights, ours at 4b/g32, {row["threads"]} threads of {row["machine"]["cpu"]}, every engine in turns.

{table}

{f"Verdict: {row['verdict']}, over {row['turns']} turns." if said else "No target was judged."}
"""
    text += "".join(f"\n{part}\n" for part in ("\n".join(said), ", ".join(dict.fromkeys(versions))) if part)
    text += f"\nNot measured: {'; '.join(missing)}.\n" if missing else ""
    (ROOT / "docs" / "adapters.md").write_text(text, "utf-8")


def main() -> None:
    """Measure and record, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="two blocks; nothing is recorded")
    parser.add_argument("--folder", type=Path, help="where the models lie and stay; a temporary folder otherwise")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--llama", metavar="PYTHON", help="the Python that llama-cpp-python is installed for")
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python that vLLM's build for processors is installed for")
    parser.add_argument("--only", nargs="+", choices=tuple(ENGINES), default=tuple(ENGINES))
    parser.add_argument("--page", action="store_true", help="write the page, and measure nothing")
    asked = parser.parse_args()
    if asked.page:
        return write_page()

    import torch

    from benchmarks.decode import LARGE, SMALL, rounded
    from trimtab.catalogue import keep_benchmark

    torch.set_num_threads(asked.threads)
    load, sizes = os.getloadavg()[0], SMALL if asked.small else LARGE
    peft = sys.executable if importlib.util.find_spec("peft") else None
    pythons = {"ours": sys.executable, "peft": peft, "llama.cpp": asked.llama}
    pythons |= {"vllm": asked.vllm, "vllm adapters": asked.vllm}
    present = [name for name in asked.only if pythons[name]]
    absent = [name for name in ENGINES if name not in present]
    for name in absent:
        print(f"{name} is not measured: it is not installed, was not named, or was left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        root = (asked.folder or Path(temporary)) / ("small" if asked.small else "large")
        write_all(root, sizes, present)
        engines = [Engine(name, str(pythons[name]), root, asked.threads) for name in present]
        rates = in_turns(engines, asked.turns, 3 if asked.small else STEPS)
        for engine in engines:
            engine.close()
    rate = {name: statistics.median(turn[name] for turn in rates) for name in rates[0]}
    none = {name: rate.get(f"{name}, {NONE}") for name in present} | {"vllm adapters": rate.get(f"vllm, {NONE}")}
    found: dict[str, dict[str, float]] = {}
    for name, tokens in rate.items():
        plain = none[name.partition(",")[0]]
        ratio = {"ratio": rounded(plain / tokens)} if plain else {}
        found[name] = {"tokens_a_second": rounded(tokens)} | ratio
    told = {key: value for engine in engines for key, value in engine.told.items()}
    row = {
        **{"benchmark": "adapters", "sizes": sizes, "threads": asked.threads, "users": USERS, "turns": asked.turns},
        **{"engines": {engine.name: engine.versions for engine in engines}, "absent": absent},
        **told,
        **{"found": found, "rates": [{n: rounded(r) for n, r in turn.items()} for turn in rates]},
        **checked(rates),
        "load_at_start": round(load, 1),
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
