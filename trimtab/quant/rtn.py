"""RTN: round to nearest, the baseline of every rounding method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Float, Int
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed
from trimtab.parts.grids import Power, Rule, grid_for, rotate


@dataclass(frozen=True)
class RTN(Solver):
    """Round every weight to the nearest value of its group's grid: q = clamp(round(w / s) + z), w ~ (q - z) s.

    Args:
        rule: how a group's range is chosen: `minmax` covers every weight, `mse` shrinks it to the least squared error.
        power: for scales that are powers of two: `floor` is the rule of the OCP formats, `ceil` never saturates.

    Reference: the baseline of Frantar et al. 2022, arXiv:2210.17323, section 5; the MX rule is OCP Microscaling Formats
        v1.0, section 6.3.
    Departures: none; the scales are rounded to what is stored before the weights are rounded against them.

    >>> import torch
    >>> weight = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))
    >>> RTN().solve(weight, Int(4, 32)).nbytes == Int(4, 32).bytes((16, 100))
    True
    """

    rule: Rule = "minmax"
    power: Power = "floor"

    card = Card(
        "rtn",
        claim="The baseline: needs no data, and loses to methods that look at the inputs.",
        requires=frozenset({"float"}),
        leaves=frozenset({"int"}),
        keeps=frozenset({"shape", "deterministic", "monotone"}),
        levels=("2b/g32", "3b/g64", "4b/row", "4b/g64", "mxfp4", "nvfp4", "mxfp6", "mxfp8", "mxint8", "8b/row"),
        kinds=frozenset({"linear", "head", "embedding", "conv"}),
    )

    def solve(self, weight: Tensor, level: Int | Float) -> Packed:
        """The weight `[out, in]` at an integer or minifloat level.

        Raises:
            UserError: the level is neither.
        """
        if not isinstance(level, Int | Float):
            raise UserError(f"rtn was asked for {level}; it takes integers and minifloats, like 4b/g64 or mxfp4")
        weight = rotate(weight.float(), level)
        grid = grid_for(weight, level, rule=self.rule, power=self.power)
        return grid.pack(grid.round(weight)[0], tuple(weight.shape))
