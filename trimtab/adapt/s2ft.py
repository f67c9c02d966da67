"""S2FT: structured sparse fine-tuning: some heads and hidden channels of a block are trained, densely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.method import Card, Wrapper
from trimtab.parts.column_delta import Columns
from trimtab.parts.frozen import Frozen
from trimtab.parts.lowrank_delta import rank_of


@dataclass(frozen=True)
class S2FT(Wrapper):
    """Choose a few heads and hidden channels; train what the output and down projections read from them.

    The inputs of a block's output projection are grouped in heads, those of its down projection are single channels:
    the trained part is W[:, S], a dense block once the coupled matrices are permuted alike. The level's rank is the
    number of inputs chosen.

    Args:
        select: `random` (S2FT-R, the paper's default), `large` or `small` (by the mean size of the inputs, S2FT-A).
        span: neighbouring inputs that are chosen together, as those of one head; 1 chooses channels.

    Reference: Yang et al. 2024, arXiv:2412.06289, sections 3.2 and 3.3.
    Departures: no permutation: the chosen columns are gathered, which keeps as few activations and leaves the model's
        order alone. Of the coupled matrices the down and output projections are trained, as in the paper's experiments.

    >>> from trimtab.core.level import Rank
    >>> layer = nn.Linear(32, 16)
    >>> rng = torch.Generator().manual_seed(0)
    >>> S2FT(span=4).wrap(layer, Rank(8), absmean=torch.ones(32), rng=rng).index % 4
    tensor([0, 1, 2, 3, 0, 1, 2, 3])
    """

    select: Literal["random", "large", "small"] = "random"
    span: int = 1

    card = Card(
        "s2ft",
        catalogue=(32,),
        paper="arXiv:2412.06289",
        claim="A step's time and kept bytes are below LoRA's, and what was known before is forgotten less.",
        leaves=frozenset({"adapted", "trainable"}),
        keeps=frozenset({"function", "mergeable", "deterministic", "shape"}),
        levels=("r4", "r16"),
    )
    roles: ClassVar[tuple[str, ...]] = ("o", "down")

    def wrap(self, module: nn.Module, level: Any, *, absmean: Tensor, rng: torch.Generator) -> nn.Module:
        """A linear of which the chosen columns are trained.

        Raises:
            UserError: the level is no rank or above the matrix's, the span does not divide both, or a field has an
                unknown value.
        """
        count, inputs = rank_of("s2ft", level, module), Frozen(module).in_features
        if self.select not in ("random", "large", "small"):
            raise UserError(f"s2ft was given select={self.select!r}; it is 'random', 'large' or 'small'")
        if self.span < 1 or count % self.span or inputs % self.span:
            raise UserError(
                f"s2ft was asked for {level} in spans of {self.span} at a matrix of {inputs} inputs; "
                "the span divides both"
            )
        groups = inputs // self.span
        order = torch.randperm(groups, generator=rng)
        if self.select != "random":
            size = absmean.view(groups, self.span).mean(1)
            order = size.argsort(descending=self.select == "large", stable=True)
        chosen = order[: count // self.span, None] * self.span + torch.arange(self.span)
        return Columns(module, chosen.flatten())
