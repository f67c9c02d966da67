"""ZeroQuant-V2 (LoRC): a rounded weight and a low-rank matrix that makes good its error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Int, Plus
from trimtab.core.method import Card, Solver
from trimtab.formats.packed import Packed, pack_plus, pack_rank
from trimtab.parts.factors import truncated_svd
from trimtab.quant.gptq import GPTQ
from trimtab.quant.rtn import RTN


@dataclass(frozen=True)
class ZeroQuantV2(Solver):
    """Low-rank compensation: round W to W^, take the SVD of the error E = W - W^ = U S V, add its rank-m part.

    What is stored beside W^ is U_m S_m^(1/2) and S_m^(1/2) V_m.

    Args:
        inner: how the weight is rounded: `rtn` or `gptq` (the paper tries both and ZeroQuant's own).
        metric: `plain` takes the best approximation of E (paper); `gram` that of E X^T, the error of the outputs.

    Reference: Yao et al. 2023, arXiv:2303.08302, section 5 (low rank compensation).
    Departures: the factors are kept in 16 bits, where the paper also rounds them to 8; `metric="gram"` is not in the
        paper. The statistic is asked for with `inner="rtn"` too, which has no use for it under the plain metric.

    >>> from trimtab.core.level import Rank
    >>> rng = torch.Generator().manual_seed(0)
    >>> weight, level = torch.randn(32, 64, generator=rng), Plus(Int(3, 32), Rank(8))
    >>> packed = ZeroQuantV2().solve(weight, level, gram=torch.eye(64))
    >>> base = RTN().solve(weight, level.base)
    >>> packed.nbytes - base.nbytes, bool((packed.dense() - weight).norm() < (base.dense() - weight).norm())
    (1536, True)
    """

    inner: Literal["rtn", "gptq"] = "gptq"
    metric: Literal["plain", "gram"] = "plain"

    card = Card(
        "zeroquant-v2",
        catalogue=(355,),
        paper="arXiv:2303.08302",
        claim="Rank 8 on top of RTN or GPTQ at 4 bits lowers perplexity for a small increase in size.",
        requires=frozenset({"float"}),
        leaves=frozenset({"int", "factored"}),
        keeps=frozenset({"shape", "deterministic"}),
        levels=("2b/g32+r8", "3b/g64+r8", "4b/row+r8", "4b/g64+r8"),
        kinds=frozenset({"linear", "head"}),
    )

    def solve(self, weight: Tensor, level: Plus, *, gram: Tensor) -> Packed:
        """The weight `[out, in]` as integers and two factors, given the gram `[in, in]` of its inputs.

        Raises:
            UserError: the level is not integers and a rank, or a field has an unknown value.
        """
        if not isinstance(level, Plus) or not isinstance(level.base, Int) or level.extra.bias:
            raise UserError(f"zeroquant-v2 was asked for {level}; it takes integers and a plain rank, like 4b/g64+r8")
        if self.inner not in ("rtn", "gptq") or self.metric not in ("plain", "gram"):
            found = f"inner={self.inner!r}, metric={self.metric!r}"
            raise UserError(f"zeroquant-v2 was given {found}; inner is rtn or gptq, metric is plain or gram")
        weight, gram = weight.float(), gram.float()
        base = RTN().solve(weight, level.base) if self.inner == "rtn" else GPTQ().solve(weight, level.base, gram=gram)
        error, rank = weight - base.dense(), level.extra.rank
        if self.metric == "plain":
            left, right = truncated_svd(error, rank)
        else:
            damped = gram + (1e-4 * gram.diagonal().mean() + torch.finfo(torch.float32).tiny) * torch.eye(len(gram))
            root = torch.linalg.cholesky(damped.double())  # gram = root root^T: |E root| is the error of the outputs
            left, right = truncated_svd(error.double() @ root, rank)
            right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
        return pack_plus(base, pack_rank(left, right, None, level.extra, tuple(weight.shape)), level)
