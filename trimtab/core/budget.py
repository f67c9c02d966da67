"""Budgets with units: what the result may cost, and what it must keep."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal

from trimtab.core.errors import UserError

_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*([a-z%/]*)\s*", re.IGNORECASE)


def _parse(what: str, text: str | float, units: dict[str, float], example: str) -> float:
    match = _NUMBER.fullmatch(str(text))
    unit = match[2].lower() if match else ""
    if not match or unit not in units:
        reason = (
            "is not a positive number with a unit"
            if not match
            else f"has the unit {match[2]!r}"
            if match[2]
            else "has no unit"
        )
        raise UserError(
            f"{what} {str(text)!r} {reason}; write it like {example} (units: {', '.join(u for u in units if u)})"
        )
    try:
        value = float(Decimal(match[1]) * Decimal(str(units[unit])))  # as written: 99.9% is 0.999 and no bit more
    except ArithmeticError:
        value = math.inf
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"{what} {str(text)!r} is not a positive finite number; write it like {example}")
    return value


def parse_bytes(text: str | float, what: str = "size") -> int:
    """Bytes from a text with a unit.

    >>> parse_bytes("1.005GB"), parse_bytes("2 GiB")
    (1005000000, 2147483648)
    """
    return int(_parse(what, text, _BYTES, "60MB or 1.2GB"))  # type: ignore[arg-type]


def parse_seconds(text: str | float, what: str = "latency") -> float:
    """Seconds from a text with a unit.

    >>> parse_seconds("15ms")
    0.015
    """
    return _parse(what, text, _SECONDS, "15ms")


def parse_share(text: str | float, what: str = "quality") -> float:
    """A share of one from a percentage, or from a plain number up to one.

    >>> parse_share("99.9%"), parse_share(0.9)
    (0.999, 0.9)
    """
    value = _parse(what, text, {"%": 0.01, "": 1.0}, "98%")
    if value > 1:
        raise UserError(f"{what} {str(text)!r} is above the original's; write a share up to 100%, like 98%")
    return value


def say_bytes(count: float) -> str:
    """Bytes for a reader.

    >>> say_bytes(1_532_000), say_bytes(980)
    ('1.53 MB', '980 B')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


@dataclass(frozen=True)
class Budget:
    """What the result may cost and what it must keep; None where there is no limit.

    Fields:
        size: bytes on disk of the artifact: weights, configuration, tokenizer.
        memory: peak bytes of a run at the stated context and batch, above those of an idle process.
        latency: seconds for one item on this machine: of text, a prompt read up to its next token.
        quality: least share of the original's metric.
    """

    size: int | None = None
    memory: int | None = None
    latency: float | None = None
    quality: float | None = None

    @staticmethod
    def of(
        size: str | int | None = None,
        memory: str | int | None = None,
        latency: str | float | None = None,
        quality: str | float | None = None,
    ) -> Budget:
        """A budget from texts with units; plain numbers are bytes, seconds and shares.

        >>> Budget.of(size="2MB", quality="98%")
        Budget(size=2000000, memory=None, latency=None, quality=0.98)
        """
        return Budget(
            *(_bytes(size, "size"), _bytes(memory, "memory")),
            None if latency is None else parse_seconds(f"{latency}s" if isinstance(latency, int | float) else latency),
            None if quality is None else parse_share(quality),
        )

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {k: v for k, v in self.__dict__.items() if v is not None}


def _bytes(value: str | int | None, what: str) -> int | None:
    return None if value is None else parse_bytes(f"{value}B" if isinstance(value, int) else value, what)
