"""A site is one place in a model where something can be done."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

Kind = Literal[
    "linear", "conv", "embedding", "head", "channels", "block", "sublayer", "experts", "kv", "tokens", "states", "link"
]


@dataclass(frozen=True)
class Site:
    """One place in a model where something can be done.

    Fields:
        path: the module's path, as `named_modules` gives it; the name under which plans and reports speak of the site.
        kind: what sort of place it is.
        shape: shape of the weight as methods see it: `(out, in)` for a linear, head or embedding, `(out, in / groups,
            kh, kw)` for a convolution; `()` where there is no single weight.
        block: index of the repeated block that holds the site, or None outside the blocks.
        role: what the site does (`q`, `k`, `v`, `o`, `gate`, `up`, `down`, `embed`, `lm_head`, `conv`, ...).
        transposed: the module stores its weight as `(in, out)`, as GPT-2's Conv1D does; methods still see `(out, in)`.
        groups: groups of a convolution.
        reuse: how many times one forward of one sample uses the weight (positions of a convolution; 1 a token else).
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    block: int | None = None
    role: str = "other"
    transposed: bool = False
    groups: int = 1
    reuse: int = 1

    @property
    def weights(self) -> int:
        """Number of scalars in the weight."""
        return prod(self.shape) if self.shape else 0
