"""Llamas with random weights at 4 bits, and the seconds that they take: what models of costs are held against.

With one thread the seconds are the processor's own, which do not count what else the machine does; the fastest of
several repeats is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from trimtab.core.device import Work
from trimtab.core.level import parse_level
from trimtab.engine.pricing import work_of
from trimtab.engine.session import Runtime, map_of
from trimtab.kernels.bench import random_packed

LEVEL = "4b/g64"
VOCABULARY = 1024


class Timed:
    """One model, run by one thread.

    Args:
        width, blocks: of the residual, and how many. Heads have 64 channels.
        kv_heads: of keys and values; None: as many as of queries.
        context: most tokens of a text.
    """

    def __init__(
        self, width: int, blocks: int, kv_heads: int | None = None, context: int = 1024, seed: int = 0
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=int(2.75 * width) // 64 * 64,
            num_hidden_layers=blocks,
            num_attention_heads=width // 64,
            num_key_value_heads=kv_heads or width // 64,
            vocab_size=VOCABULARY,
            max_position_embeddings=context + 64,
        )
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        found, level = map_of(model), parse_level(LEVEL)
        plan = {s.path: level for s in found.sites if s.kind in ("linear", "head")}
        shapes = {s.path: s.shape for s in found.sites}
        packed = {f"{path}.weight": partial(random_packed, level, *shapes[path]) for path in plan}
        self.runtime, self.work = Runtime(model, packed, share=True), work_of(found, plan, "fp32")
        self.tokens = torch.randint(VOCABULARY, (context,), generator=torch.Generator().manual_seed(seed)).tolist()

    def forward(self, tokens: int, context: int = 0, batch: int = 1) -> Work:
        """What a forward asks of the machine."""
        return replace(self.work, tokens=tokens, context=context, batch=batch)

    def open(self, context: int, sequences: int = 1, cache: str = "fp16") -> Any:
        """A session with room for such texts and for a token more."""
        return self.runtime.open(context + 1, sequences=sequences, cache=cache)

    def read(self, session: Any, prompt: int, sequence: int = 0) -> None:
        """Read a prompt into an empty sequence."""
        session.forget(sequence)
        session.extend(sequence, self.tokens[:prompt])

    def write(self, session: Any, context: int, sequences: int = 1) -> None:
        """Write a token of each sequence after so many others, which it has read before."""
        for sequence in range(sequences):
            session.forget(sequence, context)
        session.step(dict.fromkeys(range(sequences), 1))

    def run(self, session: Any, prompt: int, outputs: int) -> None:
        """Read a prompt, and write tokens; the first of them comes with the prompt."""
        self.read(session, prompt)
        for _ in range(outputs - 1):
            session.step({0: 1})


def fastest(work: Callable[[], None], seconds: float = 0.1, least: int = 3) -> float:
    """Seconds of the processor of a call's fastest repeat: `least` of them, and more for about `seconds`."""
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return min(times)
