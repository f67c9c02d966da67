"""Structured removal of channels: units of a coupled dimension are scored, and the weakest leave all that shares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.coupling import Coupled, Member
from trimtab.core.errors import UserError
from trimtab.core.level import Width
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.formats.cutting import cut_units, units_of
from trimtab.formats.structure import weight_of
from trimtab.parts.folding import least_squares_refit

KINDS = frozenset({"channels", "linear", "conv"})
LEVELS = ("w25%", "w50%", "w75%", "w100%")


@dataclass(frozen=True)
class ChannelNorm(Rewriter):
    """Remove the channels whose weights are smallest, from every weight that they run through.

    The score of unit j of a coupled group is (sum over the group's weights of |w|^p over the slice that belongs to
    j)^(1/p): rows of the weights that make the channel, columns of those that read it, the norm's scale between them.

    Fields:
        p: 1 or 2, the norm; 1 in the paper.
        multiple: the number of channels kept is a multiple of this.

    Reference: Li et al. 2017, arXiv:1608.08710, section 3.1 (rows alone); the sum over a group: Fang et al. 2023,
        arXiv:2301.12900, section 3.3.
    Departures: no retraining here, and no sparsity is learnt before the cut.

    >>> ChannelNorm(p=2).score([torch.tensor([[3.0], [1.0]]), torch.tensor([[4.0], [0.0]])]).tolist()
    [5.0, 1.0]
    """

    p: int = 1
    multiple: int = 1

    card = Card(
        "channel-norm",
        paper="arXiv:1608.08710",
        claim="At equal width, removing the channels of smallest norm costs less than removing random ones.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float", "narrowed"}),
        keeps=frozenset({"deterministic"}),
        levels=LEVELS,
        kinds=KINDS,
    )

    def score(self, slices: list[Tensor]) -> Tensor:
        """Scores `[units]` from the group's weights, each as `[units, entries]`."""
        if self.p not in (1, 2):
            raise UserError(f"channel-norm: p={self.p} was given; 1 and 2 are known")
        return torch.stack([s.double().abs().pow(self.p).sum(1) for s in slices]).sum(0).pow(1 / self.p)

    def rewrite(self, scene: Scene) -> None:
        """Cut the groups that the levels name to their widths."""
        cuts = {}
        for group, keep in named_groups(scene).items():
            scores = self.score([units_of(scene.model, group, m) for m in group.members])
            cuts[group] = _weakest(scores, keep, self.multiple)
        cut_units(scene.model, scene.edits, cuts)


@dataclass(frozen=True)
class ChannelEnergy(Rewriter):
    """Remove the channels that carry least into the next layer on calibration data, and refit what reads the rest.

    The score of unit j is the mean energy that it adds to its readers' outputs, sum over readers of
    tr(W_j G_jj W_j^T), with G = E[x x^T] of the reader's input and W_j its columns of the unit. With `refit`, each
    reader then becomes the least-squares solution for its old outputs from the channels kept:
    W <- W G[:, keep] G[keep, keep]^-1.

    Fields:
        refit: solve for the readers' weights after the cut.
        damp: share of the mean diagonal of G that pulls the refit towards the old weights.
        multiple: the number of channels kept is a multiple of this.

    Reference: He et al. 2017, arXiv:1707.06168, section 3.1 (channel selection and reconstruction); the score as in
        An et al. 2024, arXiv:2312.11983, section 3.2.
    Departures: the score is in closed form where He et al. select by LASSO; the means of the removed channels are not
        added to a bias, so that layers without one stay without.

    >>> ChannelEnergy().energy(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[0], [1]])).tolist()
    [1.0, 4.0]
    """

    refit: bool = True
    damp: float = 0.01
    multiple: int = 1

    card = Card(
        "channel-energy",
        paper="arXiv:1707.06168",
        claim="At equal width, removal by energy with a refit costs less than removal by norm.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float", "narrowed"}),
        keeps=frozenset({"deterministic"}),
        levels=LEVELS,
        kinds=KINDS,
    )

    def energy(self, weight: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
        """Scores `[units]` from a reader's weight `[out, in]`, G `[in, in]` and each unit's columns `[units, n]`."""
        w, g = weight.double(), gram.double()
        return torch.stack([(w[:, c] @ g[c][:, c] * w[:, c]).sum() for c in columns])

    def rewrite(self, scene: Scene, *, gram: Mapping[str, Tensor]) -> None:
        """Cut the groups that the levels name to their widths.

        Raises:
            UserError: a group none of whose readers has the statistic.
        """
        cuts = {}
        for group, keep in named_groups(scene).items():
            readers = [m for m in group.members if m.side == "in" and m.path in gram]
            if not readers:
                raise UserError(
                    f"channel-energy needs the gram of a reader of {group.members[0].path}; use channel-norm there"
                )
            scores = torch.stack([self._score(scene, group, m, gram[m.path]) for m in readers]).sum(0)
            cuts[group] = _weakest(scores, keep, self.multiple)

        def refit(path: str, weight: Tensor, keep: Tensor) -> Tensor:
            if not self.refit or path not in gram:
                return weight[:, keep]
            flat = least_squares_refit(weight.flatten(1), gram[path], _columns(weight, keep), self.damp)
            return flat.reshape(len(weight), len(keep), *weight.shape[2:])

        cut_units(scene.model, scene.edits, cuts, refit)

    def _score(self, scene: Scene, group: Coupled, member: Member, gram: Tensor) -> Tensor:
        weight = weight_of(scene.model.get_submodule(member.path))
        index = torch.tensor(group.indices(member, list(range(group.width))))
        return self.energy(weight.flatten(1), gram, _columns(weight, index).reshape(group.width, -1))


def _columns(weight: Tensor, channels: Tensor) -> Tensor:
    """Columns of a flattened kernel that read the given input channels."""
    patch = weight[0, 0].numel()
    return (channels[:, None] * patch + torch.arange(patch)).flatten()


def named_groups(scene: Scene) -> dict[Coupled, float]:
    """Share to keep of each group that the levels name: by any weight that makes its channels.

    A group is cut where all that its channels meet can follow: batch norms do, norms over the residual do not, and
    neither do zero padding and attention heads. Named sites whose channels are in no such group stay as they are.
    """
    fixed = {n.path for n in scene.modelmap.norms if n.kind != "batch" or n.weight is None}
    keeps: dict[Coupled, float] = {}
    for group in scene.modelmap.coupled:
        makers = [m.path for m in group.members if m.side == "out"]
        asked = {scene.levels[p] for p in makers if p in scene.levels}
        if not asked or group.kind != "channels" or group.padded or any(m.path in fixed for m in group.members):
            continue
        level = next(iter(asked))
        if len(asked) > 1 or not isinstance(level, Width):
            found = ", ".join(sorted(map(str, asked)))
            raise UserError(f"{', '.join(makers)} share their channels; one width is needed for all, not {found}")
        keeps[group] = level.keep
    if not keeps:
        raise UserError(
            "no channels that can be removed were named; name weights such as `up`, `gate` or convolutions in a block"
        )
    return keeps


def _weakest(scores: Tensor, keep: float, multiple: int) -> tuple[int, ...]:
    """Units to remove: all but the strongest share `keep`; at least one stays."""
    units = len(scores)
    stay = min(units, max(1, round(keep * units / multiple)) * multiple)
    return tuple(sorted(scores.argsort(stable=True)[: units - stay].tolist()))
