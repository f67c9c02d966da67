"""Packed weights as the compiled kernels hold them: one table from the kind of level to the operation that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trimtab.core.level import Level
from trimtab.formats.packed import Packed
from trimtab.kernels.native import native

MAKERS: dict[type[Level], Callable[[Any, Sequence[Packed]], Any]] = {}


def kernel_weight(*parts: Packed) -> Any | None:
    """The packed matrix `[out, in]` interleaved for the kernels; None where no kernel runs its level here."""
    module, maker = native(), MAKERS.get(type(parts[0].level))
    return maker(module, parts) if module is not None and maker is not None else None
