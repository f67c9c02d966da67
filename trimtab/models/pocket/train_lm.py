"""Train `pocket-lm`, a small code language model, on the Python standard library of this machine.

    python -m trimtab.models.pocket.train_lm --work /tmp/pocket-lm --minutes 40

The folder `--work` keeps tokens, checkpoints and the log, so `--resume` goes on after a stop. The number of steps is
fixed from the step time measured after the first steps, and the learning rate follows the step count; where the
machine slows down so much that the steps would outlast `--guard`, it follows the clock instead.

With glibc, `MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184` in the environment keeps freed
memory in the process; without it, a good part of each step goes into fetching the same pages anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from trimtab.tasks.text import Document, stdlib_documents, token_blocks, tokenize_bytes

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHIPPED = Path(__file__).parent / "lm"
START, END = "<|bos|>", "<|eos|>"
CONTEXT = 512
WARM_UP_STEPS = 40
TIMED_STEPS = range(10, 50)
LOG_LINES = 300

# A line break and the indentation after it make one piece, so that the merges learn the indents of Python.
PIECES = r"(?:[ \t]*\r?\n)+[ \t]*| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+"


@dataclass(frozen=True)
class Recipe:
    """What the training depends on; written into figures.json.

    Args:
        batch: blocks a step, each of 512 tokens.
        matrix_rate: peak learning rate of Muon on the hidden matrices.
        other_rate: peak learning rate of AdamW on embeddings and norms.
        decay: weight decay on the hidden matrices.
        clip: largest norm of the whole gradient.
        flat: share of the steps at the peak rate, before the linear fall to zero.
        seed: of the weights and of the order of the blocks.
        bf16: multiply in bfloat16 (weights and optimiser state stay in float32).
    """

    batch: int = 8
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    decay: float = 0.1
    clip: float = 1.0
    flat: float = 0.35
    seed: int = 0
    bf16: bool = True


def config() -> LlamaConfig:
    """Return the shape of `pocket-lm`: 5.8 M parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, rms_norm_eps=1e-5, attention_bias=False, mlp_bias=False, use_cache=True,
    )  # fmt: skip


