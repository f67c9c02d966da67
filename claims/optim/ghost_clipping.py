"""Ghost clipping: the clipped sum exactly, near the memory of plain training."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.core.claim import Check, Claim
from trimtab.core.plan import parse_method
from trimtab.engine.measure import forget_peak, held_bytes, peak_bytes
from trimtab.engine.memory import keep_freed_memory

BATCH = 32

CLAIM = Claim(
    method="ghost-clipping",
    statement="Every example's gradient can be clipped without being there, at about plain training's memory.",
    source="Li et al. 2022, arXiv:2110.05679, section 4 and figure 4",
    figure="almost the memory of training without privacy, for one more backward pass",
    setting="A Llama of 2 blocks and a width of 256 from random weights (1.9 million), 32 windows of 64 bytes of "
    "Python's library; clipped to half of the median length. Memory: most that the process held above what it held "
    "before.",
    metric="relative error of the clipped sum and of the lengths, against gradients one by one; bytes of peak memory",
    checks=(
        Check("lengths are off by less than one in 10,000", "error_of_lengths", "<", 1e-4),
        Check("the clipped sum is off by less than one in 10,000", "error_of_sum", "<", 1e-4),
        Check("it takes at most 1.3 times plain training's memory", "memory_to_plain", "<", 1.3),
        Check("it takes less than half the memory of the examples' gradients", "memory_to_explicit", "<", 0.5),
    ),
)


def measure(lab: Any, seed: int) -> dict[str, float]:
    """Numbers of one draw of weights and order."""
    from trimtab.parts.ghost import Ghosts

    bench = lab.pretraining(seed, width=256)
    model, data = bench.fresh(), bench.train
    named = dict(model.named_parameters())
    items = torch.arange(BATCH)

    def losses() -> torch.Tensor:
        return data.items(model, items)

    def peak(work: Any) -> tuple[Any, float]:
        model.zero_grad(set_to_none=True)
        forget_peak()
        before = held_bytes()
        found = work()
        return found, float(peak_bytes() - before)

    keep_freed_memory(1 << 16)  # what is freed goes back, so that each peak is its own
    one = [torch.autograd.grad(data.items(model, items[i : i + 1]).sum(), list(named.values())) for i in range(BATCH)]
    lengths = torch.tensor([sum(float(g.double().square().sum()) for g in grads) ** 0.5 for grads in one])
    limit = float(lengths.median()) / 2
    factors = (limit / lengths).clamp_max(1.0)
    wanted = [sum(f * grads[k] for f, grads in zip(factors, one, strict=True)) / BATCH for k in range(len(named))]
    del one
    ghosts = Ghosts(model)
    with ghosts.watching():
        values = losses()
    torch.autograd.grad(values.sum(), next(iter(named.values())))
    error = float(((ghosts.norms() - lengths) / lengths).abs().max())
    del values
    _, plain = peak(lambda: losses().mean().backward())
    chosen: Any = parse_method(f"ghost-clipping(limit={limit!r})")
    (_, found), ghost = peak(lambda: chosen.estimate(model, [losses], rng=torch.Generator().manual_seed(seed)))
    found = dict(found)
    off = sum(float((found[n] - w).double().square().sum()) for n, w in zip(named, wanted, strict=True)) ** 0.5
    size = sum(float(w.double().square().sum()) for w in wanted) ** 0.5
    del found
    held = lambda: [torch.autograd.grad(v, list(named.values()), retain_graph=True) for v in losses()]  # noqa: E731
    _, explicit = peak(held)
    return {
        **{"error_of_lengths": error, "error_of_sum": off / size},
        **{"memory_plain": plain, "memory_ghost": ghost, "memory_explicit": explicit},
        **{"memory_to_plain": ghost / plain, "memory_to_explicit": ghost / explicit},
    }
