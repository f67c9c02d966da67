"""MC-SMoE: what merging has left of each expert becomes two thin factors and a few whole rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from trimtab.core.errors import UserError
from trimtab.core.level import Rank
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.formats.structure import change
from trimtab.parts.factors import truncated_svd


@dataclass(frozen=True)
class MCSMoE(Rewriter):
    """Split every matrix of a stack of experts: W = U V + S, U V of low rank, S of a few whole rows.

    U V is the truncated SVD of W at the level's rank. Of the rest S = W - U V those rows (outputs) stay whose mean
    sensitivity mean_j |S_ij dL/dW_ij| is largest in all stacks together, as many as hold the share `rows` of all
    weights. It is the second step of the paper, for a model whose experts `m-smoe` has merged; then U, V and the rows
    are trained towards the original's outputs.

    Fields:
        rows: share of all weights that lie in rows that stay (0.01, as the authors' code has it).

    Reference: Li et al. 2023, arXiv:2310.01334, section 3.3; the split is that of LoSparse, Li et al. 2023,
        arXiv:2306.11222.
    Departures: rows are chosen at once, by gradients of the split model's starting point, where the authors take more
        and more away during training, by a running mean with beta 0.85; training is outside of this verb.

    >>> MCSMoE(rows=0.5).kept([torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]])], [4, 4])
    [tensor([0]), tensor([], dtype=torch.int64)]
    """

    rows: float = 0.01

    card = Card(
        "mc-smoe",
        paper="arXiv:2310.01334",
        claim="Merged experts as thin factors and a few rows lose less than as either, or as fewer experts.",
        requires=frozenset({"float"}),
        leaves=frozenset({"factored", "float"}),
        keeps=frozenset({"deterministic"}),
        levels=("r2", "r4", "r8"),
        kinds=frozenset({"experts"}),
    )

    def rewrite(self, scene: Scene, *, sensitivity: Mapping[str, Tensor]) -> None:
        """Split the stacks that the levels name.

        Args:
            sensitivity: by the path of a stack's parameter, the mean size of the loss's gradient by each weight, of
                its shape.

        Raises:
            UserError: no stack of experts was named, several levels or one that is no rank, or a share outside [0, 1].
        """
        flipped = {s.path: s.transposed for s in scene.modelmap.sites if s.kind == "experts"}
        named = sorted(set(scene.levels) & set(flipped))
        levels = set(scene.levels.values())
        if not named or len(levels) != 1 or not isinstance(level := next(iter(levels)), Rank) or level.bias:
            said = ", ".join(sorted(map(str, levels)))
            raise UserError(
                f"mc-smoe takes one rank for stacks of experts, such as r8; {said} for {len(named)} was given"
            )
        if not 0 <= self.rows <= 1:
            raise UserError(f"mc-smoe was given rows={self.rows:g}; it is a share of the weights, in [0, 1]")
        factors, rests, scores = [], [], []
        for path in named:
            weight, size = scene.model.get_parameter(path).detach(), sensitivity[path]
            weight, size = (weight.mT, size.mT) if flipped[path] else (weight, size)
            if level.rank > min(weight.shape[1:]):
                raise UserError(f"mc-smoe was given a rank of {level.rank}, and {path} holds matrices of "
                                f"{weight.shape[1]} x {weight.shape[2]}")  # fmt: skip
            left, right = map(torch.stack, zip(*(truncated_svd(w, level.rank) for w in weight), strict=True))
            factors.append((left, right))
            rests.append((weight - left @ right).flatten(0, 1))
            scores.append((rests[-1] * size.flatten(0, 1)).abs().mean(1).reshape(weight.shape[:2]))
        for path, (left, right), rest, places in zip(
            named, factors, rests, self.kept(scores, [r.shape[1] for r in rests]), strict=True
        ):
            change(scene.model, scene.edits, "thin", path, rank=level.rank, rows=len(places),
                   flipped=flipped[path] or None)  # fmt: skip
            with torch.no_grad():
                for part, value in (("left", left), ("right", right), ("rows", rest[places])):
                    scene.model.get_parameter(f"{path}_{part}").copy_(value)
                scene.model.get_buffer(f"{path}_places").copy_(places)

    def kept(self, scores: list[Tensor], widths: list[int]) -> list[Tensor]:
        """Places of the rows that stay, in each stack.

        Args:
            scores: of each stack, a score a row `[stack, out]`.
            widths: of each stack, weights a row.
        """
        flat = torch.cat([s.flatten() for s in scores])
        size = torch.cat([torch.full((s.numel(),), width) for s, width in zip(scores, widths, strict=True)])
        order = flat.argsort(descending=True, stable=True)
        budget = self.rows * float(size.sum())
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[order[size[order].cumsum(0) <= budget]] = True
        return [part.nonzero()[:, 0] for part in chosen.split([prod(s.shape) for s in scores])]
