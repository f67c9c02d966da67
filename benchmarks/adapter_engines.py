"""The engines that `adapters.py` compares, each in a process of its own and in the Python that it is installed for.

A process is told an engine, the folder of the models, and the threads. It first says a JSON line with its cases and
versions; to each line `{"case", "steps"}` it answers with the seconds of as many steps, a step being the next token of
all sequences. A prompt is read once for each case and taken back to where it ended, so that what is timed is writing
alone. Nothing of Trimtab is imported for a peer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

USERS, RANK = 8, 16
MIXED = (8, 16, 32, 64, 8, 16, 32, 64)
PROMPT = 128  # tokens before a text is written
NONE, ONE, EACH, RANKS, SWITCHED = "none", "one", "rank 16 each", "ranks 8 to 64", "rank 16 each, one after another"
VLLM = {  # in this process, on all threads, and offline
    **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
    **{"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
}
Steps = Callable[[int], list[float]]


def prompt() -> list[int]:
    """The prompt of every sequence."""
    rng = Random(1)
    return [rng.randrange(1000) for _ in range(PROMPT)]


def adapter(folder: Path, user: int, kind: str = "equal") -> Path:
    """Where a user's adapter lies, in PEFT's format; as GGUF beside it."""
    return folder / "lora" / f"{kind}-{user}"


class Ours:
    """The compiled program with a bank of adapters."""

    packages = ("trimtab", "torch")

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from trimtab.engine.session import Runtime
        from trimtab.formats.peft import read_adapter
        from trimtab.kernels.native import native
        from trimtab.loading import load

        kernels = native()
        assert kernels is not None, "no kernels were compiled, so there is nothing to measure"
        kernels.set_threads(threads)
        torch.set_num_threads(threads)
        loaded = load(folder / "4b-g32", packed=True)
        runtime = Runtime(loaded.model, loaded.packed, share=True)
        bank = runtime.bank()
        for user in range(USERS):
            for kind in ("equal", "mixed"):
                bank.add(f"{kind} {user}", read_adapter(adapter(folder, user, kind)))
        self.writer = runtime.open(1024, sequences=USERS, bank=bank)
        self.told = {"variant": kernels.__name__.rpartition("._")[2], "adapter_bytes": bank.pool.nbytes}

    def cases(self) -> dict[str, Steps]:
        """By name."""
        users: dict[str, list[str | None]] = {NONE: [None] * USERS, ONE: ["equal 0"] * USERS}
        users |= {EACH: [f"equal {u}" for u in range(USERS)], RANKS: [f"mixed {u}" for u in range(USERS)]}
        return {name: lambda steps, who=who: self.steps(who, steps) for name, who in users.items()}

    def steps(self, users: list[str | None], steps: int) -> list[float]:
        """Seconds of each."""
        for sequence, user in enumerate(users):
            self.writer.use(sequence, user)
            self.writer.forget(sequence)
            self.writer.extend(sequence, prompt())
        spent, tokens = [], dict.fromkeys(range(USERS), 1)
        for _ in range(steps):
            start = time.perf_counter()
            tokens = dict(enumerate(self.writer.step(tokens).numpy().argmax(1).tolist()))
            spent.append(time.perf_counter() - start)
        return spent


class Peft:
    """PEFT on the model in bf16: adapters mixed in a batch by `adapter_names`, or switched between by `set_adapter`."""

    packages = ("peft", "transformers", "torch")
    told: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        plain = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16).eval()
        self.users = [f"user{user}" for user in range(USERS)]
        model: Any = PeftModel.from_pretrained(plain, adapter(folder, 0), adapter_name=self.users[0])
        for user, name in enumerate(self.users[1:], 1):
            model.load_adapter(adapter(folder, user), adapter_name=name)
        self.model = model.eval().to(torch.bfloat16)
        self.torch, self.read = torch, dict[str, Any]()

    def cases(self) -> dict[str, Steps]:
        """By name."""
        return {NONE: self.plain, EACH: self.mixed, SWITCHED: self.switched}

    def next(self, tokens: Any, cache: Any, **options: Any) -> tuple[Any, Any]:
        """Likeliest tokens behind those `[sequences, tokens]`, and the cache."""
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def batch(self, name: str, steps: int, **options: Any) -> list[float]:
        """A batch of all users."""
        if name not in self.read:
            self.read[name] = self.next(self.torch.tensor([prompt()] * USERS), None, **options)
        tokens, cache = self.read[name]
        spent = []
        for _ in range(steps):
            start = time.perf_counter()
            tokens, cache = self.next(tokens, cache, **options)
            spent.append(time.perf_counter() - start)
        cache.crop(-steps)
        return spent

    def plain(self, steps: int) -> list[float]:
        """Without adapters."""
        with self.model.disable_adapter():
            return self.batch(NONE, steps)

    def mixed(self, steps: int) -> list[float]:
        """Each sequence with its own, in one batch."""
        return self.batch(EACH, steps, adapter_names=self.users)

    def switched(self, steps: int) -> list[float]:
        """Each sequence with its own, sequence by sequence."""
        spent, tokens = [], {}
        for user in self.users:
            self.model.set_adapter(user)
            if user not in self.read:
                self.read[user] = self.next(self.torch.tensor([prompt()]), None)
            tokens[user] = self.read[user][0]
        for _ in range(steps):
            start = time.perf_counter()
            for user in self.users:
                self.model.set_adapter(user)
                tokens[user], _cache = self.next(tokens[user], self.read[user][1])
            spent.append(time.perf_counter() - start)
        for user in self.users:
            self.read[user][1].crop(-steps)
        return spent


class LlamaCpp:
    """llama.cpp on the GGUF export of our 4b/g32, at its own face. An adapter there is the whole batch's, so that
    sequences with their own go one after another, as its server runs them.
    """

    packages = ("llama-cpp-python",)
    told: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, folder: Path, threads: int) -> None:
        api: Any = importlib.import_module("llama_cpp")
        self.api = api
        self.quiet = api.llama_log_callback(lambda *_: None)  # kept, for C calls it
        api.llama_log_set(self.quiet, None)
        file = str(folder / "4b-g32.gguf").encode()
        self.model = api.llama_model_load_from_file(file, api.llama_model_default_params())
        files = [adapter(folder, user).with_suffix(".gguf") for user in range(USERS)]
        self.adapters = [api.llama_adapter_lora_init(self.model, str(f).encode()) for f in files]
        settings = api.llama_context_default_params()
        settings.n_seq_max, settings.n_ctx = 2 * USERS, 2 * USERS * 256
        settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = threads
        self.context = api.llama_init_from_model(self.model, settings)
        assert self.context and all(self.adapters), f"llama.cpp does not load what lies in {folder}"
        self.rows = api.llama_batch_init(512, 0, 1)
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.read: dict[int, int] = {}

    def cases(self) -> dict[str, Steps]:
        """By name."""
        return {NONE: self.plain, SWITCHED: self.switched}

    def use(self, user: int | None) -> None:
        """Adapt what is run from now on, or not."""
        chosen = [] if user is None else [self.adapters[user]]
        kind = self.api.llama_adapter_lora_p_ctypes * len(chosen)
        scales = (self.api.ctypes.c_float * len(chosen))(*[1.0] * len(chosen))
        assert self.api.llama_set_adapters_lora(self.context, kind(*chosen), len(chosen), scales) == 0

    def next(self, rows: list[tuple[int, int, int]], wanted: int = 1) -> list[int]:
        """Likeliest tokens behind the last `wanted` of (token, place, sequence) triples."""
        import numpy as np

        self.rows.n_tokens = len(rows)
        for i, (token, place, sequence) in enumerate(rows):
            self.rows.token[i], self.rows.pos[i], self.rows.logits[i] = token, place, i >= len(rows) - wanted
            self.rows.n_seq_id[i], self.rows.seq_id[i][0] = 1, sequence
        assert self.api.llama_decode(self.context, self.rows) == 0
        found = [self.api.llama_get_logits_ith(self.context, i) for i in range(len(rows) - wanted, len(rows))]
        return [int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()) for logits in found]

    def begun(self, sequence: int) -> int:
        """The first token of a sequence, whose prompt is read once."""
        memory = self.api.llama_get_memory(self.context)
        self.api.llama_memory_seq_rm(memory, sequence, PROMPT, -1)
        if sequence not in self.read:
            [self.read[sequence]] = self.next([(token, i, sequence) for i, token in enumerate(prompt())])
        return self.read[sequence]

    def plain(self, steps: int) -> list[float]:
        """Without adapters, in one batch."""
        self.use(None)
        tokens, spent = [self.begun(sequence) for sequence in range(USERS)], []
        for step in range(steps):
            start = time.perf_counter()
            tokens = self.next([(token, PROMPT + step, i) for i, token in enumerate(tokens)], USERS)
            spent.append(time.perf_counter() - start)
        return spent

    def switched(self, steps: int) -> list[float]:
        """Each sequence with its own adapter."""
        tokens, spent = [], []
        for user in range(USERS):
            self.use(user)
            tokens.append(self.begun(USERS + user))
        for step in range(steps):
            start = time.perf_counter()
            for user in range(USERS):
                self.use(user)
                [tokens[user]] = self.next([(tokens[user], PROMPT + step, USERS + user)])
            spent.append(time.perf_counter() - start)
        return spent


class Vllm:
    """vLLM's engine for processors on the model in bf16, without room for adapters."""

    packages = ("vllm", "vllm-cpu", "torch")
    told: dict[str, Any] = {}  # noqa: RUF012
    settings: dict[str, Any] = {}  # noqa: RUF012
    case = NONE

    def __init__(self, folder: Path, threads: int) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ |= VLLM | {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
        vllm: Any = importlib.import_module("vllm")
        llm = vllm.LLM(
            *(str(folder / "plain"),),
            **{"skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 256, "max_num_seqs": USERS},
            **{"async_scheduling": False, "disable_log_stats": True, **self.settings},
        )
        self.engine, self.sampling, self.asked = llm.llm_engine, vllm.SamplingParams, 0
        self.adapters = self.requests(folder)

    def requests(self, folder: Path) -> list[Any]:
        """What says a request's adapter."""
        return [None] * USERS

    def cases(self) -> dict[str, Steps]:
        """By name."""
        return {self.case: self.steps}

    def steps(self, steps: int) -> list[float]:
        """Seconds of each step that gave every sequence a token and read no prompt."""
        length = steps + 1
        sampling = self.sampling(max_tokens=length, ignore_eos=True, temperature=0.0, detokenize=False)
        for chosen in self.adapters:
            self.asked += 1
            request = {"prompt_token_ids": prompt()}
            self.engine.add_request(str(self.asked), request, sampling, lora_request=chosen)
        spent: list[float] = []
        before: list[int] = []
        while self.engine.has_unfinished_requests():
            start = time.perf_counter()
            lengths = [len(out.outputs[0].token_ids) for out in self.engine.step()]
            seconds = time.perf_counter() - start
            if len(before) == len(lengths) == USERS and min(before) > 0:
                spent.append(seconds)
            before = lengths
        assert spent, "vLLM ran no step of all sequences"
        return spent


class VllmAdapters(Vllm):
    """The same with an adapter for each request."""

    settings = {"enable_lora": True, "max_loras": USERS, "max_lora_rank": RANK}  # noqa: RUF012
    case = EACH

    def requests(self, folder: Path) -> list[Any]:
        made: Any = importlib.import_module("vllm.lora.request").LoRARequest
        return [made(f"user{user}", user + 1, str(adapter(folder, user))) for user in range(USERS)]


ENGINES = {"ours": Ours, "peft": Peft, "llama.cpp": LlamaCpp, "vllm": Vllm, "vllm adapters": VllmAdapters}


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Answer until there are no more lines."""
    name, folder, threads = sys.argv[1:]
    here = Path(__file__).resolve().parent  # whose files are no modules: `kernels` is a package of others, too
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != here]
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    kind: Any = ENGINES[name]
    engine = kind(Path(folder), int(threads))
    cases = engine.cases()
    versions = {package: found for package in kind.packages if (found := version(package))}
    print(json.dumps({"cases": list(cases), "versions": versions, "told": engine.told}), file=said, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(cases[asked["case"]](asked["steps"])), file=said, flush=True)


if __name__ == "__main__":
    main()
