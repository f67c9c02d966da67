"""RetrievalAttention: each query reads only the keys that an index finds, and the index knows where queries lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Cacher, Card
from trimtab.formats.cache import Pair, Reading
from trimtab.parts.cache_grid import halved
from trimtab.parts.key_graph import graph, search


@dataclass(frozen=True)
class Indexed:
    """Keys and values in 16 bits, and a graph over the keys by which a query finds those of its largest products.

    Fields:
        pair: keys and values `[..., tokens, size]`.
        links: of each key behind the first `sinks`, keys to go on to, int16 or int32 `[..., keys, links]`.
        entries: keys that every search begins at, int32 `[..., entries]`.
        sinks: first tokens that every query reads.
        top: keys behind them that a query reads.
        beam: keys that a search keeps.
    """

    pair: Pair
    links: Tensor
    entries: Tensor
    sinks: int
    top: int
    beam: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and graph."""
        return self.pair.nbytes + sum(t.numel() * t.element_size() for t in (self.links, self.entries))

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[..., tokens, channels]`, fp32."""
        return self.pair.dense()

    def read(self, queries: Tensor) -> Reading:
        """The tokens that queries `[..., rows, channels]` read."""
        keys = self.pair.keys.dense()
        taken = torch.ones(*queries.shape[:-1], keys.shape[-2], dtype=torch.bool)
        visits = torch.full(queries.shape[:-1], keys.shape[-2])
        if keys.shape[-2] - self.sinks > self.top:
            flat = zip(
                *(t.flatten(0, -3) for t in (queries.float(), keys[..., self.sinks :, :], self.links)),
                self.entries.flatten(0, -2),
                *(taken.flatten(0, -3), visits.flatten(0, -2)),
                strict=True,
            )
            for q, k, links, entries, row, count in flat:
                found, seen = search(q, k, links.long(), entries.long(), self.beam)
                row[:, self.sinks :] = False
                row[:, self.sinks :].scatter_(1, found[:, : self.top], True)
                count.copy_(self.sinks + seen)
        return Reading(taken, visits)


@dataclass(frozen=True)
class RetrievalAttention(Cacher):
    """Read the first tokens, the newest, and of the others the `top` keys of the largest q k^T that a graph leads to.

    softmax(q K^T) is nearly all on few keys, other ones for each query. They are found by a best-first search over a
    graph of keys. Queries lie elsewhere than keys do, so that a graph of what keys are near each other misleads them:
    the window's own queries, each with its `near` nearest keys, say which keys belong together, and keys of the same
    query are linked. All keys and values are kept, which may be in slower memory; what falls is how many are looked at.

    Args:
        top: keys that a query reads of a window (paper: 100).
        beam: keys that a search keeps.
        near: nearest keys of each query of the window, by exact products.
        links: of a key.
        entries: keys at which a search begins: those near most queries.
        sinks: first tokens of a text, read by every query (paper: 128).
        residual: tokens of a window; the newest 1 to so many are read by every query (paper: 512).
        index: `queries` is the paper's; `keys` links keys near to each other, by the same rule with keys for queries.

    Raises:
        UserError: a beam below the number of keys to find or of entries, or numbers below 1.

    Reference: Liu et al. 2024, arXiv:2409.10516, section 3; the projection of queries' neighbours to links between keys
        is that of Chen et al. 2024, arXiv:2408.08933 (RoarGraph).
    Departures: every window has an index of its own when it is full, where the paper has one of the whole prompt; links
        are those of most shared queries, where RoarGraph prunes them by occlusion and repairs the graph's connections;
        heads that share keys share an index.

    >>> keys, queries = torch.randn(2, 1, 64, 8, generator=torch.Generator().manual_seed(0)).unbind()
    >>> method = RetrievalAttention(top=4, beam=16, near=8, links=8, entries=4, sinks=2)
    >>> reading = method.store(keys, keys, queries=queries, first=0).read(queries[:, :3])
    >>> reading.taken.sum(-1), bool((reading.visits < 64).all())
    (tensor([[6, 6, 6]]), True)
    """

    top: int = 100
    beam: int = 128
    near: int = 32
    links: int = 32
    entries: int = 8
    sinks: int = 128
    residual: int = 512
    index: Literal["queries", "keys"] = "queries"

    card = Card(
        "retrievalattention",
        catalogue=(344,),
        paper="arXiv:2409.10516",
        claim="An index that is built from queries finds the same share of the top keys with fewer keys looked at than "
        "one of keys alone, and attention over what it finds is nearer full attention than a window of as many tokens.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "deterministic"}),
        kinds=frozenset({"kv"}),
    )

    def store(self, keys: Tensor, values: Tensor, *, queries: Tensor, first: int) -> Indexed:
        """Keys and values `[..., tokens, channels]` of a window from position `first` on, with its queries."""
        numbers = (self.top, self.near, self.links, self.entries)
        if min(numbers) < 1 or self.beam < max(self.top, self.entries) or self.sinks < 0:
            raise UserError(
                f"retrievalattention was given top={self.top}, beam={self.beam}, near={self.near}, links={self.links}, "
                f"entries={self.entries} and sinks={self.sinks}; all but sinks are at least 1, and the beam is no less "
                "than top or entries"
            )
        sinks = min(max(0, self.sinks - first), keys.shape[-2])
        rest = keys[..., sinks:, :].float()
        guides, count = (queries if self.index == "queries" else rest).float(), rest.shape[-2]
        sizes = [min(n, count) for n in (self.near, min(self.links, max(count - 1, 0)), self.entries)]
        lead = keys.shape[:-2]
        found = [
            graph(k, q, *sizes) for k, q in zip(rest.flatten(0, -3), guides.flatten(0, -3), strict=True) if count > 1
        ]
        links = torch.stack([f[0] for f in found]) if found else torch.zeros(lead.numel(), count, 0)
        entries = torch.stack([f[1] for f in found]) if found else torch.zeros(lead.numel(), 0)
        links = links.to(torch.int16 if count < 1 << 15 else torch.int32)
        pair = Pair(halved(keys), halved(values))
        return Indexed(
            *(pair, links.unflatten(0, lead), entries.int().unflatten(0, lead)),
            *(sinks, self.top, min(self.beam, max(count, 1))),
        )
