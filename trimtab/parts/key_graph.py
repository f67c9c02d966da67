"""A graph over keys by which a query finds those of its largest products."""

from __future__ import annotations

import torch
from torch import Tensor

NONE = -1  # a place in a pool that holds no key


def search(queries: Tensor, keys: Tensor, links: Tensor, entries: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """Best-first search of all queries at once: the key of the largest product that was not gone on from is next.

    Args:
        queries: `[rows, size]`.
        keys: `[keys, size]`, more than `beam`.
        links: `[keys, links]`.
        entries: where a search begins, `[entries]`, no more than `beam`.
        beam: a search ends when it has gone on from the best so many keys that it has seen.

    Returns:
        The keys of the largest products that were seen, best first, `[rows, beam]`; where fewer were seen the last is
        repeated. How many were seen, `[rows]`.

    >>> ring = torch.tensor([[1, 3], [0, 2], [1, 3], [2, 0]])
    >>> search(torch.tensor([[1.0]]), torch.arange(4.0)[:, None], ring, torch.tensor([0]), beam=1)
    (tensor([[3]]), tensor([4]))
    """
    rows, count = len(queries), len(keys)
    seen = torch.zeros(rows, count, dtype=torch.bool)
    seen[:, entries] = True
    start = queries @ keys[entries].T
    pool = torch.full((rows, beam), NONE)
    score = torch.full((rows, beam), -torch.inf)
    pool[:, : len(entries)], score[:, : len(entries)] = entries, start
    done = pool == NONE
    while not bool(done.all()):
        best, at = score.masked_fill(done, -torch.inf).max(1, keepdim=True)
        live = best > -torch.inf
        done.scatter_(1, at, True)
        near = links[pool.gather(1, at).clamp_min(0).squeeze(1)]
        fresh = live & ~seen.gather(1, near)
        seen.scatter_(1, near, seen.gather(1, near) | live)
        products = torch.einsum("rs,rls->rl", queries, keys[near]).masked_fill(~fresh, -torch.inf)
        score, order = torch.cat((score, products), 1).topk(beam, 1)
        pool = torch.cat((pool, near.masked_fill(~fresh, NONE)), 1).gather(1, order)
        done = torch.cat((done, ~fresh), 1).gather(1, order) | (pool == NONE)
    order = score.argsort(dim=1, descending=True, stable=True)
    pool = pool.gather(1, order)
    known = (pool != NONE).sum(1, keepdim=True)
    return pool.gather(1, torch.minimum(torch.arange(beam).expand_as(pool), known - 1)), seen.sum(1)


def graph(keys: Tensor, queries: Tensor, near: int, links: int, entries: int) -> tuple[Tensor, Tensor]:
    """Links between keys that are near the same queries, and the keys that are near most of them.

    A[q, k] = 1 where k is among the `near` keys of the largest products with q. Keys are linked to those with which
    they share most queries, A^T A; of equals, and of keys near no query, the nearer by angle goes first.

    Args:
        keys: `[keys, size]`.
        queries: `[rows, size]`.

    Returns:
        Links `[keys, links]` and entries `[entries]`.

    >>> keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]])
    >>> graph(keys, torch.tensor([[-1.0, 2.0], [-1.0, 3.0]]), near=2, links=1, entries=1)[0].flatten()
    tensor([1, 2, 1])
    """
    member = torch.zeros(len(queries), len(keys))
    member.scatter_(1, (queries @ keys.T).topk(near, 1).indices, 1.0)
    unit = torch.nn.functional.normalize(keys, dim=-1)
    shared = member.T @ member + 0.5 * (unit @ unit.T)  # an angle is less than one shared query
    often = member.sum(0).topk(entries).indices
    shared.fill_diagonal_(-torch.inf)
    return shared.topk(links, 1).indices, often
