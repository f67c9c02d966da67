"""RetrievalAttention: an index that knows the queries finds the same keys with fewer looks than one of keys alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trimtab.core.claim import Check, Claim
from trimtab.core.method import Cacher, Card
from trimtab.formats.cache import Pair, Reading
from trimtab.kv.retrievalattention import RetrievalAttention
from trimtab.parts.cache_grid import halved
from trimtab.tasks.build import task_for
from trimtab.tasks.reading import caching, read

CONTEXT, ITEMS, BUILT = 1024, 1, 960
TOP, TARGET = 19, 0.9  # keys: 2 % of those indexed
BEAMS = (19, 20, 22, 25, 28, 32, 36, 42, 48, 56, 64, 80, 96, 128, 192, 256, 384)
CLUSTERS = 30
INDEX = RetrievalAttention(top=TOP, near=16, links=12, entries=8, sinks=0, residual=BUILT)

CLAIM = Claim(
    method="retrievalattention",
    statement="To find 90 % of the 2 % of keys with the largest products, an index that is built from queries looks at "
    "fewer keys than one of keys alone, and than clusters of keys; attention over the keys that it finds is nearer "
    "full attention than over as many of the first and newest tokens.",
    source="Liu et al. 2024, arXiv:2409.10516, sections 2.4, 3 and 4",
    figure="1 to 3 % of the keys looked at, where clusters and graphs of keys take about 30 %",
    setting="Queries and keys of all layers and heads of the shipped language model, of a test window of 1,024 tokens, "
    "its whole context. Indexes are of the first 960 keys, built with the queries of those tokens; the queries of the "
    "last 64 tokens search. Graphs have 12 links a key and 8 entries; clusters are 30 by k-means, looked at from the "
    "nearest on. For each layer and index the least effort that finds 90 % is taken, in steps of the beam or of one "
    "cluster.",
    metric="looked: keys looked at, centroids included, as a share of 960; error: of attention's output over the 19 "
    "found keys, relative to full attention over the 960, and over 4 first and 15 newest tokens",
    checks=(
        Check("fewer looks than a graph of keys", "looked_queries", "<", "looked_keys"),
        Check("fewer looks than clusters", "looked_queries", "<", "looked_clusters"),
        Check("at most 3 % of keys are looked at", "looked_queries", "<=", 0.03),
        Check("the output is nearer than that of a window", "error_found", "<", "error_window"),
    ),
    seeds=(0, 1, 2),
)
SEEN: list[tuple[Tensor, Tensor, Tensor]] = []


@dataclass(frozen=True)
class Recorded(Cacher):
    """Keeps everything and records it."""

    residual: int = 128

    card = Card("recorded", claim="Records.", kinds=frozenset({"kv"}))

    def store(self, keys: Tensor, values: Tensor, *, queries: Tensor) -> Pair:
        """A window."""
        SEEN.append((keys.float(), values.float(), queries.float()))
        return Pair(halved(keys), halved(values))


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of test windows."""
    bench = lab.bench("pocket-lm", seed)
    tokens = task_for(bench.source, length=CONTEXT).batch("test", ITEMS, seed).inputs["input_ids"]
    tokens = torch.cat((tokens, tokens[:, :1]), 1)  # one more, so that the last window is full
    SEEN.clear()
    read(caching(Recorded(), bench.source.materialise(), bench.modelmap, CONTEXT), tokens)
    layers = len(bench.modelmap.attentions)
    found: dict[str, list[float]] = {}
    for layer in range(layers):
        keys, values, queries = (torch.cat(parts, -2) for parts in zip(*SEEN[layer::layers], strict=True))
        shared = queries.shape[-2] // keys.shape[-2]
        keys, values = keys[..., :BUILT, :], values[..., :BUILT, :]
        past, asking = queries[..., : BUILT * shared, :], queries[..., BUILT * shared :, :]
        for name, number in searched(keys, values, past, asking).items():
            found.setdefault(name, []).append(number)
    return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}


def searched(keys: Tensor, values: Tensor, past: Tensor, asking: Tensor) -> dict[str, float]:
    """Numbers of one layer."""
    products = asking @ keys.transpose(-1, -2)
    exact = products.topk(TOP, -1).indices
    made = {}
    for kind in ("queries", "keys"):
        stored = replace(INDEX, index=kind, beam=max(BEAMS)).store(keys, values, queries=past, first=0)
        low, high = 0, len(BEAMS) - 1
        while low < high:  # a wider beam looks at more, and finds no less
            middle = (low + high) // 2
            enough = recall(replace(stored, beam=BEAMS[middle]).read(asking), exact) >= TARGET
            low, high = (low, middle) if enough else (middle + 1, high)
        reading = replace(stored, beam=BEAMS[low]).read(asking)
        made[f"looked_{kind}"] = float(reading.visits.float().mean()) / BUILT
        made[f"recall_{kind}"] = recall(reading, exact)
        if kind == "queries":
            full = (products / asking.shape[-1] ** 0.5).softmax(-1) @ values
            window = torch.zeros(BUILT, dtype=torch.bool)
            window[:4], window[4 - TOP :] = True, True
            for name, taken in (("found", reading.taken), ("window", window)):
                share = (products / asking.shape[-1] ** 0.5).masked_fill(~taken, -torch.inf).softmax(-1)
                made[f"error_{name}"] = float((share @ values - full).norm() / full.norm())
    looks = [
        clustered(k, q, e)
        for k, q, e in zip(keys.flatten(0, 1), asking.flatten(0, 1), exact.flatten(0, 1), strict=True)
    ]
    return {**made, "looked_clusters": sum(looks) / len(looks)}


def recall(reading: Reading, exact: Tensor) -> float:
    """Share of the keys of the largest products that are read."""
    return float(reading.taken.gather(-1, exact).float().mean())


def clustered(keys: Tensor, asking: Tensor, exact: Tensor) -> float:
    """Share of keys looked at, centroids included, by the fewest clusters that find enough."""
    centres = keys[torch.linspace(0, BUILT - 1, CLUSTERS).long()]
    for _ in range(12):
        member = torch.cdist(keys, centres).argmin(1)
        centres = torch.stack(
            [keys[member == c].mean(0) if bool((member == c).any()) else centres[c] for c in range(CLUSTERS)]
        )
    sizes = torch.bincount(member, minlength=CLUSTERS)
    order = (asking @ centres.T).argsort(dim=1, descending=True)
    rank = order.argsort(dim=1)  # of each cluster, by query
    found = rank.gather(1, member[exact])  # at which cluster each wanted key turns up
    for probes in range(1, CLUSTERS + 1):
        if float((found < probes).float().mean()) >= TARGET:
            break
    return float(CLUSTERS + sizes[order[:, :probes]].sum(1).float().mean()) / BUILT
