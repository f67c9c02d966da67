"""MR-GPTQ: GPTQ for microscaling formats, with rotated blocks, fitted scales and a static column order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Float, Int
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed
from trimtab.parts.grids import Grid, Rule, grid_for, rotate, rotate_gram
from trimtab.parts.sweep import obs_sweep


@dataclass(frozen=True)
class MRGPTQ(Solver):
    """Rotate each block, fit its scale to the least squared error, and only then round columns as GPTQ does.

    1. W <- W R, H <- R H R with R block-diagonal, a Hadamard matrix for each scale group, at levels that end in `/h`;
       the run time rotates the activations, so that (X R)(W R)^T = X W^T.
    2. Scales, before any column is rounded: min over s_T, s_G of sum (w - s_T s_G Q(w / (s_T s_G)))^2. Where the format
       has a scale s_T for the matrix (NVFP4, NVINT4), s_G and s_T take turns: s_G by search over stored values,
       s_T = <w, s_G q> / <s_G q, s_G q>.
    3. The columns with the largest diagonal of H are rounded first, their errors spread as in GPTQ; scales stay with
       the original columns, so that blocks are neighbours in storage and nothing is permuted at run time.

    Args:
        damp: share of the mean diagonal of H that is added to it (paper's code: 0.01).
        rule: `mse` fits the scales (paper); `minmax` puts each block's largest weight on the largest magnitude.
        rounds: turns of s_G and s_T, at most.
        reorder: the columns of the largest inputs first (paper), else from left to right. Without it, with `minmax` and
            at a level without `/h`, this is plain GPTQ on the format.

    Reference: Egiazarian et al. 2025, arXiv:2509.23202, section 4 (the three ingredients) and appendix D (integers).
    Departures: for power-of-two scales the paper's code multiplies every scale by 4/3, which the OCP format cannot
        store; here each block takes the stored power of two of least squared error instead.

    >>> import torch
    >>> from trimtab.core.level import parse_level
    >>> rng = torch.Generator().manual_seed(0)
    >>> weight, x = torch.randn(16, 96, generator=rng), torch.randn(256, 96, generator=rng)
    >>> packed = MRGPTQ().solve(weight, parse_level("mxfp4/h"), gram=x.T @ x / 256)
    >>> packed.nbytes == parse_level("mxfp4/h").bytes((16, 96))
    True
    """

    damp: float = 0.01
    rule: Rule = "mse"
    rounds: int = 4
    reorder: bool = True

    card = Card(
        "mr-gptq",
        catalogue=(174,),
        paper="arXiv:2509.23202",
        claim="At MXFP4, perplexity below rounding to nearest and below plain GPTQ, and nearer to NVFP4's.",
        requires=frozenset({"float"}),
        leaves=frozenset({"int"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("mxint4/h", "mxfp4", "mxfp4/h", "nvfp4", "nvfp4/h", "nvint4/h", "mxfp6/h"),
        kinds=frozenset({"linear", "head", "conv"}),
    )

    def solve(self, weight: Tensor, level: Int | Float, *, gram: Tensor) -> Packed:
        """The weight `[out, in]` at an integer or minifloat level, given the gram `[in, in]` of its inputs.

        Raises:
            UserError: the level is neither, or the gram is not finite.
        """
        if not isinstance(level, Int | Float):
            raise UserError(f"mr-gptq was asked for {level}; it takes integers and minifloats, like mxfp4/h or nvfp4")
        weight, gram = rotate(weight.float(), level), rotate_gram(gram.float(), level)
        grid = grid_for(weight, level, rule=self.rule)
        if self.rule == "mse":
            self._take_turns(grid, weight)
        values = obs_sweep(
            weight,
            gram,
            lambda columns, j, u: grid.round(columns, j)[1],
            damp=self.damp,
            order="activation" if self.reorder else None,
        )
        return grid.pack(grid.round(values)[0], tuple(weight.shape))

    def _take_turns(self, grid: Grid, weight: Tensor) -> None:
        """Fit the scale of the matrix and the scales of the groups in turn, while the squared error falls."""
        if grid.matrix is None:
            return
        values = grid.round(weight)[1]
        error = (values - weight).square().sum()
        for _ in range(self.rounds):
            matrix, scale = grid.matrix, grid.scale.clone()
            grid.matrix = matrix * (weight * values).sum() / values.square().sum().clamp_min(1e-30)
            grid.refit(weight, 0)
            values = grid.round(weight)[1]
            now = (values - weight).square().sum()
            if not now < error:
                grid.matrix, grid.scale = matrix, scale
                return
            error = now
