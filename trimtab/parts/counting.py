"""What a forward computes and reads, counted from its shapes, and the least seconds that either takes on a machine."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trimtab.core.device import Device, Work
from trimtab.core.errors import UserError
from trimtab.core.level import Dense
from trimtab.formats.cache import CacheFormat


@dataclass(frozen=True)
class Counts:
    """One forward.

    Fields:
        operations: multiplications and additions of all products and of attention.
        weight_bytes, cache_bytes: read of weights, and of the keys and values of all sequences.
        held_bytes: the most bytes held, see `Work.held_bytes`, with the cache as it is stored.
        arithmetic: seconds of the operations, each at the peak of its kind.
        reading: seconds of the bytes, at the bandwidth of a set that large.
    """

    operations: float
    weight_bytes: int
    cache_bytes: int
    held_bytes: int
    arithmetic: float
    reading: float


def counted(work: Work, device: Device, cache: str = "fp16") -> Counts:
    """Count a forward.

    A level that the profile has not is unpacked to fp32, and counted so.

    Args:
        cache: how keys and values are stored, see `formats.cache`.

    Raises:
        UserError: the profile has neither a level of the work nor fp32, or there is no such cache.
    """
    stored = CacheFormat.parse(cache)
    new, tokens = work.batch * work.tokens, work.context + work.tokens
    operations = arithmetic = 0.0
    weight_bytes = 0
    for product in work.products:
        if not device.kernel("linear", str(product.level)):
            if not device.kernel("linear", "fp32"):
                raise UserError(
                    f"the profile of {device.name} has neither level {product.level} nor fp32; measure again with "
                    "`trimtab bench`"
                )
            product = replace(product, level=Dense("fp32"))
        inputs = work.batch if product.last else new
        done = float(inputs * product.level.flops((product.rows, product.cols)))
        operations += done
        arithmetic += done / device.peak(product.level)
        weight_bytes += product.bytes
    # each new token reads the keys and values before it and, on average, half of those that are new
    seen = work.context + (work.tokens + 1) / 2
    mixed = sum(4.0 * a.heads * a.size * seen * new for a in work.attentions)
    cache_bytes = cached_bytes(work, stored, tokens)
    return Counts(
        operations=operations + mixed,
        weight_bytes=weight_bytes,
        cache_bytes=cache_bytes,
        held_bytes=_held(work, stored, tokens),
        arithmetic=arithmetic + mixed / device.limits["fp32"],
        reading=_seconds(weight_bytes + cache_bytes, work.around or 0, device),
    )


def cached_bytes(work: Work, stored: CacheFormat, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens of every sequence; of a cache that is not packed only those of the
    tokens that are there, and not of the room to the next whole block.
    """
    width = CacheFormat(stored.dtype).bytes(1, 32, 64) // 64
    if stored.method:
        return sum(stored.bytes(a.kv_heads, a.size, tokens, work.batch) for a in work.attentions)
    return sum(work.batch * tokens * a.kv_heads * a.size * width // 32 for a in work.attentions)


def _held(work: Work, stored: CacheFormat, tokens: int) -> int:
    without = replace(work, attentions=tuple(replace(a, kv_heads=0) for a in work.attentions))
    cache = sum(stored.bytes(a.kv_heads, a.size, tokens, work.batch) for a in work.attentions)
    return without.held_bytes + cache


def _seconds(count: int, around: int, device: Device) -> float:
    """Of reading so many bytes again and again, of a set that has others around them: some of the last cache, the rest
    from memory.
    """
    whole = count + around
    missing = device.missing(whole)
    near = device.reads(min(whole, device.caches["l3"] / 2))
    return count * ((1 - missing) / near + missing / device.from_memory)
