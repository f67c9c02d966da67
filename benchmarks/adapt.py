"""What a step of adaptation keeps and costs, beside PEFT's LoRA, in one process and in turns.

A random Llama of 119.6 M parameters, 4 windows of 256 tokens, fp32, rank 16 on all linears of the blocks, fused AdamW.
PEFT runs in its best setting: the memory that it frees stays in the process here, which spares it the page faults that
it has by itself. The floor is the model's forward and the gradients of its inputs alone. Bytes kept are those of each
storage once, parameters apart. Seconds are the processor's own, on one thread unless told otherwise, so that what else
the machine does touches them little: medians over turns, the ratio to PEFT's taken turn by turn, and `p95` the 95th
percentile over the median. `--wall` takes seconds of the clock instead, for a quiet machine. A JSON line is printed and
appended to records/benchmarks/adapt.jsonl.

With `--packed` a process of its own adapts a Llama of 1.1 billion random weights at 4b/g32 by LoRA of rank 16 on all
linears of the blocks, one window of 256 tokens a step, within `--memory`; the row has its peak and seconds of a step.

    python benchmarks/adapt.py                  # ten minutes, 4 GB of memory; needs peft
    python benchmarks/adapt.py --packed --memory 2GB    # a few minutes, 3 GB of disk
    python benchmarks/adapt.py --only peft lora --turns 6
    python benchmarks/adapt.py --small          # two blocks, to see that it runs; nothing is recorded
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read once, when torch first asks for memory

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trimtab.catalogue import keep_benchmark
from trimtab.core.level import Rank
from trimtab.core.method import method
from trimtab.engine.train import keep_freed_memory, lean_norms
from trimtab.parts.saving import Codec, Saver
from trimtab.tasks.training import Prediction

SIZES: dict[str, Any] = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"num_key_value_heads": 12, "vocab_size": 8192, "max_position_embeddings": 1024, "tie_word_embeddings": True},
}
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, BATCH, LENGTH = 16, 4, 256
SHARE = 0.22  # of the products computed again: what half of PEFT's bytes takes


@dataclass
class Contender:
    """A model and how a step of it is made."""

    model: nn.Module
    loss: Callable[[], Tensor]
    saver: Saver | None
    optimiser: torch.optim.Optimizer
    saved: int = 0
    norms: contextlib.ExitStack | None = None
    seconds: list[float] = field(default_factory=list)

    def forward(self) -> Tensor:
        """The loss, what is kept for its gradient counted."""
        if self.saver is not None:
            with self.saver:
                value = self.loss()
            self.saved = self.saver.held
            return value
        return self.loss()

    def step(self, clock: Callable[[], float]) -> float:
        """Seconds of a step."""
        start = clock()
        self.forward().backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)
        return clock() - start


def count_kept(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that plain autograd keeps, each storage once, parameters and buffers apart."""
    ours = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in ours:
            kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    found = sum(s.nbytes() for s in kept.values())
    del value
    return found


