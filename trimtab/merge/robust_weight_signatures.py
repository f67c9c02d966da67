"""Robust Weight Signatures: what training on corrupted data changes in shallow layers, added to a clean model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Merger


@dataclass(frozen=True)
class RobustWeightSignatures(Merger):
    """Patch a clean model with the signatures of models that were tuned to corrupted data: W = W_c + sum_i w_i Q(s_i).

    d_i = W_i - W_0 and d_c = W_c - W_0, W_0 the model that all were tuned from; s_i = d_i - <d_i, d_c> / <d_c, d_c> d_c
    in the shallow blocks, 0 in the others; Q rounds to `bits` bits between the least and the largest entry.

    The first parent is the clean model W_c, each other a corruption's; a negative weight takes a signature off again.

    Args:
        shallow: the share of the depth whose blocks are patched, with what is read before all blocks (0.5: the paper
            takes 7 of 13 layers).
        bits: of the signature's entries; 0 leaves them as they are (4).
        weight: w_i of each signature, the paper's alpha (1); that of the clean model is not used.

    Raises:
        UserError: the bits are negative or more than 16.

    Reference: Cai et al. 2023, arXiv:2302.12480, section 3, equations 1 and 2.
    Departures: a signature has weight 1 whether there are others or not, where the paper divides by their number;
        statistics of batch norms are not computed anew.

    >>> import torch
    >>> base, clean, other = torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 2.0])
    >>> RobustWeightSignatures(bits=0).merge([clean, other], base, weight=(1.0, 1.0), depth=0.0)
    tensor([1., 2.])
    """

    shallow: float = 0.5
    bits: int = 4
    weight: float = 1.0

    tiled: ClassVar[bool] = False

    card = Card(
        "robust-weight-signatures",
        catalogue=(219,),
        paper="arXiv:2302.12480",
        claim="A shallow, quantised signature raises accuracy under corruption at little cost on clean data.",
        requires=frozenset({"float"}),
        keeps=frozenset({"shape", "exact", "deterministic"}),
    )

    def merge(self, tensors: list[Tensor], base: Tensor, *, weight: tuple[float, ...], depth: float) -> Tensor:
        """The clean tensor with the signatures."""
        if not 0 <= self.bits <= 16:
            raise UserError(f"robust-weight-signatures was given bits={self.bits}; give 1 to 16, or 0 for no rounding")
        result = tensors[0].clone()
        if depth > self.shallow:
            return result
        clean = tensors[0] - base
        length = float(clean.square().sum())
        for tensor, w in zip(tensors[1:], weight[1:], strict=True):
            own = tensor - base
            if length > 0:
                own.sub_(clean, alpha=float((own * clean).sum()) / length)
            result.add_(self.rounded(own), alpha=w)
        return result

    def rounded(self, signature: Tensor) -> Tensor:
        """A signature as it is stored."""
        low, high = signature.aminmax()
        if not self.bits or high == low:
            return signature
        step = (high - low) / (2**self.bits - 1)
        return torch.round((signature - low) / step) * step + low
