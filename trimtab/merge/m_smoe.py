"""M-SMoE: experts that are used little are merged into the used ones whose routing is most like theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.coupling import Coupled, Member
from trimtab.core.errors import UserError
from trimtab.core.level import Width
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.formats.structure import change
from trimtab.parts.alignment import assignment
from trimtab.parts.merging import average


@dataclass(frozen=True)
class MSMoE(Rewriter):
    """Merge each expert into a dominant one, its units permuted to match: W_g = sum_i a_i P_i W_i / sum_i a_i.

    a_i is how often expert i is used. The most used experts of all layers together are dominant, at least one in each
    layer; any other joins the dominant expert of its layer whose router logits are most like its own. P_i puts the
    units of expert i in the order in which the inner products with the dominant one's weights sum up to most. The
    router stays: what it sends to a member goes to the merged expert.

    Fields:
        permute: match units before merging (True).
        weigh: average by a_i; else all members count alike (True).

    Reference: Li et al. 2023, arXiv:2310.01334, section 3.2, algorithm 1.
    Departures: units are matched to the dominant expert of the group, where the authors' code matches all experts of
        a layer to its first; the second step of the paper, thin factors and a sparse rest of each merged expert, is
        `mc-smoe`.

    >>> MSMoE().groups(torch.tensor([0.1, 0.6, 0.3]), torch.tensor([[1, 0.2, 0.7], [0.2, 1, 0], [0.7, 0, 1]]), 2)
    [1, 0, 1]
    """

    permute: bool = True
    weigh: bool = True

    card = Card(
        "m-smoe",
        catalogue=(202,),
        paper="arXiv:2310.01334",
        claim="At equal experts, aligned merging by use is above plain averaging and above leaving experts out.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float"}),
        keeps=frozenset({"deterministic"}),
        levels=("w25%", "w50%", "w75%", "w100%"),
        kinds=frozenset({"experts"}),
    )

    def rewrite(self, scene: Scene, *, usage: Mapping[str, Tensor], likeness: Mapping[str, Tensor]) -> None:
        """Merge the experts of the stacks that the levels name, down to the share that the level says of all.

        Args:
            usage: by the path of a stack, how often each of its experts is chosen `[experts]`.
            likeness: cosines between the logits that the router gives its experts `[experts, experts]`.

        Raises:
            UserError: no stack of experts was named, or several levels.
        """
        stacks = {_owner(s.path) for s in scene.modelmap.sites if s.kind == "experts"}
        named = sorted({_owner(p) for p in scene.levels} & stacks)
        levels = set(scene.levels.values())
        if not named or len(levels) != 1 or not isinstance(level := next(iter(levels)), Width):
            said = ", ".join(sorted(map(str, levels)))
            raise UserError(
                f"m-smoe takes one width for stacks of experts, such as w50%; {said} for {len(named)} was given"
            )
        if level.keep == 1:
            return
        for path, count in dominants({path: usage[path] for path in named}, level.keep).items():
            self._merge(scene, path, usage[path], self.groups(usage[path], likeness[path], count))

    def groups(self, usage: Tensor, likeness: Tensor, count: int) -> list[int]:
        """For each expert the place of its dominant one among the `count` most used, these in their own order."""
        kept = usage.argsort(descending=True, stable=True)[:count].sort().values
        nearest = likeness[:, kept].argmax(1)
        nearest[kept] = torch.arange(count)
        return nearest.tolist()

    def _merge(self, scene: Scene, path: str, usage: Tensor, members: list[int]) -> None:
        group = next((g for g in scene.modelmap.coupled if {_owner(m.path) for m in g.members} == {path}), None)
        module = scene.model.get_submodule(path)
        old = {name: p.detach().double() for name, p in module.named_parameters(recurse=False)}
        if group is None or any(t.dim() != 3 for t in old.values()):
            raise UserError(
                f"m-smoe cannot tell the units of the experts {path} apart; it takes stacks of matrices alone"
            )
        flipped = {s.path for s in scene.modelmap.sites if s.transposed}
        experts = [_Expert({f"{path}.{n}": t[i].T if f"{path}.{n}" in flipped else t[i] for n, t in old.items()}, group)
                   for i in range(len(members))]  # fmt: skip
        weights = usage.double().clamp_min(1e-9) if self.weigh else torch.ones(len(members), dtype=torch.double)
        merged = []
        for place in range(max(members) + 1):
            inside = sorted((i for i, g in enumerate(members) if g == place), key=lambda i: -float(usage[i]))
            lead = experts[inside[0]]
            moved = [lead, *(experts[i].like(lead) if self.permute else experts[i] for i in inside[1:])]
            merged.append({n: average([e.weights[n] for e in moved], weights[inside].tolist()) for n in lead.weights})
        change(scene.model, scene.edits, "share", path, members=members)
        with torch.no_grad():
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{name}"
                stack = torch.stack([m[full] for m in merged])
                parameter.copy_(stack.mT if full in flipped else stack)


def dominants(usage: Mapping[str, Tensor], keep: float) -> dict[str, int]:
    """How many experts of each stack are dominant: the most used of all stacks, and the most used of each.

    >>> dominants({"a": torch.tensor([0.7, 0.2, 0.1]), "b": torch.tensor([0.4, 0.3, 0.3])}, 0.5)
    {'a': 1, 'b': 2}
    """
    ranked = sorted(
        ((float(value), path) for path, found in usage.items() for value in found.sort(descending=True).values[1:]),
        key=lambda pair: -pair[0],
    )
    total = round(keep * sum(map(len, usage.values())))
    counts = dict.fromkeys(usage, 1)
    for _, path in ranked[: max(0, total - len(usage))]:
        counts[path] += 1
    return counts


class _Expert:
    """The matrices `[out, in]` of one expert by path, and the group of its units."""

    def __init__(self, weights: Mapping[str, Tensor], group: Coupled) -> None:
        self.weights, self.group = dict(weights), group

    def units(self, member: Member) -> Tensor:
        """The part of a matrix that belongs to each unit `[units, entries]`."""
        weight = self.weights[member.path] if member.side == "out" else self.weights[member.path].T
        index = torch.tensor(self.group.indices(member, list(range(self.group.width))))
        return weight[index].reshape(self.group.width, -1)

    def like(self, other: _Expert) -> _Expert:
        """The same expert with its units in the order of another's."""
        gain = torch.stack([other.units(m) @ self.units(m).T for m in self.group.members]).sum(0)
        order, weights = assignment(gain).tolist(), dict(self.weights)
        for m in self.group.members:
            new, old = (torch.tensor(self.group.indices(m, units)) for units in (list(range(len(order))), order))
            dim = 0 if m.side == "out" else 1
            weights[m.path] = weights[m.path].index_copy(dim, new, self.weights[m.path].index_select(dim, old))
        return _Expert(weights, self.group)


def _owner(path: str) -> str:
    return path.rpartition(".")[0]
