"""Kinetics: what a forward reads, weighed with the machine's intensity, is added to what it computes."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.core.device import Cost, Device, Work
from trimtab.core.errors import UserError
from trimtab.core.method import Card, Pricer
from trimtab.parts.counting import counted


@dataclass(frozen=True)
class Kinetics(Pricer):
    """Price a forward by its equivalent operations, those that it computes and those that could be computed while it
    reads:

        eFLOPs = C_comp + I C_mem,    seconds = eFLOPs / peak

    With the machine's own intensity, I = peak / bandwidth, that is operations / peak + (weights + cache) / bandwidth:
    neither hides behind the other, as products with weights and attention are mostly bound by one of them each.

    Fields:
        intensity: I, operations for each byte read (the paper: 562.5 of a B200); 0: the machine's own.
        cache: how keys and values are stored, as in `trimtab run --cache`; the paper's are in 16 bits.

    Args of `price`:
        work: one forward; device: a profile, as `trimtab bench` measures it.

    Raises:
        UserError: the profile has neither a level of the work nor fp32, there is no such cache, or the intensity is
            below zero.

    Reference: Sadhukhan et al. 2025, "Kinetics: Rethinking Test-Time Scaling Laws", arXiv:2506.05333, section 3.
    Departures: products and attention each count at the peak of the arithmetic that their kernels use, and the
        bandwidth is that of a set as large as what is read, since a processor has both several of either. Weights are
        read once a forward; the paper leaves them out, for so many sequences that they do not matter. An intensity that
        is given counts against the fp32 peak.

    >>> from trimtab.core.device import Kernel, Product
    >>> from trimtab.core.level import Dense
    >>> flat, row = ((1 << 20, 4e10), (1 << 28, 4e10)), Kernel("linear", "bf16", 1, "vnni", 0.0, 0.0, 0.5, 0.5)
    >>> device = Device("a", 2, 1 << 33, 2, "vnni", {"l3": 1 << 25}, flat, ((1 << 24, 0.0),), {"fp32": 1e12}, (row,))
    >>> work = Work((Product(Dense("bf16"), 1000, 1000),), batch=10)
    >>> [round(1e6 * method.price(work, device).mid, 3) for method in (Kinetics(), Kinetics(intensity=50.0))]
    [70.0, 120.0]
    """

    intensity: float = 0.0
    cache: str = "fp16"

    card = Card(
        "kinetics",
        catalogue=(159,),
        paper="arXiv:2506.05333",
        claim="Operations and reads weighed with the machine's intensity predict time better than operations alone.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"linear", "head", "embedding"}),
    )

    def price(self, work: Work, device: Device) -> Cost:
        """Seconds of one forward, and the most bytes that it holds."""
        if self.intensity < 0:
            raise UserError(f"an intensity of {self.intensity:g} operations a byte was asked for; give 0 or more")
        counts = counted(work, device, self.cache)
        read = counts.weight_bytes + counts.cache_bytes
        reading = self.intensity * read / device.limits["fp32"] if self.intensity else counts.reading
        seconds = counts.arithmetic + reading
        return Cost(seconds, seconds, seconds, counts.held_bytes)
