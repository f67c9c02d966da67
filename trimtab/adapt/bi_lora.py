"""1-bit adapters: LoRA whose factors are trained through a rounding to one bit, or few, and stored so."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.formats.bitstream import pack_bits, unpack_bits
from trimtab.parts.frozen import Frame
from trimtab.parts.lowrank_delta import delta_linear, gaussian, rank_of, scale_of

SPREAD = 1e-3  # of B at first: what is rounded to one bit cannot be zero
ROUNDS = 500  # of the search for levels


@dataclass(frozen=True)
class BiLoRA(Wrapper):
    """h = W0 x + s Q(B) Q(A) x, with Q(w) = m + d q((w - m) / d): m and d are w's mean and deviation.

    q rounds to the nearest of 2^bits fixed levels, those that a standard normal number is nearest to on average. In the
    backward pass q is the identity, and m and d are not constants. Stored are codes of `bits` bits, m and d.

    Args:
        bits: of a code, 1 to 8 (paper: 1).
        alpha: scale of the product, divided by r.

    Reference: Jie et al. 2023, arXiv:2307.16867, sections 3.3 and 3.4, equations 5 to 10.
    Departures: the adapter is LoRA's pair beside every linear that is chosen, without dropout; B begins as noise of
        deviation 0.001, as in the authors' code, so that the function is nearly the module's.

    >>> from trimtab.core.level import Rank
    >>> wrapped = BiLoRA().wrap(nn.Linear(32, 16), Rank(4), rng=torch.Generator().manual_seed(0))
    >>> wrapped.factors()[0].unique().numel(), {k: v.numel() for k, v in wrapped.state_dict().items() if "code" in k}
    (2, {'a_codes': 16, 'b_codes': 8})
    """

    bits: int = 1
    alpha: float = 16.0

    card = Card(
        "bi-lora",
        catalogue=(2,),
        paper="arXiv:2307.16867",
        claim="One bit is enough for an adapter: near LoRA's loss at equal rank, below it at equal bytes.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )

    def wrap(self, module: nn.Module, level: Any, *, rng: torch.Generator) -> nn.Module:
        """A linear with a rounded low-rank delta.

        Raises:
            UserError: the level is no rank or above the matrix's, or the bits are not 1 to 8.
        """
        rank = rank_of("bi-lora", level, module)
        if not 1 <= self.bits <= 8:
            raise UserError(f"bi-lora was asked for {self.bits} bits; codes have 1 to 8")
        return _Rounded(module, rank, self.bits, scale_of(self.alpha, rank, "rank"), rng)


def levels(bits: int) -> Tensor:
    """2^bits levels of a standard normal number with the least mean distance, each the median of what is nearest it.

    >>> [round(v, 2) for v in levels(1).tolist()]
    [-0.67, 0.67]
    """
    normal, count = NormalDist(), 1 << bits
    found = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    for _ in range(ROUNDS):
        edges = [0.0, *(normal.cdf((a + b) / 2) for a, b in pairwise(found)), 1.0]
        found = [normal.inv_cdf((a + b) / 2) for a, b in pairwise(edges)]
    return torch.tensor(found)


class _Nearest(Function):
    """What was rounded, with the gradient of what it was rounded from."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Rounded(Frame):
    def __init__(self, module: nn.Module, rank: int, bits: int, scale: float, rng: torch.Generator) -> None:
        super().__init__(module)
        self.bits, self.scale, self.levels = bits, scale, levels(bits)
        self.a = nn.Parameter(gaussian(rank, self.in_features, rng))
        self.b = nn.Parameter(torch.randn(self.out_features, rank, generator=rng) * SPREAD)
        self.read = False  # the factors came from a file, and lie on their levels

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they are stored."""
        return (self.a, self.b) if self.read else (self._rounded(self.a), self._rounded(self.b))

    def _codes(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, deviation = w.mean(), w.std() + 1e-8
        edges = (self.levels[1:] + self.levels[:-1]) / 2
        standard = (w - mean) / deviation
        return torch.bucketize(standard.detach().float(), edges), mean, deviation

    def _rounded(self, w: Tensor) -> Tensor:
        codes, mean, deviation = self._codes(w)
        standard = (w - mean) / deviation
        rounded: Tensor = _Nearest.apply(standard, self.levels[codes].to(w.dtype))
        return rounded * deviation + mean

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.frozen, *self.factors(), None, self.scale)

    @torch.no_grad()
    def delta(self) -> Tensor:
        a, b = self.factors()
        return self.scale * (b.float() @ a.float())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, w in (("a", self.a.detach()), ("b", self.b.detach())):
            codes, mean, deviation = self._codes(w)
            destination[f"{prefix}{name}_codes"] = pack_bits(codes, self.bits)
            destination[f"{prefix}{name}_normal"] = torch.stack((mean, deviation)).float()

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        for name, w in (("a", self.a), ("b", self.b)):
            codes = unpack_bits(state[f"{prefix}{name}_codes"], self.bits, w.numel()).view(w.shape)
            mean, deviation = state[f"{prefix}{name}_normal"]
            w.data.copy_(self.levels[codes.long()] * deviation + mean)
        self.read = True
