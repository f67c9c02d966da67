"""Block formats side by side: MXINT8, MXFP8, MXFP6, MXFP4, MXINT4, NVFP4 and NVINT4, cast directly, rotated or not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from trimtab.core.errors import UserError
from trimtab.core.level import Float, Int
from trimtab.core.method import Card, Solver
from trimtab.formats.minifloat import magnitudes
from trimtab.formats.packed import Packed, store_scale
from trimtab.parts.grids import Grid, rotate


@dataclass(frozen=True)
class BlockFormat(Solver):
    """Cast each block of a weight to integers or minifloats under one stored scale, set by the block's largest value.

    Xq = clip(round(X / s'), Qmin, Qmax) s' for integers, the nearest element of the minifloat's set for floats, with
    s = max|X| / Qmax in each block and s' what storage holds of it: for `e8m0` scales the power of two at or above it,
    2**ceil(log2 s), so that nothing is clipped; for `e4m3` scales the nearest FP8 value under one scale for the matrix.
    Qmax is the largest magnitude of the element: 448 (E4M3), 7.5 (E2M3), 6 (E2M1), 127 (INT8), 7 (INT4). Levels that
    end in `/h` rotate each block with a Hadamard matrix first.

    Args:
        symmetric_clip: integers stay within -Qmax .. Qmax, as in the paper; if False they may use the one more negative
            code of two's complement, Qmin = -Qmax - 1, which biases gradients in training.

    Reference: Chen et al. 2025, arXiv:2510.25602, section 3.2, eq. 1-3, 7 and 9; Qmax from table 1.
    Departures: casts weights only; the paper casts activations and gradients too.

    >>> import torch
    >>> from trimtab.core.level import parse_level
    >>> weight = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    >>> int8, fp8 = (BlockFormat().solve(weight, parse_level(text)).dense() for text in ("mxint8", "mxfp8"))
    >>> bool((int8 - weight).norm() < (fp8 - weight).norm())
    True
    """

    symmetric_clip: bool = True

    card = Card(
        "block-format",
        catalogue=(162,),
        paper="arXiv:2510.25602",
        claim="MXINT8 is nearer the weights than MXFP8, MXFP4 than MXINT4; rotated, NVINT4 is nearer than NVFP4.",
        requires=frozenset({"float"}),
        leaves=frozenset({"int"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("mxint4", "mxfp4", "nvint4/h", "nvfp4", "mxfp6", "mxfp8", "mxint8"),
        kinds=frozenset({"linear", "conv", "head", "embedding"}),
    )

    def solve(self, weight: Tensor, level: Int | Float) -> Packed:
        """The weight `[out, in]` cast to the level.

        Raises:
            UserError: the level is neither of minifloats nor of symmetric integers of two bits or more.
        """
        if isinstance(level, Float):
            top = float(magnitudes(level.e, level.m)[-1])
        elif isinstance(level, Int) and level.symmetric and level.bits > 1:
            top = float((1 << (level.bits - 1)) - 1)
        else:
            takes = "minifloats and symmetric integers of two bits or more, like mxfp4 or mxint8"
            raise UserError(f"block-format was asked for {level}; it takes {takes}")
        weight = rotate(weight.float(), level)
        cols = weight.shape[1]
        group = level.group or cols
        largest = pad(weight, (0, -cols % group)).reshape(weight.shape[0], -1, group).abs().amax(2)
        scale, stored = store_scale(largest / top, level.scale)
        grid = Grid(level, cols, "minmax", "ceil", scale, None, stored.get("matrix_scale"))
        codes = grid.round(weight)[0]
        if isinstance(level, Int) and self.symmetric_clip:
            codes = codes.clamp_min(1)  # code 0 stands for -Qmax - 1
        return grid.pack(codes, tuple(weight.shape))
