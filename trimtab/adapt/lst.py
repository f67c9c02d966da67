"""LST: a small network beside a frozen one, which reads every block and is all that a gradient goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trimtab.core.errors import UserError
from trimtab.core.level import Width
from trimtab.core.method import Card, Wrapper
from trimtab.parts.ladder import Rung
from trimtab.parts.shared import Shared


@dataclass(frozen=True)
class LST(Wrapper):
    """s_i = f_i(m_i d_i(b_i) + (1 - m_i) s_{i-1}), and the last block's output is b_n + up(s_n).

    b_i is what block i gives, d_i a projection to the side network's width, m_i = sigmoid(a_i / 0.1) a trained gate.
    The level is that width as a share of the residual's, like `w25%`. The frozen blocks keep nothing for a backward
    pass, which they are no part of.

    Reference: Sung et al. 2022, arXiv:2206.06522, sections 3.1 and 3.2, figure 2.
    Departures: a side block is a two-layer network of twice its width on each token, where the paper has a narrow
        transformer block: the blocks that it reads have looked at the other tokens, and decoding needs no second cache.
        It begins small and random, not as a pruned copy of the backbone; states are brought to a mean square of 1
        before they are projected; the projection back is zero at first, and is added to the frozen output.

    >>> blocks, rng = [nn.Linear(32, 32) for _ in range(3)], torch.Generator().manual_seed(0)
    >>> shared = Shared(((32, 32),) * 3)
    >>> rungs = [LST().wrap(b, Width(0.25), rng=rng, shared=shared.at(i)) for i, b in enumerate(blocks)]
    >>> x = torch.randn(2, 32)
    >>> bool(torch.equal(nn.Sequential(*rungs)(x), nn.Sequential(*blocks)(x))), rungs[0].down.shape
    (True, torch.Size([8, 32]))
    """

    card = Card(
        "lst",
        catalogue=(255,),
        paper="arXiv:2206.06522",
        claim="At LoRA's trained numbers far fewer bytes are kept for the backward pass, at a loss not far above.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"deterministic"}),
        levels=("w12.5%", "w25%"),
        kinds=frozenset({"block"}),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator, shared: Shared) -> nn.Module:
        """A block and its rung.

        Raises:
            UserError: the level is no width, or leaves no channel.
        """
        if not isinstance(level, Width) or round(level.keep * shared.shape[0]) < 1:
            raise UserError(
                f"lst was asked for {level} at a residual of {shared.shape[0]}; it takes a width, like w25%"
            )
        return Rung(module, round(level.keep * shared.shape[0]), shared, rng)
