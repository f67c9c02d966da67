"""Minifloats of 3 to 8 bits after training: one scale a channel or group, and rounding that keeps the mean output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Float
from trimtab.core.method import Card, Solver
from trimtab.formats.minifloat import magnitudes
from trimtab.formats.packed import Packed, spread
from trimtab.parts.grids import Rule, grid_for, rotate, rotate_gram


@dataclass(frozen=True)
class Minifloat(Solver):
    """Round to a sign, e exponent and m mantissa bits under a scale, and take the mean error of each output away.

    q = s * nearest(w / s, the minifloat's values), with s by squared error or from max|w|; subnormals included, values
    beyond the largest saturate. Bias correction subtracts the mean error E[(q - w) x] = (q - w) mean from each output.
    Here the weights do it: roundings of a row are turned to the neighbouring value on the other side of w, cheapest
    first, until the expected squared error of the output, ((q - w) mean)^2 + sum_j (q_j - w_j)^2 var_j, is least.

    Args:
        rule: how the scale is chosen: `mse`, or `minmax` with the largest weight on the largest magnitude.
        correct: turn roundings to correct the mean (paper: bias correction on).

    Reference: Aggarwal et al. 2023, arXiv:2311.12359, section III (minifloats, and the techniques applied to them);
        bias correction after Nagel et al. 2019, arXiv:1906.04721, section 4.2.
    Departures: the mean is corrected by rounding, for the level stores no bias; inputs are taken as uncorrelated about
        their means. Weights only. Equalisation, SmoothQuant, learned rounding and GPTQ, which the paper also tries on
        minifloats, are methods of their own.

    >>> rng = torch.Generator().manual_seed(0)
    >>> weight, x = torch.randn(16, 100, generator=rng), torch.rand(256, 100, generator=rng)
    >>> packed = Minifloat().solve(weight, Float(2, 1), gram=x.T @ x / 256, mean=x.mean(dim=0))
    >>> packed.nbytes == Float(2, 1).bytes((16, 100))
    True
    """

    rule: Rule = "mse"
    correct: bool = True

    card = Card(
        "minifloat",
        catalogue=(367,),
        paper="arXiv:2311.12359",
        claim="At three to five bits a channel-wise minifloat loses less than an integer of equal bytes.",
        requires=frozenset({"float"}),
        leaves=frozenset({"int"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("e1m1/row", "e2m1/row", "e2m1/g32", "e2m2/row", "e3m2/row", "e2m3/row", "e3m4/row", "e4m3/row"),
        kinds=frozenset({"linear", "conv", "head"}),
    )

    def solve(self, weight: Tensor, level: Float, *, gram: Tensor, mean: Tensor) -> Packed:
        """The weight `[out, in]` at a minifloat level, given the gram `[in, in]` and the mean `[in]` of its inputs.

        Raises:
            UserError: the level is not of minifloats.
        """
        if not isinstance(level, Float):
            raise UserError(f"minifloat was asked for {level}; it takes minifloats, like e2m1/row or e3m2/g32")
        weight = rotate(weight.float(), level)
        grid = grid_for(weight, level, rule=self.rule)
        codes, values = grid.round(weight)
        if self.correct:
            mean, square = rotate(mean[None], level)[0], rotate_gram(gram, level).diagonal()
            scale = spread(grid.scale, level.group, weight.shape[1])
            codes = _correct(weight, codes, values, scale, mean, (square - mean.square()).clamp_min(0), level)
        return grid.pack(codes, tuple(weight.shape))


def _correct(
    weight: Tensor, codes: Tensor, values: Tensor, scale: Tensor, mean: Tensor, variance: Tensor, level: Float
) -> Tensor:
    """Codes with the cheapest roundings of each row turned, as many as lower the row's expected squared error most."""
    table = magnitudes(level.e, level.m)
    sign, code = codes >> (level.e + level.m), codes & ((1 << (level.e + level.m)) - 1)
    other = torch.where(weight.abs() > values.abs(), code + 1, (code - 1).abs())
    turned = torch.where(sign == 1, -scale, scale) * table[other.clamp_max(len(table) - 1)]
    shift = (turned - values) * mean
    noise = ((turned - weight).square() - (values - weight).square()) * variance
    start = ((values - weight) * mean).sum(dim=1, keepdim=True)
    useful = (shift * start < 0) & (other < len(table))
    order = (noise / shift.abs()).where(useful, torch.inf).argsort(dim=1)
    zero = torch.zeros_like(start)
    shifts, noises = (
        torch.cat((zero, x.where(useful, 0).gather(1, order).cumsum(dim=1)), dim=1) for x in (shift, noise)
    )
    turns = ((start + shifts).square() + noises).argmin(dim=1, keepdim=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(weight.shape[1]).expand_as(order))
    return torch.where(useful & (rank < turns), sign << (level.e + level.m) | other, codes)
