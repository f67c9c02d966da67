"""Long-context peak analysis: the four things that a long text makes dearer, from the bytes of its keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab.core.device import Cost, Device, Work
from trimtab.core.errors import UserError
from trimtab.core.method import Card, Pricer
from trimtab.formats.cache import CacheFormat
from trimtab.parts.counting import cached_bytes, counted


@dataclass(frozen=True)
class Effects:
    """What serving texts of one length costs at the peak.

    Fields:
        cache_bytes: keys and values of one text.
        prefill: seconds to read one text.
        users: texts that the memory holds at once beside the weights.
        decode: seconds to write a token of each sequence.
        switch: seconds to bring one text's keys and values out and another's in.
    """

    cache_bytes: int
    prefill: float
    users: int
    decode: float
    switch: float


@dataclass(frozen=True)
class LongContextPeak(Pricer):
    """Price a forward at the machine's peak, by arithmetic or by the bytes that it reads, whichever takes longer:

        seconds(forward) = max(operations / peak, (weights + cache) / bandwidth)

    and, for texts of L tokens whose keys and values take c(L) bytes, what `effects` says:

        prefill = seconds(L tokens)                   users = floor((memory - weights) / c(L))
        decode = seconds(1 token after L others)      switch = 2 c(L) / link

    Nothing is faster than the peak, and no spread is claimed: low, mid and high are equal.

    Fields:
        cache: how keys and values are stored, as in `trimtab run --cache`; the paper's are in 16 bits.
        memory: bytes for weights and caches, as the paper's 80 GB of a GPU; 0: the machine's.
        link: bytes a second between memory and where caches wait, as the paper's 20 GB/s of PCIe; 0: copying within the
            memory, as the profile measured it.

    Args of `price`:
        work: one forward; device: a profile, as `trimtab bench` measures it.

    Raises:
        UserError: the profile has neither a level of the work nor fp32, or there is no such cache.

    Reference: Fu 2024, "Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis",
        arXiv:2405.08944, sections 2 and 3.
    Departures: a processor's caches are a part of the machine, so the bandwidth is that of a set as large as what is
        read. Attention counts the tokens that a causal mask lets through. The paper's total of a session is left to the
        caller, who knows how many turns it has.

    >>> from trimtab.core.device import Heads, Kernel, Product
    >>> from trimtab.core.level import Dense
    >>> flat, row = ((1 << 20, 4e10), (1 << 28, 4e10)), Kernel("linear", "bf16", 1, "vnni", 0.0, 0.0, 0.5, 0.5)
    >>> limits = {"fp32": 1e12, "copy": 2e10}
    >>> device = Device("a", 2, 1 << 33, 2, "vnni", {"l3": 1 << 25}, flat, ((1 << 24, 0.0),), limits, (row,))
    >>> work = Work((Product(Dense("bf16"), 1000, 1000),) * 20, (Heads(8, 8, 64),) * 20, tokens=4000)
    >>> found = LongContextPeak().effects(work, device)
    >>> found.cache_bytes, found.users, round(found.decode, 5), round(found.switch, 4)
    (163840000, 52, 0.0051, 0.0328)
    """

    cache: str = "fp16"
    memory: int = 0
    link: float = 0.0

    card = Card(
        "long-context-peak",
        catalogue=(376,),
        paper="arXiv:2405.08944",
        claim="All that a long text costs more than a short one follows from the bytes of its keys and values.",
        keeps=frozenset({"deterministic"}),
        kinds=frozenset({"linear", "head", "embedding"}),
    )

    def price(self, work: Work, device: Device) -> Cost:
        """Seconds of one forward at the peak, and the most bytes that it holds."""
        counts = counted(work, device, self.cache)
        seconds = max(counts.arithmetic, counts.reading)
        return Cost(seconds, seconds, seconds, counts.held_bytes)

    def effects(self, work: Work, device: Device) -> Effects:
        """The four effects.

        Args:
            work: the reading of one text: `tokens` is its length. Tokens are then written for `batch` such texts.
            device: a profile.

        Raises:
            UserError: there is no speed of the link, or the weights alone fill the memory.
        """
        one = replace(work, batch=1, context=0)
        cache = cached_bytes(one, CacheFormat.parse(self.cache), work.tokens)
        memory, weights = self.memory or device.memory_bytes, work.weight_bytes + work.idle_bytes
        link = self.link or device.limits.get("copy", 0.0) / 2  # what is read and what is written both count there
        if link <= 0:
            raise UserError(f"the profile of {device.name} has no speed of copying; set `link` to bytes a second")
        if memory < weights:
            raise UserError(f"the weights take {weights} bytes and the memory has {memory}; set `memory` to more")
        return Effects(
            cache_bytes=cache,
            prefill=self.price(one, device).mid,
            users=(memory - weights) // max(1, cache),
            decode=self.price(replace(work, tokens=1, context=work.tokens), device).mid,
            switch=2 * cache / link,
        )
