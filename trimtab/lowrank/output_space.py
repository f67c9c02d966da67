"""The unified low-rank framework for click-through-rate models: factor a layer from its outputs, not its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Rank
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed, pack_rank
from trimtab.parts.factors import balanced, output_basis


@dataclass(frozen=True)
class UnifiedLowRank(Solver):
    """Project a layer's outputs on their principal components: W ~ U_k (U_k^T W), two thin layers.

    y = W x + b;  Cov(y) = W Cov(x) W^T = U S U^T;  y ~ U_k U_k^T (y - E y) + E y, that is
    W' = U_k (U_k^T W)  and  b' = b + (I - U_k U_k^T) W E[x].

    With a level such as `r16/bias`, U_k are components of the covariance and the second term of b' is stored. Without
    the bias, the components are those of the second moment of y - b, then the best choice for the squared output error.

    Fields:
        damp: share of the mean diagonal added to the inputs' moment; it orders directions that no sample has seen by
            the weight.

    Reference: Yu et al. 2024, arXiv:2405.18146, section 3 (atomic feature mimicking: Yu and Wu, AAAI 2023).
    Departures: moments of the outputs are computed from those of the inputs, which is the same sum without a second
        pass. Embedding tables have no inputs to collect moments of and are left to other methods. The paper fine-tunes
        afterwards; that is a step apart.

    >>> x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 9, 1, 1, 1, 1, 1, 1])
    >>> weight = torch.eye(8)
    >>> packed = UnifiedLowRank().solve(weight, Rank(2), gram=x.T @ x / 256, mean=x.mean(0))
    >>> packed.dense().diagonal().round().int().tolist()
    [1, 1, 0, 0, 0, 0, 0, 0]
    """

    damp: float = 1e-6

    card = Card(
        "output-space",
        catalogue=(347,),
        paper="arXiv:2405.18146",
        claim="At equal rank, factors from the outputs lose less quality than the truncated SVD of the weight.",
        requires=frozenset({"float"}),
        leaves=frozenset({"factored"}),
        keeps=frozenset({"shape", "deterministic", "monotone"}),
        levels=("r4", "r16", "r16/bias", "r64", "r64/bias"),
        kinds=frozenset({"linear", "head", "conv"}),
    )

    def solve(self, weight: Tensor, level: Rank, *, gram: Tensor, mean: Tensor) -> Packed:
        """The factors of `weight [out, in]` at a rank, and the bias `[out]` where the level stores one.

        Raises:
            UserError: the level is no rank.
        """
        if not isinstance(level, Rank):
            raise UserError(f"output-space was asked for {level}; it takes ranks, like r16 or r16/bias")
        moment = gram - torch.outer(mean, mean) if level.bias else gram
        basis = output_basis(weight, moment, min(level.rank, *weight.shape), self.damp)
        wide = weight.double()
        inner = basis.T @ wide
        left, right = balanced(basis, inner, level.rank)
        bias = None
        if level.bias:
            bias = (wide - basis @ inner) @ mean.double()
        return pack_rank(left, right, bias, level, tuple(weight.shape))
