"""LoRAM: LoRA that is trained on a pruned matrix and used with the whole one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.level import parse_level
from trimtab.core.method import Card, Wrapper
from trimtab.formats.packed import Packed
from trimtab.parts.frozen import Frame, Frozen
from trimtab.parts.lowrank_delta import delta_linear, gaussian, rank_of, scale_of
from trimtab.parts.scores import keep, pack_kept
from trimtab.parts.sweep import obs_sweep


@dataclass(frozen=True)
class LoRAM(Wrapper):
    """Trained with h = P(W0) x + s B A x, used with h = W0 x + s B A x, P(W0) being a pruned W0.

    While a model is in training mode its linears are the pruned ones; in evaluation mode, merged and on disk the
    factors belong to the whole matrices: masks keep a matrix's shape, so that the factors fit both. What is removed has
    the lowest |w| times the root mean square of its input, and with `align` the weights that stay make good for it.

    Args:
        keep: level of the pruned matrix (paper: 2:4 and 50 % among others).
        align: move the kept weights to the least output error, where the paper trains the pruned model for a while.
        alpha: scale of the product, divided by r.

    Reference: Zhang et al. 2025, arXiv:2502.13533, section 3, equations 3 to 6; alignment: section 3.3.
    Departures: unstructured and n:m masks alone, for which the paper's recovery is the identity; alignment is one
        closed-form sweep, as SparseGPT's, on inputs of the data at hand, in place of continual pretraining. The whole
        matrices stay where they are, shared with the model, although training does not read them.

    >>> from trimtab.core.level import Rank
    >>> layer, x = nn.Linear(32, 16), torch.randn(64, 32)
    >>> wrapped = LoRAM().wrap(layer, Rank(4), gram=x.T @ x / 64, rng=torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(wrapped(x), layer(x))), bool(torch.allclose(wrapped.eval()(x), layer(x), atol=1e-6))
    (False, True)
    """

    keep: str = "2:4"
    align: bool = True
    alpha: float = 16.0

    card = Card(
        "loram",
        catalogue=(324,),
        paper="arXiv:2502.13533",
        claim="Factors trained on a pruned model improve the whole one, and more than they improve the pruned one.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )

    def wrap(self, module: nn.Module, level: Any, *, gram: Tensor, rng: torch.Generator) -> nn.Module:
        """A linear of two sizes with a low-rank delta.

        Raises:
            UserError: the level is no rank or above the matrix's, or `keep` is no level of sparsity.
        """
        rank, base = rank_of("loram", level, module), Frozen(module)
        a, b = gaussian(rank, base.in_features, rng), torch.zeros(base.out_features, rank)
        return _TwoSizes(module, self._pruned(base.weight().float(), gram), a, b, scale_of(self.alpha, rank, "rank"))

    def _pruned(self, weight: Tensor, gram: Tensor) -> Packed:
        target: Any = parse_level(self.keep)
        mask = keep(weight.abs() * gram.diagonal().clamp_min(0).sqrt(), target)
        if self.align:
            weight = obs_sweep(weight, gram, lambda columns, j, u: columns * mask[:, j : j + columns.shape[1]])
        return pack_kept(weight, mask, target)


class _Pruned(nn.Module):
    """The face that `Frozen` reads."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias


class _TwoSizes(Frame):
    def __init__(self, module: nn.Module, packed: Packed, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__(module)
        self.pruned, self.small, self.scale = packed, Frozen(_Pruned(packed, self.bias)), scale
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return delta_linear(x, self.small if self.training else self.frozen, self.a, self.b, None, self.scale)

    @torch.no_grad()
    def factored(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        return self.a.float(), self.scale * self.b.float(), None

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.scale * (self.b.float() @ self.a.float())
