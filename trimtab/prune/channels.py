"""Structured removal of channels: units of a coupled dimension are scored, and the weakest leave every weight that shares it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.coupling import Coupled, Member
from trimtab.core.errors import UserError
from trimtab.core.level import Width
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.formats.structure import change, put_weight, weight_of
from trimtab.parts.folding import least_squares_refit

KINDS = frozenset({"channels", "linear", "conv"})
LEVELS = ("w25%", "w50%", "w75%", "w100%")


@dataclass(frozen=True)
class ChannelNorm(Rewriter):
    """Remove the channels whose weights are smallest, from every weight that they run through.

    The score of unit j of a coupled group is (sum over the group's weights of |w|^p over the slice that belongs to j)^(1/p): rows of
    the weights that make the channel, columns of those that read it, the norm's scale between them.

    Fields:
        p: 1 or 2, the norm; 1 in the paper.
        multiple: the number of channels kept is a multiple of this.

    Reference: Li et al. 2017, arXiv:1608.08710, section 3.1 (rows alone); the group's sum: Fang et al. 2023, arXiv:2301.12900, section 3.3.
    Departures: no retraining here; no sparsity is learnt before the cut.
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
        cuts = {g: _weakest(self.score(_slices(scene, g)), keep, self.multiple) for g, keep in _named(scene).items()}
        _cut(scene, cuts)


@dataclass(frozen=True)
class ChannelEnergy(Rewriter):
    """Remove the channels that carry least into the next layer on calibration data, and refit what reads the rest.

    The score of unit j is the mean energy that it adds to its readers' outputs, sum over readers of tr(W_j G_jj W_j^T), with G = E[x x^T]
    of the reader's input and W_j its columns of the unit. With `refit`, each reader then becomes the least-squares solution for its
    old outputs from the channels kept: W <- W G[:, keep] G[keep, keep]^-1.

    Fields:
        refit: solve for the readers' weights after the cut.
        damp: share of the mean diagonal of G that pulls the refit towards the old weights.
        multiple: the number of channels kept is a multiple of this.

    Reference: He et al. 2017, arXiv:1707.06168, section 3.1 (channel selection and reconstruction); the score as in An et al. 2024,
        arXiv:2312.11983, section 3.2.
    Departures: the score is in closed form where He et al. select by LASSO; the means of the removed channels are not added to a bias,
        so that layers without one stay without.
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

    def rewrite(self, scene: Scene, *, gram: Mapping[str, Tensor]) -> None:
        """Cut the groups that the levels name to their widths.

        Raises:
            UserError: a group none of whose readers has the statistic.
        """
        cuts = {}
        for group, keep in _named(scene).items():
            readers = [m for m in group.members if m.side == "in" and m.path in gram]
            if not readers:
                raise UserError(f"channel-energy needs the gram of a reader of {group.members[0].path}; use channel-norm there")
            cuts[group] = _weakest(sum(self._energy(scene, group, m, gram[m.path]) for m in readers), keep, self.multiple)

        def refit(path: str, weight: Tensor, keep: Tensor) -> Tensor:
            if not self.refit or path not in gram:
                return weight[:, keep]
            patch = len(gram[path]) // weight.shape[1]
            columns = (keep[:, None] * patch + torch.arange(patch)).reshape(-1)
            flat = least_squares_refit(weight.reshape(len(weight), -1), gram[path], columns, self.damp)
            return flat.reshape(len(weight), len(keep), *weight.shape[2:])

        _cut(scene, cuts, refit)

    @staticmethod
    def _energy(scene: Scene, group: Coupled, member: Member, gram: Tensor) -> Tensor:
        weight = weight_of(scene.model.get_submodule(member.path))
        patch = len(gram) // weight.shape[1]
        flat, g = weight.reshape(len(weight), -1).double(), gram.double()
        scores = []
        for unit in range(group.width):
            index = torch.tensor(group.indices(member, [unit]))
            columns = (index[:, None] * patch + torch.arange(patch)).reshape(-1)
            w = flat[:, columns]
            scores.append((w @ g[columns][:, columns] * w).sum())
        return torch.stack(scores)


def _named(scene: Scene) -> dict[Coupled, float]:
    """Share to keep of each group that the levels name: by any weight that makes its channels.

    A group is cut where all that its channels meet can follow: batch norms do, norms over the residual do not, and neither do zero
    padding and attention heads. Named sites whose channels are in no such group stay as they are.
    """
    whole = {n.path for n in scene.modelmap.norms if n.kind != "batch" or n.weight is None}
    keeps: dict[Coupled, float] = {}
    for group in scene.modelmap.coupled:
        makers = [m.path for m in group.members if m.side == "out"]
        asked = {scene.levels[p] for p in makers if p in scene.levels}
        if not asked or group.kind != "channels" or group.padded or any(m.path in whole for m in group.members):
            continue
        level = next(iter(asked))
        if len(asked) > 1 or not isinstance(level, Width):
            raise UserError(f"{', '.join(makers)} share their channels; one width is needed for all, not {', '.join(map(str, asked))}")
        keeps[group] = level.keep
    if not keeps:
        raise UserError("no channels that can be removed were named; name weights such as `up`, `gate` or convolutions inside a block")
    return keeps


def _slices(scene: Scene, group: Coupled) -> list[Tensor]:
    """Each member's part of its weight, as `[units, entries]`."""
    found = []
    for member in group.members:
        if member.side == "param":
            tensor, dim = scene.model.get_parameter(member.path).detach(), member.dim
        else:
            tensor, dim = weight_of(scene.model.get_submodule(member.path)), _dim(scene, member)
        index = torch.tensor(group.indices(member, list(range(group.width))))
        found.append(tensor.index_select(dim, index).movedim(dim, 0).reshape(group.width, -1))
    return found


def _weakest(scores: Tensor, keep: float, multiple: int) -> tuple[int, ...]:
    """Units to remove: all but the `keep` strongest, in order; at least one stays."""
    units = len(scores)
    stay = min(units, max(1, round(keep * units / multiple)) * multiple)
    return tuple(sorted(scores.argsort(stable=True)[: units - stay].tolist()))


def _dim(scene: Scene, member: Member) -> int:
    embedding = member.side == "out" and isinstance(scene.model.get_submodule(member.path), torch.nn.Embedding)
    return 1 if member.side == "in" or embedding else 0


def _cut(
    scene: Scene, cuts: Mapping[Coupled, tuple[int, ...]], take: Callable[[str, Tensor, Tensor], Tensor] = lambda _, w, keep: w[:, keep]
) -> None:
    """Remove units from every member, all groups at once: a weight may belong to several, and its indices are those before any cut.

    Args:
        take: (path, weight, kept inputs) -> the weight of those inputs.
    """
    gone: dict[str, dict[tuple[int, str], set[int]]] = {}
    for group, units in cuts.items():
        for member in group.members:
            dim = member.dim if member.side == "param" else _dim(scene, member)
            places = gone.setdefault(member.path, {}).setdefault((dim, member.side), set())
            places |= set(group.indices(member, units))
    for path, sides in gone.items():
        if any(sides.values()):
            _cut_one(scene, path, sides, take)


def _cut_one(scene: Scene, path: str, sides: Mapping[tuple[int, str], set[int]], take: Callable[[str, Tensor, Tensor], Tensor]) -> None:
    model = scene.model
    (first, side), *_ = sides
    if side == "param":
        value = model.get_parameter(path).detach()
        for (dim, _), places in sides.items():
            value = value.index_select(dim, _rest(value.shape[dim], places))
        change(model, scene.edits, "resize", path, shape=list(value.shape))
        with torch.no_grad():
            model.get_parameter(path).copy_(value)
        return
    module = model.get_submodule(path)
    weight = weight_of(module)
    extra = {k: v.detach() for k, v in [*module._parameters.items(), *module._buffers.items()] if v is not None and k != "weight"}
    groups = None
    for (dim, side), places in sides.items():
        size = weight.shape[dim]
        keep = _rest(size, places)
        if side == "in":
            weight = take(path, weight, keep)
        elif dim == 1:
            weight = weight[:, keep]
        else:
            weight = weight[keep]
            extra = {k: v[keep] if v.dim() == 1 and len(v) == size else v for k, v in extra.items()}
            groups = len(keep) if side == "depthwise" else None
    change(model, scene.edits, "resize", path, shape=list(weight.shape), groups=groups)
    put_weight(module, weight)
    with torch.no_grad():
        for name, value in extra.items():
            getattr(module, name).copy_(value)


def _rest(size: int, places: set[int]) -> Tensor:
    return torch.tensor([i for i in range(size) if i not in places])