def base(sizes: dict[str, Any], weights: dict[str, Tensor] | None) -> nn.Module:
    """The model; of all contenders one set of frozen weights is in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, attn_implementation="sdpa", use_cache=False)
    if weights is None:
        return LlamaForCausalLM(config)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def contender(name: str, sizes: dict[str, Any], weights: dict[str, Tensor], tokens: Tensor) -> Contender:
    """A contender by its name: `peft`, `floor`, or a method of ours with a codec behind a slash."""
    model = base(sizes, weights).requires_grad_(False)
    prediction = Prediction({"input_ids": tokens}, tokens, {"use_cache": False})
    places = torch.arange(len(tokens))

    def mean() -> Tensor:
        value, count = prediction(model, places)
        return value / count

    if name == "floor":
        rows = model.get_input_embeddings()(tokens).requires_grad_()  # type: ignore[operator]
        optimiser = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.0)

        def loss() -> Tensor:
            return model(inputs_embeds=rows, labels=tokens).loss

        return Contender(model, loss, None, optimiser, count_kept(model, loss))
    if name == "peft":
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ROLES)))  # type: ignore[arg-type]

        def theirs() -> Tensor:
            return wrapped(input_ids=tokens, labels=tokens).loss

        trained = [p for p in wrapped.parameters() if p.requires_grad]
        return Contender(wrapped, theirs, None, torch.optim.AdamW(trained, fused=True), count_kept(wrapped, theirs))
    chosen, _, codec = name.partition("/")
    wrapper: Any = method(chosen)
    rng = torch.Generator().manual_seed(0)
    roles = ("o_proj", "down_proj") if chosen == "s2ft" else ROLES
    for path, module in list(model.named_modules()):
        if path.rpartition(".")[2] in roles:
            stats = {"rng": rng, "absmean": torch.ones(module.in_features)}
            model.set_submodule(path, wrapper.wrap(module, Rank(RANK), **{k: stats[k] for k in wrapper.needs()}))
    norms = contextlib.ExitStack()
    norms.enter_context(lean_norms(model))  # as the loop has it
    share = 0.0 if codec else SHARE
    kept: Codec = codec or "exact"  # type: ignore[assignment]
    saver = Saver([*model.parameters(), *model.buffers()], kept, share)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    return Contender(model, mean, saver, optimiser, norms=norms)


PACKED = """
import json, sys
from trimtab.adapting import adapt
model, data, memory, out = sys.argv[1:]
made = adapt(model, data, level="r16", memory=memory, steps=2, batch=1, length=256, out=out).report
rows = [json.loads(line)["seconds"] for line in open(f"{out}/train-log.jsonl")]
keys = ("peak_bytes", "saved_bytes", "memory", "trained", "held_out", "seconds")
print(json.dumps({k: made[k] for k in keys} | {"step_seconds": rows, "recompute": made["recipe"]["recompute"]}))
"""


def packed(memory: str, folder: Path | None) -> dict[str, Any]:
    """Adapt the large packed model in a process of its own: its peak, and seconds of each step."""
    import json
    import shutil
    import subprocess
    import tempfile

    from benchmarks.decode import LARGE, write_model, write_packed
    from trimtab.models.pocket import POCKET

    with tempfile.TemporaryDirectory() as temporary:
        root = folder or Path(temporary)
        plain, model = root / "plain", root / "4b-g32"
        if not model.is_dir():
            plain.mkdir(parents=True)
            write_model(plain, LARGE)
            write_packed(plain, model, "4b/g32")
            shutil.rmtree(plain)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(POCKET["pocket"] / name, model / name)
        data = Path(temporary) / "text.txt"
        data.write_text(Path(argparse.__file__).read_text("utf-8")[:12_000], "utf-8")
        line = [sys.executable, "-c", PACKED, str(model), str(data), memory, f"{temporary}/run"]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout) | {"limit": memory, "level": "4b/g32", "sizes": LARGE}


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = ("peft", "floor", "lora", "lora/int8", "lora/int4", "paca", "s2ft")
    parser.add_argument("--only", nargs="+", default=everything, help="contenders")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no turn after so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="seconds of the clock, not of the processor")
    parser.add_argument("--packed", action="store_true", help="adapt a large packed model, and nothing else")
    parser.add_argument("--memory", default="2GB", help="limit of the packed run")
    parser.add_argument(
        "--folder", type=Path, help="where the packed model lies and stays; a temporary folder otherwise"
    )
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    if asked.packed:
        keep_benchmark({"benchmark": "adapt", "packed": packed(asked.memory, asked.folder)})
        return
    clock = time.perf_counter if asked.wall else time.process_time
    warnings.filterwarnings("ignore", category=FutureWarning)
    keep_freed_memory()
    torch.set_num_threads(asked.threads)
    sizes = SIZES | ({"num_hidden_layers": 2} if asked.small else {})
    tokens = torch.randint(0, sizes["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    weights = dict(base(sizes, None).state_dict())
    parameters = sum(t.numel() for name, t in weights.items() if name != "lm_head.weight")
    found = {name: contender(name, sizes, weights, tokens) for name in asked.only}
    began = time.perf_counter()
    for turn in range(asked.turns + 2):
        if turn > 2 and time.perf_counter() - began > 60 * asked.minutes:
            break
        for name, one in found.items():
            seconds = one.step(clock)
            print(f"{turn} {name}: {seconds:.3f} s", file=sys.stderr, flush=True)
            if turn >= 2:
                one.seconds.append(seconds)
    rows = {}
    for name, one in found.items():
        median = statistics.median(one.seconds)
        late = sorted(one.seconds)[min(len(one.seconds) - 1, int(0.95 * len(one.seconds)))]
        rows[name] = {"saved_mb": one.saved / 1e6, "seconds": median, "best": min(one.seconds), "p95": late / median}
    if peer := rows.get("peft"):
        turns = found["peft"].seconds
        for name, row in rows.items():
            row["saved_to_peft"] = row["saved_mb"] / peer["saved_mb"]
            row["time_to_peft"] = statistics.median(a / b for a, b in zip(found[name].seconds, turns, strict=True))
    row = {
        **{"benchmark": "adapt", "parameters": parameters, "batch": BATCH, "length": LENGTH},
        **{"rank": RANK, "recompute": SHARE, "clock": "wall" if asked.wall else "processor"},
        **{"turns": len(next(iter(found.values())).seconds), "threads": asked.threads, "contenders": rows},
    }
    keep_benchmark(row, kept=not asked.small)


if __name__ == "__main__":
    main()
