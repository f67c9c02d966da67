"""Packed weights as the compiled kernels hold them: one table from the kind of level to the operation that runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trimtab.core.level import Float, Int, Level
from trimtab.formats.packed import Packed
from trimtab.kernels.integer.pack import grouped
from trimtab.kernels.native import native

# A maker takes the compiled kernels and matrices of one level and equal columns, to be stacked one below the other; it
# returns None where it cannot run them, or several of them.
MAKERS: dict[type[Level], Callable[[Any, Sequence[Packed]], Any | None]] = {Int: grouped, Float: grouped}


def kernel_weight(*parts: Packed) -> Any | None:
    """The packed matrix `[out, in]` interleaved for the kernels; None where no kernel runs its level here.

    Several matrices that read the same inputs (q, k, v; gate, up) become one, with their rows one below the other.
    """
    module, maker = native(), MAKERS.get(type(parts[0].level))
    return maker(module, parts) if module is not None and maker is not None else None
