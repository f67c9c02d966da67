"""ThinK: channels that queries do not meet can go, and better ones than those that are small or drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Cacher, Card, Method
from trimtab.formats.cache import Pair
from trimtab.kv.think import ThinK
from trimtab.parts.cache_grid import halved
from trimtab.tasks.build import task_for
from trimtab.tasks.reading import caching, perplexity, read

CONTEXT, ITEMS, WINDOW, PRUNE = 512, 8, 64, 0.4
OTHERS = ("norm", "random")

CLAIM = Claim(
    method="think",
    statement="With 40 % of the channels of keys dropped, choosing them by queries and keys leaves smaller errors of "
    "the products of later queries with the keys, and a lower perplexity, than choosing them by the keys' norm or at "
    "random; the perplexity stays near that of all channels.",
    source="Xu et al. 2024, arXiv:2407.21018, abstract, sections 3.2 and 4",
    figure="20 % less memory of keys and values at equal accuracy on LongBench; pruning by norm falls behind",
    setting="The shipped language model, 8 test windows of 512 tokens, as long as it was trained on; keys pruned in "
    "windows of 64 tokens by the last 32 tokens' queries. Errors are of the products of a window's keys with the "
    "queries of the next window.",
    metric="perplexity a token; error: |Q K'^T - Q K^T| / |Q K^T| in the Frobenius norm, mean over layers and heads; "
    "rise: of the perplexity over that of all channels, as a share; bytes of a window of one layer and text",
    checks=(
        *(Check(f"error below that by {n}", "error_queries", "<", f"error_{n}") for n in OTHERS),
        *(Check(f"perplexity below that by {n}", "perplexity_queries", "<", f"perplexity_{n}") for n in OTHERS),
        Check("the perplexity rises by less than 1 %", "rise", "<", 0.01),
        Check("bytes of keys and values fall by 18 % or more", "bytes", "<=", "bytes_82"),
    ),
    seeds=(0, 1, 2),
)


@dataclass(frozen=True)
class Chosen(Cacher):
    """Channels of keys that go by another rule, at the bytes of ThinK; or none, and what was seen is recorded."""

    rule: str = "norm"
    residual: int = WINDOW

    card = Card("chosen", claim="The baselines.", kinds=frozenset({"kv"}))

    def store(self, keys: Tensor, values: Tensor, *, queries: Tensor, first: int) -> Pair:
        """A window."""
        if self.rule == "none":
            SEEN.append((first, keys.float(), queries.float()))
            return Pair(halved(keys), halved(values))
        return Pair(ThinK(prune=PRUNE).thin(keys, score(self.rule, keys, queries)), halved(values))


SEEN: list[tuple[int, Tensor, Tensor]] = []


def score(rule: str, keys: Tensor, queries: Tensor) -> Tensor:
    """What each rule ranks channels by."""
    if rule == "norm":
        return keys.float().norm(dim=-2)
    if rule == "random":
        return torch.rand(*keys.shape[:-2], keys.shape[-1], generator=torch.Generator().manual_seed(keys.shape[0]))
    return ThinK().score(keys, queries[..., -32 * (queries.shape[-2] // keys.shape[-2]) :, :])


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of test windows."""
    bench = lab.bench("pocket-lm", seed)
    tokens = task_for(bench.source, length=CONTEXT).batch("test", ITEMS, seed).inputs["input_ids"]
    model = bench.source.materialise()

    def value(keeper: Method) -> tuple[float, Any]:
        nats, held = read(caching(keeper, model, bench.modelmap, CONTEXT), tokens)
        return perplexity(nats), held

    SEEN.clear()
    full, _ = value(Chosen("none"))
    found = {"perplexity": full}
    layers = len(bench.modelmap.attentions)
    for rule in ("queries", *OTHERS):
        errors = []
        for (_, keys, queries), (_, _, later) in zip(SEEN, SEEN[layers:], strict=False):
            thin = ThinK(prune=PRUNE).thin(keys, score(rule, keys, queries)).dense()
            exact = later @ keys.transpose(-1, -2)
            errors.append((later @ (thin - keys).transpose(-1, -2)).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1)))
        found[f"error_{rule}"] = float(torch.stack(errors).mean())
        keeper = ThinK(prune=PRUNE, residual=WINDOW) if rule == "queries" else Chosen(rule)
        found[f"perplexity_{rule}"], held = value(keeper)
        if rule == "queries":
            found["bytes"] = held.layers[0].stored[0].nbytes / ITEMS
    at = bench.modelmap.attentions[0]
    found["bytes_82"] = 0.82 * WINDOW * at.kv_heads * at.head_size * 2 * 2
    return {**found, "rise": found["perplexity_queries"] / full - 1}
