"""AQT: every weight is trained through its rounding, and inputs are rounded as they will be when the result is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frozen
from trimtab.parts.trained_grid import OnGrid, grid_of


@dataclass(frozen=True)
class AQT(Wrapper):
    """y = t s Q(W / s) Q(x / t), Q(v) = round(v): W is trained; the scales are not, and follow what they scale.

    s = max|W| / (2^(b-1) - 1/2) of each group of weights, and t = max|x| / (2^(b-1) - 1) of each row of the inputs, or
    max x / (2^b - 1) where none is negative. The gradient goes past both roundings. What is trained is W less what it
    was, so that nothing moves before the first step; what comes out is one quantised matrix.

    Args:
        inputs: bits of the inputs; 0: as many as the weights (the paper's 4 or 8); 16: they are not rounded.

    Reference: Abdolrashidi et al. 2021, arXiv:2105.03536, sections 2 and 3.1; the authors' library, aqt/jax.
    Departures: inputs are scaled row by row by what they hold, as the authors' later library and the kernels here do;
        the paper fixes one bound a layer from statistics of the first steps. Weights use all codes, the authors'
        half shift. A level with zero points keeps these as they were found, and clips what goes beyond. Positive inputs
        are rounded to nearest, not down. Linears alone.

    >>> from trimtab.core.level import parse_level
    >>> layer, x = nn.Linear(64, 16), torch.randn(3, 64)
    >>> wrapped = AQT(inputs=16).wrap(layer, parse_level("4b/row/sym"))
    >>> _ = wrapped.b.data.normal_()
    >>> bool(torch.allclose(wrapped.merged()(x), wrapped(x), atol=1e-5)), wrapped.gain is None
    (True, True)
    """

    inputs: int = 0

    card = Card(
        "aqt",
        catalogue=(296,),
        paper="arXiv:2105.03536",
        claim="At equal cost of inference, bits counted, networks trained at 4 bits are above those of 16.",
        leaves=frozenset({"adapted", "trainable", "int"}),
        keeps=frozenset({"deterministic", "shape"}),
        levels=("4b/row/sym", "8b/row/sym", "4b/g64"),
    )

    def wrap(self, module: nn.Module, level: Any) -> nn.Module:
        """A linear whose matrix is trained on a grid.

        Raises:
            UserError: the level, or that of a packed module, has no 16-bit scales of integers; the inputs' bits are
                neither 0, 16 nor from 2 to 8.
        """
        if self.inputs not in (0, 16, *range(2, 9)):
            raise UserError(f"inputs={self.inputs} was asked for; inputs take 2 to 8 bits, 0 for the weights', or 16")
        base = Frozen(module)
        grid = grid_of("aqt", level if base.packed is None else base.packed.level)
        change = torch.zeros(base.out_features, base.in_features)
        return OnGrid(module, grid, b=change, inputs=self.inputs or grid.bits)
