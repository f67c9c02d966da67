"""SparseGPT: prune in one shot, the weights that stay making good what goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import NM, Sparse
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed
from trimtab.parts.scores import keep_nm, keep_top, pack_kept
from trimtab.parts.sweep import obs_sweep


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Sweep the columns as GPTQ does, where what stands in a column is the weight itself or zero.

    At the start of each block of `mask_block` columns (for n:m levels: of each m columns) the weights with the smallest
    w^2 / [H^-1]_jj, the error that their removal would cost, are marked for removal, on weights that already make good
    the columns before; [H^-1]_jj, with all columns before j fixed, is U_jj^2. Then each column in turn loses its marked
    weights, and W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:].

    Args:
        damp: share of the mean diagonal of H that is added to it (paper: 0.01).
        mask_block: columns B_s whose mask is chosen at once (paper: 128).

    Reference: Frantar and Alistarh 2023, arXiv:2301.00774, section 3, algorithm 1; section 3.5 for n:m.
    Departures: a block's share of removals is taken from each row, not from the block over all rows, because the level
        keeps the same number in each row; the numbers for the blocks add up to the row's exactly.

    >>> rng = torch.Generator().manual_seed(0)
    >>> weight, x = torch.randn(16, 96, generator=rng), torch.randn(256, 96, generator=rng)
    >>> packed = SparseGPT().solve(weight, NM(2, 4), gram=x.T @ x / 256)
    >>> int((packed.dense() != 0).sum()) == NM(2, 4).kept((16, 96))
    True
    """

    damp: float = 0.01
    mask_block: int = 128

    card = Card(
        "sparsegpt",
        paper="arXiv:2301.00774",
        claim="Perplexity below magnitude pruning at 50 % and 2:4, and below Wanda at higher sparsity.",
        requires=frozenset({"float"}),
        leaves=frozenset({"sparse"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("70%", "60%", "2:4", "50%", "30%"),
        kinds=frozenset({"linear", "head", "conv"}),
    )

    def solve(self, weight: Tensor, level: Sparse | NM, *, gram: Tensor) -> Packed:
        """The weight `[out, in]` at a sparsity level, given the gram `[in, in]` of its inputs.

        Raises:
            UserError: the level is not of sparsity, or the gram is not finite.
        """
        if not isinstance(level, Sparse | NM):
            raise UserError(f"sparsegpt was asked for {level}; it takes levels like 50% or 2:4")
        # an input that is always zero has nothing to say: its weights go first
        weight = weight.float().masked_fill(gram.diagonal() <= 0, 0.0)
        rows, cols = weight.shape
        removed = cols - level.kept((rows, cols)) // rows
        mask = torch.empty(rows, cols, dtype=torch.bool)

        def begin(columns: Tensor, j: int, d: Tensor) -> None:
            score, end = (columns / d).square(), j + columns.shape[1]
            if isinstance(level, NM):
                mask[:, j:end] = keep_nm(score, level.n, level.m)
            else:
                mask[:, j:end] = keep_top(score, end - j - (removed * end // cols - removed * j // cols))

        values = obs_sweep(
            weight,
            gram,
            lambda columns, j, u: columns * mask[:, j : j + columns.shape[1]],
            begin=begin,
            span=level.m if isinstance(level, NM) else self.mask_block,
            damp=self.damp,
        )
        return pack_kept(values, mask, level)
