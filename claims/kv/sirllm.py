"""SirLLM: a small cache that keeps surprising tokens recalls what was long ago; one that keeps the newest does not."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.kv.sirllm import SirLLM
from trimtab.tasks.build import task_for
from trimtab.tasks.reading import caching, perplexity, read, read_again, recalled

LENGTH, ITEMS, SPAN, AT, WINDOW = 2048, 4, 24, 100, 64
CACHES = {
    "entropy": SirLLM(start=4, memory=124, recent=0, residual=WINDOW),
    "decayed": SirLLM(start=4, memory=124, recent=0, decay=0.9, residual=WINDOW),
    "newest": SirLLM(start=4, memory=0, recent=124, residual=WINDOW),
}

CLAIM = Claim(
    method="sirllm",
    statement="In a stream far longer than the cache, what was planted early on is recalled better from a cache that "
    "keeps the tokens of highest entropy than from one of as many bytes that keeps the first and the newest; bytes "
    "stay constant.",
    source="Yao et al. 2024, arXiv:2405.12528, abstract and section 4",
    figure="higher accuracy than StreamingLLM on DailyDialog, Grocery Shopping and Rock-Paper-Scissors",
    setting="The shipped language model; 4 streams of 2,048 tokens of test text, twice its positions and four times "
    "what it was trained on. 24 random tokens are planted at token 100 and read again at the end; their first 4 say "
    "which they are. Both caches hold 128 tokens and a window of 64. Decayed: the same with a decay of 0.9 a window.",
    metric="recall: nats a token of the passage read again, less is better, chance is 8.3; perplexity a token of the "
    "text between; bytes of the caches after 1,024 and 2,048 tokens",
    checks=(
        Check("recall better by entropy than by newest", "recall_entropy", "<", "recall_newest"),
        Check("with a decay still better than by newest", "recall_decayed", "<", "recall_newest"),
        Check("recall better than the passage when first read", "recall_entropy", "<", "first"),
        Check("ordinary text is read no worse than with the newest", "perplexity_entropy", "<=", "perplexity_newest"),
        Check("bytes stay constant", "bytes", "<=", "bytes_half"),
    ),
    seeds=(0, 1, 2),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of streams and passages."""
    bench = lab.bench("pocket-lm", seed)
    tokens = task_for(bench.source, length=LENGTH // 2).batch("test", 2 * ITEMS, seed).inputs["input_ids"]
    tokens = tokens.reshape(ITEMS, LENGTH)
    passage = torch.randint(300, 4000, (ITEMS, SPAN), generator=torch.Generator().manual_seed(seed))
    planted, found = read_again(tokens, passage, AT), {}
    model = bench.source.materialise()
    for name, keeper in CACHES.items():
        cache = caching(keeper, model, bench.modelmap, LENGTH)
        nats, held = read(cache, planted)
        found[f"recall_{name}"] = recalled(nats, SPAN)
        found[f"perplexity_{name}"] = perplexity(nats[:, AT + SPAN : -SPAN])
        if name == "entropy":
            found["first"] = recalled(nats[:, : AT + SPAN - 1], SPAN)
            found["bytes"] = held.nbytes
            found["bytes_half"] = read(cache, planted[:1, : LENGTH // 2])[1].nbytes * ITEMS
    return found
