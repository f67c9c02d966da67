"""PEQA: the scales of a quantised matrix are trained, its codes stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.core.method import Card, Wrapper
from trimtab.parts.trained_grid import OnGrid, grid_of


@dataclass(frozen=True)
class PEQA(Wrapper):
    """W = (s0 + ds) (q - z): codes q and zero points z of a quantised matrix stay, ds is trained, group by group.

    A packed matrix keeps its own level, whatever level is asked for, so that an artifact of mixed levels is trained as
    it is; a matrix that is not packed is rounded to nearest at the level. The trained scales take no byte more than
    those that they replace, and another task is another set of scales for the same codes.

    Reference: Kim et al. 2023, arXiv:2305.14152, section 3.2, equation 2.
    Departures: what is trained is ds / s0, so that one rate suits groups of all sizes; scales are rounded to the 16
        bits that store them in every step, past which the gradient goes.

    >>> import torch
    >>> from trimtab.core.level import Int
    >>> wrapped = PEQA().wrap(nn.Linear(64, 16), Int(4, 32))
    >>> codes = wrapped.packed().tensors["codes"]
    >>> _ = wrapped.gain.data.add_(0.1)
    >>> wrapped.gain.shape, torch.equal(wrapped.packed().tensors["codes"], codes)
    (torch.Size([16, 2]), True)
    """

    card = Card(
        "peqa",
        catalogue=(322,),
        paper="arXiv:2305.14152",
        claim="At 3 bits, trained scales alone restore the loss to the full-precision model's, and codes stay as they "
        "are.",
        leaves=frozenset({"adapted", "trainable", "int"}),
        keeps=frozenset({"mergeable", "deterministic", "shape"}),
        levels=("3b/g32", "4b/g64"),
    )

    def wrap(self, module: nn.Module, level: Any) -> nn.Module:
        """A linear on a grid with trained scales.

        Raises:
            UserError: the level, or that of a packed module, has no 16-bit scales of integers.
        """
        return OnGrid(module, grid_of("peqa", level))