def train_tokenizer(documents: tuple[Document, ...]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of 4096 tokens: every text is covered and comes back exactly."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator((d.text for d in documents), trainers.BpeTrainer(
        vocab_size=config().vocab_size, special_tokens=[START, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B:1", special_tokens=[(START, 0), (END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, clean_up_tokenization_spaces=False
    )  # fmt: skip


def build(recipe: Recipe) -> LlamaForCausalLM:
    """Make the untrained model; the maps that write into the residual stream start smaller by sqrt(2 * layers)."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * model.config.num_hidden_layers) ** -0.5)
    return model


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embeddings and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=recipe.decay, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.other_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def rate_at(step: int, done: float, recipe: Recipe) -> float:
    """Share of the peak learning rate: linear warm-up over the first steps, flat, linear fall to zero at `done` = 1."""
    return max(0.0, min(1.0, (step + 1) / WARM_UP_STEPS, (1 - done) / (1 - recipe.flat)))


def share_done(progress: dict[str, Any], guard: float) -> float:
    """Share of the training that is over, by steps or by the clock; 0 while the number of steps is still unknown."""
    if progress["steps"] is None:
        return 0.0
    return max(progress["step"] / progress["steps"], progress["seconds"] / (60 * guard))


def batch_at(step: int, stream: Tensor, recipe: Recipe) -> Tensor:
    """Take the blocks of one step: in each epoch every block once, in a fresh order and from a fresh offset."""
    body = CONTEXT - 1
    steps_an_epoch = ((len(stream) - body) // body) // recipe.batch
    epoch, within = divmod(step, steps_an_epoch)
    rng = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    offset = int(torch.randint(body, (1,), generator=rng))
    order = torch.randperm(steps_an_epoch * recipe.batch, generator=rng)
    rows = order[within * recipe.batch : (within + 1) * recipe.batch]
    tokens = stream[(offset + rows * body)[:, None] + torch.arange(body)].long()
    return torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), tokens], 1)


def loss_of(model: nn.Module, tokens: Tensor, bf16: bool, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of every token but the first of each row."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=tokens, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


def train_step(model: nn.Module, optims: list[torch.optim.Optimizer], tokens: Tensor, rate: float,
               recipe: Recipe) -> float:  # fmt: skip
    """Do one update and return the loss before it."""
    for optim, peak in zip(optims, (recipe.matrix_rate, recipe.other_rate), strict=True):
        for group in optim.param_groups:
            group["lr"] = peak * rate
    loss = loss_of(model, tokens, recipe.bf16)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optim in optims:
        optim.step()
        optim.zero_grad(set_to_none=True)
    return loss.item()


def bits_per_byte(model: nn.Module, tokenizer: Any, documents: tuple[Document, ...], limit: int | None = None
                  ) -> tuple[float, int]:  # fmt: skip
    """Score blocks of 512 tokens, each on its own, in float32; return the bits per byte and the bytes they cover."""
    blocks = token_blocks(tokenizer, documents, CONTEXT, limit=limit)
    model.eval()
    with torch.no_grad():
        nats = sum(loss_of(model, rows, bf16=False, reduction="sum").item() for rows in blocks.tokens.split(8))
    model.train()
    covered = int(blocks.bytes.sum())
    return nats / math.log(2) / covered, covered


def export(model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 and its tokenizer as a plain Hugging Face folder."""
    copy = build(Recipe())
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The class name that transformers 4 knows too, and no trace of where the tokenizer was loaded from.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": END,
                "clean_up_tokenization_spaces": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def overlap(documents: tuple[Document, ...], known: tuple[Document, ...], lines: int = 5) -> float:
    """Share of the runs of five lines, blank ones and indents left out, that also stand in a known document."""

    def runs(document: Document) -> Iterator[tuple[str, ...]]:
        full = [line.strip() for line in document.text.splitlines() if line.strip()]
        return zip(*(full[i:] for i in range(lines)), strict=False)

    seen = {run for document in known for run in runs(document)}
    hits = [run in seen for document in documents for run in runs(document)]
    return sum(hits) / len(hits)


def figures(folder: Path, recipe: Recipe, progress: dict[str, Any]) -> dict[str, Any]:
    """Measure the shipped folder, loaded anew, on the test modules against xz -9e on the very same bytes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result: dict[str, Any] = {"model": "pocket-lm", "parameters": sum(p.numel() for p in model.parameters())}
    weights = (folder / "model.safetensors").read_bytes()
    result |= {"weight_bytes": len(weights), "weight_sha256": hashlib.sha256(weights).hexdigest()}
    train = stdlib_documents("train")
    for split in ("search", "test"):
        documents = stdlib_documents(split)
        bpb, covered = bits_per_byte(model, tokenizer, documents)
        text = "".join(d.text for d in documents).encode()[:covered]
        xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / covered
        result[split] = {"modules": len(documents), "bytes": covered, "bits_per_byte": round(bpb, 4),
                         "xz_bits_per_byte": round(xz, 4), "ratio_to_xz": round(bpb / xz, 4),
                         "also_in_train": round(overlap(documents, train), 4)}  # fmt: skip
    result["beats_xz"] = result["test"]["bits_per_byte"] < result["test"]["xz_bits_per_byte"]
    result["train"] = {"modules": len(train), "bytes": sum(d.bytes for d in train), **progress}
    result["recipe"] = asdict(recipe)
    result["machine"] = {"threads": torch.get_num_threads(), "cpu": platform.machine(),
                         "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip
    return result


@dataclass(frozen=True)
class Work:
    """The folder that holds a training under way."""

    folder: Path

    def prepare(self) -> tuple[PreTrainedTokenizerFast, Tensor]:
        """Load, or make and keep, the tokenizer and the stream of training tokens."""
        import numpy
        from transformers import AutoTokenizer

        cached = self.folder / "stream.npy"
        if not cached.exists():
            documents = stdlib_documents("train")
            tokenizer = train_tokenizer(documents)
            tokenizer.save_pretrained(self.folder / "tokenizer")
            tokens = [token for d in documents for token in tokenize_bytes(tokenizer, d.text)[0]]
            numpy.save(cached, numpy.array(tokens, dtype=numpy.uint16))
        stream = torch.from_numpy(numpy.load(cached).astype(numpy.int32))
        return AutoTokenizer.from_pretrained(self.folder / "tokenizer"), stream

    def save(self, model: nn.Module, optims: list[torch.optim.Optimizer], progress: dict[str, Any]) -> None:
        """Commit a checkpoint: tensors first, then by one rename the JSON that names them."""
        tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
        for i, optim in enumerate(optims):
            for key, state in optim.state_dict()["state"].items():
                tensors |= {f"optim/{i}/{key}/{name}": torch.as_tensor(value) for name, value in state.items()}
        name = f"step-{progress['step']}.safetensors"
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, self.folder / name)
        draft = self.folder / "progress.json.new"
        draft.write_text(json.dumps({**progress, "tensors": name}))
        os.replace(draft, self.folder / "progress.json")
        for old in self.folder.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, model: nn.Module, optims: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """Restore the last committed checkpoint into the model and the optimisers."""
        progress = json.loads((self.folder / "progress.json").read_text())
        tensors = load_file(self.folder / progress.pop("tensors"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
        for i, optim in enumerate(optims):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optim/{i}/"):
                    _, _, index, name = key.split("/")
                    state.setdefault(int(index), {})[name] = value
            optim.load_state_dict({"state": state, "param_groups": optim.state_dict()["param_groups"]})
        return progress

    def log(self, row: dict[str, Any]) -> None:
        """Append one row to the log."""
        with (self.folder / "log.jsonl").open("a") as out:
            out.write(json.dumps(row) + "\n")

    def thin_log(self, out: Path) -> None:
        """Write at most 300 rows of the log, evenly spaced; the last row of a step that was run twice counts."""
        by_step = {json.loads(row)["step"]: row for row in (self.folder / "log.jsonl").read_text().splitlines()}
        rows = [by_step[step] for step in sorted(by_step)]
        stride = max(1, math.ceil(len(rows) / (LOG_LINES - 1)))
        kept = rows[::stride] if (len(rows) - 1) % stride == 0 else [*rows[::stride], rows[-1]]
        out.write_text("\n".join(kept) + "\n")


def train(work: Work, recipe: Recipe, minutes: float, guard: float, resume: bool, every: float = 180) -> None:
    """Train to the end, keep checkpoints, then export and measure."""
    tokenizer, stream = work.prepare()
    model = build(recipe)
    optims = optimizers(model, recipe)
    fresh: dict[str, Any] = {"step": 0, "steps": None, "seconds": 0.0, "tokens": 0}
    progress = work.load(model, optims) if resume else fresh
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} training tokens", flush=True)
    began = time.monotonic() - progress["seconds"]
    saved = time.monotonic()
    times: list[float] = []
    while (done := share_done(progress, guard)) < 1:
        step = progress["step"]
        rate = rate_at(step, done, recipe)
        lap = time.monotonic()
        loss = train_step(model, optims, batch_at(step, stream, recipe), rate, recipe)
        now = time.monotonic()
        progress |= {"step": step + 1, "seconds": now - began, "tokens": (step + 1) * recipe.batch * (CONTEXT - 1)}
        if progress["steps"] is None and step in TIMED_STEPS:
            times.append(now - lap)
            if step == TIMED_STEPS[-1]:
                left = minutes * 60 - progress["seconds"]
                progress["steps"] = step + 1 + int(left / statistics.median(times))
        work.log({"step": step + 1, "loss": round(loss, 4), "lr": round(recipe.matrix_rate * rate, 6),
                  "tokens": progress["tokens"], "seconds": round(progress["seconds"], 1)})  # fmt: skip
        if step % 20 == 0 or step < 5:
            left = progress["seconds"] * (1 / done - 1) / 60 if done > 0 else math.inf
            print(f"step {step + 1}/{progress['steps']} loss {loss:.4f} {now - lap:.2f} s/step {left:.0f} min left",
                  flush=True)  # fmt: skip
        if now - saved > every:
            work.save(model, optims, progress)
            export(model, tokenizer, work.folder / "export")
            bpb, _ = bits_per_byte(model, tokenizer, stdlib_documents("search"), limit=32)
            print(f"checkpoint at step {step + 1}: {bpb:.4f} bits per byte on 32 blocks of search", flush=True)
            saved = time.monotonic()
    work.save(model, optims, progress)
    export(model, tokenizer, SHIPPED)
    work.thin_log(SHIPPED / "train-log.jsonl")
    effort = {"steps": progress["step"], "tokens": progress["tokens"], "seconds": round(progress["seconds"], 1)}
    measured = figures(SHIPPED, recipe, effort)
    (SHIPPED / "figures.json").write_text(json.dumps(measured, indent=2) + "\n")
    print(json.dumps(measured, indent=2), flush=True)


def step_seconds(work: Work, recipe: Recipe, steps: int = 20) -> float:
    """Median seconds a training step takes, over `steps` steps after two that are not counted."""
    _, stream = work.prepare()
    model = build(recipe)
    optims = optimizers(model, recipe)
    times = []
    for step in range(steps + 2):
        lap = time.monotonic()
        train_step(model, optims, batch_at(step, stream, recipe), rate_at(step, 0.0, recipe), recipe)
        times.append(time.monotonic() - lap)
    return statistics.median(times[2:])


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; the exit status is 1 where the model does not beat xz."""
    parser = argparse.ArgumentParser(description="Train pocket-lm on the Python standard library.")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and the log")
    parser.add_argument("--minutes", type=float, default=40, help="length of the training (default 40)")
    parser.add_argument("--guard", type=float, default=50, help="most minutes of training (default 50)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --work")
    parser.add_argument("--fp32", action="store_true", help="multiply in float32 instead of bfloat16")
    parser.add_argument("--measure", action="store_true", help="only time 20 steps in each precision")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    work = Work(given.work)
    recipe = replace(Recipe(), bf16=not given.fp32)
    if given.measure:
        for bf16 in (True, False):
            seconds = step_seconds(work, replace(recipe, bf16=bf16))
            print(f"{'bf16' if bf16 else 'fp32'}: {seconds:.2f} s/step", flush=True)
        return 0
    train(work, recipe, given.minutes, given.guard, given.resume)
    return 0 if json.loads((SHIPPED / "figures.json").read_text())["beats_xz"] else 1


if __name__ == "__main__":
    sys.exit(main())
