"""LoRA-GA: factors that begin along the gradient, so that the first step is full fine-tuning's as nearly as may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.lowrank_delta import LowRank, rank_of, scale_of


@dataclass(frozen=True)
class LoRAGA(Wrapper):
    """G = dL/dW0 = U S V^T; A = c V[:, :r]^T, B = c U[:, r:2r], c = out^(1/4) / sqrt(gamma); W0 is shifted by -s B A.

    The first step changes W by -lr s^2 (B B^T G + G A^T A): with disjoint blocks of singular vectors that is the best
    approximation of G of rank 2r. The shift keeps the function as it was.

    Args:
        alpha: scale of the product (paper: 16), divided as `scaling` says.
        gamma: constant of the stable scale (paper: 16; larger begins smaller).
        scaling: `root` as the paper has it, or `rank`.

    Reference: Wang et al. 2024, arXiv:2407.05000, theorem 3.1, sections 3.2 and 3.3, algorithm 1.
    Departures: the shift is held as two frozen factors beside the matrix, which stays shared and may be packed.

    >>> from trimtab.core.level import Rank
    >>> layer, x = nn.Linear(32, 16), torch.randn(9, 32)
    >>> wrapped = LoRAGA().wrap(layer, Rank(4), grad=torch.randn(16, 32))
    >>> bool(torch.allclose(wrapped(x), layer(x), atol=1e-4))
    True
    """

    alpha: float = 16.0
    gamma: float = 16.0
    scaling: Literal["rank", "root"] = "root"

    card = Card(
        "lora-ga",
        catalogue=(266,),
        paper="arXiv:2407.05000",
        claim="The first step is nearer full fine-tuning's than LoRA's, and a given loss is reached in fewer steps.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r2", "r8"),
        tolerance=1e-3,
    )

    def wrap(self, module: nn.Module, level: Any, *, grad: Tensor) -> nn.Module:
        """A linear with a low-rank delta that begins along the gradient `[out, in]` of the loss.

        Raises:
            UserError: the level is no rank or twice it is above the matrix's, or the gradient is not finite.
        """
        rank = rank_of("lora-ga", level, module)
        if 2 * rank > min(grad.shape):
            raise UserError(
                f"lora-ga was asked for rank {rank} at a matrix of {grad.shape[0]} x {grad.shape[1]}; it needs "
                f"twice as many directions of the gradient: rank {min(grad.shape) // 2} is the most"
            )
        if not bool(grad.isfinite().all()):
            raise UserError(f"lora-ga was given a gradient of {grad.shape[0]} x {grad.shape[1]} that is not finite")
        u, _, v = torch.linalg.svd(grad.float(), full_matrices=False)
        size = grad.shape[0] ** 0.25 / self.gamma**0.5
        a, b = size * v[:rank], size * u[:, rank : 2 * rank]
        return LowRank(module, a, b, scale_of(self.alpha, rank, self.scaling), start=True)
