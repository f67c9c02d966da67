"""GPTQ: round a weight column by column, the later columns making good the error of the earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Int
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed
from trimtab.parts.grids import Rule, grid_for, rotate, rotate_gram
from trimtab.parts.sweep import obs_sweep


@dataclass(frozen=True)
class GPTQ(Solver):
    """Round column j, then spread its error onto the columns to come: W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:].

    H = 2 X X^T is here gram = X^T X / n (the factor cancels), H^-1 = U^T U. The grid of a group is fitted when the
    sweep reaches it, to weights that already carry the errors of the columns before.

    Args:
        damp: share of the mean diagonal of H that is added to it (paper: 0.01).
        order: None takes the columns from left to right; `activation` those with the largest diagonal of H first,
            against grids fitted to the original weights, so that groups stay neighbours in storage.
        rule: how a group's range is chosen: `minmax` (paper) or `mse`.

    Reference: Frantar et al. 2022, arXiv:2210.17323, section 3, equations 2 to 4 and algorithm 1.
    Departures: the inverse of H is never formed (see `trimtab.parts.sweep.obs_sweep`); inputs that are always zero keep
        weights rounded to nearest, where the paper's code sets them to zero.

    >>> import torch
    >>> rng = torch.Generator().manual_seed(0)
    >>> weight, x = torch.randn(16, 96, generator=rng), torch.randn(256, 96, generator=rng)
    >>> GPTQ().solve(weight, Int(3, 32), gram=x.T @ x / 256).nbytes == Int(3, 32).bytes((16, 96))
    True
    """

    damp: float = 0.01
    order: Literal["activation"] | None = None
    rule: Rule = "minmax"

    card = Card(
        "gptq",
        catalogue=(165,),
        paper="arXiv:2210.17323",
        claim="Perplexity below round-to-nearest at 4 and 3 bits and equal groups, the gap widening at fewer bits.",
        requires=frozenset({"float"}),
        leaves=frozenset({"int"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("2b/g32", "3b/g64", "4b/row", "4b/g64/sym", "4b/g64", "8b/row"),
        kinds=frozenset({"linear", "head", "conv"}),
    )

    def solve(self, weight: Tensor, level: Int, *, gram: Tensor) -> Packed:
        """The weight `[out, in]` at an integer level, given the gram `[in, in]` of its inputs.

        Raises:
            UserError: the level is not of integers, a field has an unknown value, or the gram is not finite.
        """
        if not isinstance(level, Int):
            raise UserError(f"gptq was asked for {level}; it takes integers, like 4b/g64 or 3b/row")
        if self.order not in (None, "activation"):
            raise UserError(f"gptq was given order={self.order!r}; it is None or 'activation'")
        weight, gram = rotate(weight.float(), level), rotate_gram(gram.float(), level)
        grid = grid_for(weight, level, rule=self.rule)
        refits = level.group is not None and self.order is None
        values = obs_sweep(
            weight,
            gram,
            lambda columns, j, u: grid.round(columns, j)[1],
            begin=(lambda columns, j, d: grid.refit(columns, j)) if refits else None,
            span=level.group if refits else None,
            damp=self.damp,
            order=self.order,
        )
        return grid.pack(grid.round(values)[0], tuple(weight.shape))
