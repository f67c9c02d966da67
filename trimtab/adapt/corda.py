"""CorDA: factors cut out of the matrix along what a context's inputs make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.frozen import Frozen
from trimtab.parts.lowrank_delta import LowRank, rank_of


@dataclass(frozen=True)
class CorDA(Wrapper):
    """SVD(W C) = U S V^T with C = X X^T, so that W = U S (V^T C^-1); r components are trained, the rest is frozen.

    B = U_r sqrt(S_r) and A = sqrt(S_r) V_r^T C^-1. C is here gram = X^T X / n (the factor cancels).

    Args:
        mode: `knowledge` trains the smallest r components, so that what the context asks for stays; `instruction`
            the largest, so that the context's task is learnt. The context is what the statistics are collected on.
        damp: share of the mean diagonal of C that is added to it before it is inverted (0.01, as the authors' code).

    Reference: Yang et al. 2024, arXiv:2406.05223, section 3.2, equations 1 to 3.
    Departures: what is cut out of the matrix is held as two frozen factors beside it, which stays shared and may be
        packed. Damping is added once, where the code adds it until the inverse is good.

    >>> from trimtab.core.level import Rank
    >>> layer, x = nn.Linear(32, 16), torch.randn(64, 32)
    >>> wrapped = CorDA().wrap(layer, Rank(4), gram=x.T @ x / 64)
    >>> bool(torch.allclose(wrapped(x), layer(x), atol=1e-4))
    True
    """

    mode: Literal["knowledge", "instruction"] = "knowledge"
    damp: float = 0.01

    card = Card(
        "corda",
        catalogue=(30,),
        paper="arXiv:2406.05223",
        claim="The knowledge mode forgets less of the context than LoRA at no worse a loss on the task.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
        tolerance=1e-3,
    )

    def wrap(self, module: nn.Module, level: Any, *, gram: Tensor) -> nn.Module:
        """A linear with a low-rank delta that begins as components of the matrix, given the gram `[in, in]`.

        Raises:
            UserError: the level is no rank or above the matrix's, the mode is unknown, or the gram is not finite.
        """
        rank, base = rank_of("corda", level, module), Frozen(module)
        if self.mode not in ("knowledge", "instruction"):
            raise UserError(f"corda was given mode={self.mode!r}; it is 'knowledge' or 'instruction'")
        if not bool(gram.isfinite().all()):
            raise UserError(f"corda was given a gram of {gram.shape[0]} inputs that is not finite")
        mean = gram.diagonal().double().mean().clamp_min(1e-12)
        c = gram.double() + self.damp * mean * torch.eye(len(gram), dtype=torch.float64)
        u, s, v = torch.linalg.svd(base.weight().double() @ c, full_matrices=False)
        picked = slice(-rank, None) if self.mode == "knowledge" else slice(rank)
        root = s[picked].sqrt()
        a = root[:, None] * torch.linalg.solve(c, v[picked].T).T
        return LowRank(module, a.float(), (u[:, picked] * root).float(), 1.0, start=True)
