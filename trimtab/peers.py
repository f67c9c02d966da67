"""Other runtimes beside ours, in turn and in one process, so that what else the machine does touches both."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.core.errors import UserError

PEERS = ("torch", "llama.cpp")
SHAPE = (8192, 2048)  # rows and columns of the linear that is compared
INPUTS = (1, 8, 128, 512)
OURS = ("bf16", "8b/row", "4b/g64", "2b/g32")
PROMPT = "The history of the steam engine begins long before the railways, and "
TURNS = 7

Works = Mapping[str, Callable[[], Any]]


def installed(module: str) -> bool:
    """Whether a module could be imported."""
    return importlib.util.find_spec(module) is not None


def check(peer: str, artifact: str | None) -> None:
    """Refuse a peer that is unknown, not installed, or that the question does not fit.

    Raises:
        UserError: says what to do.
    """
    if peer not in PEERS:
        raise UserError(f"unknown peer {peer!r}; choose from {', '.join(PEERS)}")
    if peer == "llama.cpp" and not installed("llama_cpp"):
        raise UserError("llama.cpp is not installed here; `pip install llama-cpp-python` builds it for this processor")
    if peer == "llama.cpp" and artifact is None:
        raise UserError("llama.cpp runs whole models; name an artifact: `trimtab bench ARTIFACT --against llama.cpp`")


def in_turn(works: Works, seconds: float = 0.3, turns: int = TURNS) -> dict[str, float]:
    """Fastest seconds of each piece of work, all of them once a turn after one to warm up."""
    best = dict.fromkeys(works, float("inf"))
    for work in works.values():
        work()
    began = time.perf_counter()
    turn = 0
    while turn < turns or time.perf_counter() - began < seconds * len(works):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - start)
        turn += 1
    return best


def linears(threads: int, shape: tuple[int, int] = SHAPE, inputs: tuple[int, ...] = INPUTS) -> list[dict[str, Any]]:
    """Our kernels beside torch's products in bf16 and in dynamic int8, on one matrix with several numbers of inputs:
    microseconds, operations a second, and how many times as fast as each of torch's ours are.
    """
    import torch

    from trimtab.core.level import parse_level
    from trimtab.kernels.bench import chain, random_packed, runs_here
    from trimtab.kernels.profile import threads_set

    rows, cols = shape
    plain = torch.nn.Linear(cols, rows, bias=False)
    half = torch.nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16)
    int8 = dynamic_int8(plain)
    packed = {t: random_packed(parse_level(t), rows, cols) for t in OURS if runs_here(parse_level(t))}
    found = []
    with threads_set(threads), torch.no_grad():
        for m in inputs:
            x = torch.randn(m, cols)
            works: dict[str, Callable[[], Any]] = {t: chain(p, [0], m)[1] for t, p in packed.items()}
            peers = {"torch bf16": partial(half, x.to(torch.bfloat16)), "torch int8": partial(int8, x)}
            best = in_turn({**works, **peers})
            for name, seconds in best.items():
                row = {
                    "inputs": m,
                    "what": name,
                    "microseconds": 1e6 * seconds,
                    "gops": 2e-9 * rows * cols * m / seconds,
                }
                if name in works:
                    row |= {f"to {p}": best[p] / seconds for p in peers}
                found.append(row)
    return found


def dynamic_int8(linear: Any) -> Any:
    """A linear as torch quantises it to 8 bits, with inputs rounded on the fly."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = torch.nn.Sequential(linear)
        return torch.ao.quantization.quantize_dynamic(whole, {torch.nn.Linear}, dtype=torch.qint8)


def models(artifact: str | Path, peer: str, threads: int, tokens: int = 64, turns: int = 3) -> list[dict[str, Any]]:
    """An artifact written with by us and by a peer: seconds to the first token, and tokens a second after it.

    torch runs the artifact's weights unpacked, in bf16; llama.cpp runs the artifact's GGUF export.
    """
    from trimtab.kernels.profile import threads_set
    from trimtab.loading import load

    ours = load(artifact)
    theirs = {"torch": _torch, "llama.cpp": _llama}[peer](artifact, ours, threads)
    best: dict[str, dict[str, float]] = {}
    writers = {"trimtab": lambda: _stamps(ours.stream(PROMPT, tokens)), peer: lambda: theirs(tokens)}
    with threads_set(threads):
        for _ in range(turns):
            for name, write in writers.items():
                first, rate = write()
                seen = best.setdefault(name, {"first_seconds": first, "tokens_per_second": rate})
                seen["first_seconds"] = min(seen["first_seconds"], first)
                seen["tokens_per_second"] = max(seen["tokens_per_second"], rate)
    ratio = best["trimtab"]["tokens_per_second"] / best[peer]["tokens_per_second"]
    sooner = best[peer]["first_seconds"] / best["trimtab"]["first_seconds"]
    return [{"what": n, **row} for n, row in best.items()] + [
        {"what": "ratio", "first_seconds": sooner, "tokens_per_second": ratio}
    ]


def _stamps(pieces: Any) -> tuple[float, float]:
    """Seconds to the first piece, and pieces a second after it."""
    stamps = [time.perf_counter()]
    stamps += [time.perf_counter() for _ in pieces]
    if len(stamps) < 3:
        raise UserError("the model ended its text at once, so there is nothing to compare; take another artifact")
    return stamps[1] - stamps[0], (len(stamps) - 2) / (stamps[-1] - stamps[1])


def _torch(artifact: str | Path, ours: Any, threads: int) -> Callable[[int], tuple[float, float]]:
    import torch

    from trimtab.loading import load

    model = load(artifact).model.to(torch.bfloat16)
    start = ours.tokenizer.bos_token_id
    ids = ([start] if start is not None else []) + ours.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def pieces(tokens: int) -> Any:
        out = model(input_ids=torch.tensor([ids]), use_cache=True)
        for _ in range(tokens):
            token = int(out.logits[0, -1].argmax())
            yield token
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)

    return lambda tokens: _stamps(pieces(tokens))


def _llama(artifact: str | Path, ours: Any, threads: int) -> Callable[[int], tuple[float, float]]:
    llama_cpp = importlib.import_module("llama_cpp")  # no dependency of ours: who compares with it has it

    from trimtab.exporting import export

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        export(artifact, "gguf", path)
        model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write(tokens: int) -> tuple[float, float]:
        model.reset()  # else it would know the prompt of the turn before
        parts = model.create_completion(PROMPT, max_tokens=tokens, temperature=0.0, stream=True)
        return _stamps(part for part in parts if part["choices"][0]["text"])

    return write
