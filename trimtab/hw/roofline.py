"""The roofline of a processor: every operation is limited by bandwidth or by arithmetic, and reaches a share of it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from trimtab.core.device import CACHE_BYTES, Cost, Device, Heads, Kernel, Product, Work
from trimtab.core.errors import UserError
from trimtab.core.level import Dense
from trimtab.core.method import Card, Pricer


@dataclass(frozen=True)
class Roofline(Pricer):
    """Price a forward as the sum of its operations, each at the share of its limit that was measured on this machine:

        seconds(op) = fixed + edge (rows + cols) + max(bytes / bandwidth, operations / peak) / share(m)

    There are two roofs, that of the caches and that of memory, each with the share reached below it; an operation lies
    between them by what part of all that the forward reads is no longer in the caches when it is read again. Between
    two measured m the seconds run straight; beyond the largest they grow with m. A level that the profile has not is
    unpacked to fp32, and priced so. low and high add up the best and the worst shapes' errors of the fit. Bytes are
    weights, cache and activations.

    Fields:
        overhead: factor on the fixed seconds of every operation, for run loops that pay more for a call than the
            kernels do.

    Args of `price`:
        work: one forward; device: a profile, as `trimtab bench` measures it.

    Raises:
        UserError: the profile has neither a level of the work nor fp32.

    Reference: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore
        architectures", Communications of the ACM 52(4); micro-benchmarks that feed it in the manner of Luo et al. 2024,
        arXiv:2402.13499, sections 3 and 4, with the processor's caches, vector units and barrier in place of a GPU's.
    Departures: the roof is not a ceiling but a measured share of one, by level and number of inputs, since no kernel
        reaches the peak at every m; a fixed cost and one for each row and column are added. Nothing is fitted to whole
        models.

    >>> from trimtab.core.level import Dense
    >>> row = Kernel("linear", "bf16", 1, "vnni", fixed=1e-6, edge=0.0, near=0.5, far=0.5)
    >>> flat = ((1 << 20, 4e10), (1 << 28, 4e10))
    >>> device = Device("a", 2, 1 << 33, 2, "vnni", {"l3": 1 << 25}, flat, ((1 << 24, 0.0),), {"fp32": 1e12}, (row,))
    >>> 1e6 * Roofline().price(Work((Product(Dense("bf16"), 1000, 1000),)), device).mid
    101.0
    """

    overhead: float = 1.0

    card = Card(
        "roofline",
        catalogue=(34,),
        paper="arXiv:2402.13499",
        claim="Micro-measurements of the machine predict the seconds and the memory of whole models within 15 %.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"linear", "head", "embedding"}),
    )

    def price(self, work: Work, device: Device) -> Cost:
        """Seconds of one forward with their spread, and the most bytes that it holds."""
        m, held = work.batch * work.tokens, work.weight_bytes + work.cache_bytes + (work.around or 0)
        costs = [self._product(p, work.batch if p.last else m, held, device) for p in work.products]
        costs += [self._attention(a, work, held, device) for a in work.attentions]
        costs += [self._pass(width, m, device) for width in work.passes]
        if work.around is None:
            costs += [Cost(k.fixed, k.fixed, k.fixed * k.noise) for k in device.kernel("step")]
        total = sum(costs, Cost(0.0, 0.0, 0.0))
        return replace(total, bytes=work.held_bytes)

    def _product(self, product: Product, m: int, held: int, device: Device) -> Cost:
        rows = device.kernel("linear", str(product.level))
        if not rows and (rows := device.kernel("linear", "fp32")):
            product = replace(product, level=Dense("fp32"))
        if not rows:
            raise UserError(
                f"the profile of {device.name} has neither level {product.level} nor fp32; measure again with "
                "`trimtab bench`"
            )
        peak = device.peak(product.level)

        def at(kernel: Kernel) -> float:
            operations = float(kernel.m * product.level.flops((product.rows, product.cols)))
            edges = product.rows + product.cols
            return self._seconds(kernel, edges, product.rows, product.bytes, operations / peak, held, device)

        return _between(rows, m, at)

    def _attention(self, heads: Heads, work: Work, held: int, device: Device) -> Cost:
        # each new token reads the keys and values before it and, on average, half of those that are new
        seen = work.context + (work.tokens + 1) / 2
        reads = work.batch * (work.context + work.tokens) * 2 * heads.kv_heads * heads.size * CACHE_BYTES
        width, new = heads.heads * heads.size, work.batch * work.tokens
        arithmetic = 4.0 * width * seen * new / device.limits["fp32"]

        def at(kernel: Kernel) -> float:
            return self._seconds(kernel, width * new, 0, reads, arithmetic, held, device)

        return _between(device.kernel("attention"), work.tokens, at, grows=False)

    def _pass(self, width: int, m: int, device: Device) -> Cost:
        def at(kernel: Kernel) -> float:
            return self._seconds(kernel, 0, 0, 4.0 * width * kernel.m, 0.0, device.caches["l2"], device)

        return _between(device.kernel("pass"), m, at)

    def _seconds(
        self, kernel: Kernel, edges: float, rows: float, reads: float, arithmetic: float, held: float, device: Device
    ) -> float:
        """Of an operation that reads so many bytes of a set of `held`, and computes for `arithmetic` seconds at the
        peak.
        """
        missing = device.missing(held)
        near = max(reads / device.reads(min(held, device.caches["l3"] / 2)), arithmetic) / kernel.near
        far = max(reads / device.from_memory, arithmetic) / kernel.far + kernel.start * rows
        return self.overhead * kernel.fixed + kernel.edge * edges + (1 - missing) * near + missing * far


def _between(rows: tuple[Kernel, ...], m: int, at: object, grows: bool = True) -> Cost:
    """Seconds at `m` from the measured rows on either side of it; none where nothing was measured."""
    assert callable(at)
    if not rows:
        return Cost(0.0, 0.0, 0.0)
    i = bisect_left([k.m for k in rows], m)
    if i == len(rows):
        last = rows[-1]
        mid = at(last) * (m / last.m if grows else 1.0)
        return Cost(mid * last.low, mid, mid * last.high)
    right = rows[i]
    left = rows[max(0, i - 1)]
    t = 0.0 if right.m == left.m else (m - left.m) / (right.m - left.m)
    mid = (1 - t) * at(left) + t * at(right)
    return Cost(mid * min(left.low, right.low), mid, mid * max(left.high, right.high))
