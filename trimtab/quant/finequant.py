"""FineQuant: round to nearest, with groups as coarse as each matrix allows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Int
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed
from trimtab.parts.grids import extents, grid_for


@dataclass(frozen=True)
class FineQuant(Solver):
    """Halve a matrix's groups, from whole rows on, while that still narrows the ranges to cover; then round to nearest.

    With r(g) the mean over all groups of g columns of max(w, 0) - min(w, 0) (of max |w| for symmetric levels), go from
    g to g / 2 while r(g / 2) < (1 - alpha) r(g). Outliers, which would spoil a coarse group, halve the ranges of the
    groups that they leave; a matrix without them stays coarse and saves the scales.

    The level's group is the finest allowed: the sizes tried are the row, then the level's group times powers of two
    (those that divide the row, if the level's group does). What is returned is at the level chosen: never more bytes
    than the level asked for.

    Args:
        alpha: least share by which the mean range must fall for groups to be halved. For normal weights it falls by
            8 % (256 columns to 128) to 15 % (32 to 16); what lies above speaks of outliers.

    Reference: Kim, Henry, Fahim and Awadalla 2023, arXiv:2308.09723, section on adaptive fine-grained quantisation.
    Departures: the mean as the measure of the ranges and the value of `alpha` are choices of ours. One size a matrix,
        as there. The group is bounded below by the level. Zero points are kept unless the level is symmetric.

    >>> import torch
    >>> weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    >>> str(FineQuant().solve(weight, Int(4, 32)).level)
    '4b/row'
    >>> weight[:, ::64] *= 20
    >>> str(FineQuant().solve(weight, Int(4, 32)).level)
    '4b/g32'
    """

    alpha: float = 0.15

    card = Card(
        "finequant",
        catalogue=(356,),
        paper="arXiv:2308.09723",
        claim="Perplexity below whole rows at 4 bits, near that of the finest groups, with fewer bytes of scales.",
        requires=frozenset({"float"}),
        leaves=frozenset({"int"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("3b/g32", "4b/g64", "4b/g32", "8b/g64"),
        kinds=frozenset({"linear", "head", "embedding", "conv"}),
    )

    def solve(self, weight: Tensor, level: Int) -> Packed:
        """The weight `[out, in]` at the level's bits, in groups no finer than the level's.

        Raises:
            UserError: the level is not of integers, or rotates its groups.
        """
        if not isinstance(level, Int) or level.hadamard:
            raise UserError(f"finequant was asked for {level}; it takes integers without a rotation, like 4b/g32")
        weight = weight.float()
        chosen = replace(level, group=self._group(weight, level))
        grid = grid_for(weight, chosen)
        return grid.pack(grid.round(weight)[0], tuple(weight.shape))

    def _group(self, weight: Tensor, level: Int) -> int | None:
        cols = weight.shape[1]
        sizes, size = [], level.group or cols
        while size < cols:
            sizes.append(size)
            size *= 2
        if sizes and cols % sizes[0] == 0:
            sizes = [s for s in sizes if cols % s == 0]
        group, mean = None, extents(weight, level, None).mean()
        for finer in reversed(sizes):
            narrower = extents(weight, level, finer).mean()
            if narrower >= (1 - self.alpha) * mean:
                break
            group, mean = finer, narrower
        return group
