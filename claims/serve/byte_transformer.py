"""ByteTransformer: prompts of unequal lengths packed end to end, beside the same padded to the longest."""

from __future__ import annotations

import time
from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.serve.byte_transformer import ByteTransformer
from trimtab.tasks.counter import Counter
from trimtab.tasks.traffic import calls, serve

PROMPTS, LONGEST, TURNS = 8, 128, 5

CLAIM = Claim(
    method="byte-transformer",
    statement="A batch of prompts of unequal lengths takes the time of its tokens when they are packed, and gives what "
    "the padded batch gives.",
    source="Zhai et al. 2022, arXiv:2210.03052, abstract and section V",
    figure="87 %, 131 %, 138 %, 74 % and 55 % faster than PyTorch, TensorFlow, Tencent TurboTransformer, Microsoft "
    "DeepSpeed and NVIDIA FasterTransformer on BERT with lengths of 60 % of the longest",
    setting="A Llama of 27 million random weights at 4b/g32; 8 prompts of 8 to 128 tokens, uniform, read in one step, "
    "packed, and each filled up to the longest; 5 times in turns, the quickest of each. One thread.",
    metric="seconds of the step; its rows; largest difference of the logits; share of requests with the same tokens "
    "when a service packs them",
    checks=(
        Check("less time", "packed", "<", "padded"),
        Check("in proportion to the rows, within a fifth", "packed", "<=", "expected"),
        Check("the same logits", "difference", "<=", 1e-5),
        Check("served packed, the tokens of each alone", "same", ">=", 1.0),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of prompts."""
    counter = Counter(seed=seed, threads=1)
    asked = calls(PROMPTS, seed=seed, prompt=(8, LONGEST), text=(4, 12))
    prompts = {i: list(call.order.tokens) for i, call in enumerate(asked)}
    longest = max(map(len, prompts.values()))
    filled = {i: prompt + [0] * (longest - len(prompt)) for i, prompt in prompts.items()}
    writer: Any = counter.runtime.open(256, sequences=PROMPTS, chunk=PROMPTS * longest)

    def read(batch: dict[int, list[int]]) -> float:
        for i in batch:
            writer.forget(i)
        start = time.perf_counter()
        writer.advance(batch)
        return time.perf_counter() - start

    seconds = [(read(prompts), read(filled)) for _ in range(TURNS)]
    packed, padded = (min(each) for each in zip(*seconds, strict=True))
    rows, most = sum(map(len, prompts.values())), PROMPTS * longest
    for i in prompts:
        writer.forget(i)
    together = writer.advance(prompts).clone()
    exact = counter.runtime.open(256, chunk=LONGEST)
    difference = 0.0
    for i, prompt in prompts.items():
        exact.forget(0)
        alone = exact.extend(0, [*prompt])
        difference = max(difference, float((alone - together[i]).abs().max() / alone.abs().max()))
    served = serve(counter.service(ByteTransformer(), 8 * counter.pages.of(192), rows=1024), asked)
    same = [served.tokens[i] == counter.alone(call.order) for i, call in enumerate(asked)]
    return {
        "packed": packed,
        "padded": padded,
        "expected": 1.2 * padded * rows / most,
        "difference": difference,
        "same": float(torch.tensor(same).float().mean()),
        "rows": rows,
        "padded_rows": most,
    }
