"""Iterative Feature Merging: of the features of a layer, the two that are most alike become one, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.coupling import Coupled, Member
from trimtab.core.errors import UserError
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.formats.cutting import cut_units, out_dim, units_of
from trimtab.formats.structure import put_weight, weight_of
from trimtab.prune.channels import KINDS, LEVELS, named_groups


@dataclass(frozen=True)
class IterativeFeatureMerging(Rewriter):
    """Merge the two features of least d_ij = |m_i - m_j|^2 + |r_i - r_j|^2 until as many are left as the level says.

    m_i are the weights that make feature i, a batch norm's scale in them, and r_i those that read it. Features that
    are merged are made by the mean of their m and read by the sum of their r: of equal features this changes nothing.
    Merging ends earlier where the least d_ij is above `threshold` times the largest; what is then left is the
    feature complexity of the layer. No data are needed.

    Fields:
        threshold: beta, share of the largest distance (1: the level alone says how many are left; the authors use
            0.01 to 0.3, and no limit on the number).

    Reference: Chen et al. 2023, arXiv:2310.06756, section 4, algorithm 1.
    Departures: the authors' code adds the making weights and averages the reading ones, which is the same behind a
        ReLU and holds there alone; it merges one pair of each layer in turn, here a layer is done before the next.

    >>> made, read = torch.tensor([[1.0], [3.0], [1.1]]), torch.tensor([[2.0], [0.0], [2.0]])
    >>> IterativeFeatureMerging().clusters(made, read, 2)
    [[0, 2], [1]]
    >>> IterativeFeatureMerging(threshold=1e-4).clusters(made, read, 2)
    [[0], [1], [2]]
    """

    threshold: float = 1.0

    card = Card(
        "iterative-feature-merging",
        catalogue=(211,),
        paper="arXiv:2310.06756",
        claim="Without data or training, above removing channels of small norm; wider networks have more to merge.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float", "narrowed"}),
        keeps=frozenset({"deterministic"}),
        levels=LEVELS,
        kinds=KINDS,
    )

    def clusters(self, made: Tensor, read: Tensor, left: int) -> list[list[int]]:
        """Units that become one feature each, from the weights that make and read each unit, `[units, entries]`.

        Raises:
            UserError: the threshold is not in [0, 1].
        """
        if not 0 <= self.threshold <= 1:
            raise UserError(
                f"iterative-feature-merging was given threshold={self.threshold:g}; it is a share in [0, 1]"
            )
        made, read = made.double(), read.double()
        groups = [[i] for i in range(len(made))]
        both = torch.cat([made, read], 1)
        distance = torch.cdist(both, both).square().fill_diagonal_(torch.inf)
        while len(groups) > left:
            least = int(distance.argmin())
            i, j = sorted(divmod(least, len(groups)))
            if distance[i, j] > self.threshold * distance.masked_fill(distance.isinf(), 0).max():
                break
            sizes = [len(groups[i]), len(groups[j])]
            made[i] = (sizes[0] * made[i] + sizes[1] * made[j]) / sum(sizes)
            read[i] += read[j]
            groups[i] += groups.pop(j)
            stay = torch.tensor([k for k in range(len(made)) if k != j])
            made, read, distance = made[stay], read[stay], distance[stay][:, stay]
            fresh = (made - made[i]).square().sum(1) + (read - read[i]).square().sum(1)
            fresh[i] = torch.inf
            distance[i], distance[:, i] = fresh, fresh
        return [sorted(group) for group in groups]

    def rewrite(self, scene: Scene) -> None:
        """Merge the groups that the levels name down to their widths."""
        model, cuts = scene.model, {}
        for group, keep in named_groups(scene).items():
            left = max(1, round(keep * group.width))
            for member in group.members if left < group.width else ():
                if (norm := scene.modelmap.batch_norms.get(member.path)) and member.side == "out":
                    fold_batch_norm(model.get_submodule(member.path), model.get_submodule(norm))
            sides: dict[str, list[Tensor]] = {"out": [], "depthwise": [], "in": [], "norm": [], "param": []}
            for member in group.members:
                sides[member.side].append(units_of(model, group, member))
            made, read = (torch.cat(parts, 1) for parts in (sides["out"] + sides["depthwise"], sides["in"]))
            features = [f for f in self.clusters(made, read, left) if len(f) > 1]
            for member in group.members:
                _merge(model, group, member, features)
            cuts[group] = tuple(sorted(unit for feature in features for unit in feature[1:]))
        cut_units(model, scene.edits, cuts)


@torch.no_grad()
def fold_batch_norm(module: nn.Module, norm: Any) -> None:
    """Move a batch norm's scale and mean into the convolution before it and its own shift; the function stays."""
    if norm.weight is None:
        raise UserError("iterative-feature-merging needs batch norms with a scale and a shift; take channel-norm here")
    scale, weight = norm.weight * torch.rsqrt(norm.running_var + norm.eps), weight_of(module)
    put_weight(module, weight * scale.reshape(-1, *[1] * (weight.dim() - 1)))
    if module._parameters.get("bias") is not None:
        module.get_parameter("bias").mul_(scale)
    norm.bias.sub_(scale * norm.running_mean)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.fill_(1)


@torch.no_grad()
def _merge(model: nn.Module, group: Coupled, member: Member, features: list[list[int]]) -> None:
    """Put each feature's weights at the place of its first unit: the sum of those that read it, the mean of others."""
    if member.side == "param":
        tensors: list[tuple[Tensor, int]] = [(model.get_parameter(member.path), member.dim)]
    else:
        module = model.get_submodule(member.path)
        weight, dim = weight_of(module), 1 if member.side == "in" else out_dim(module)
        beside = [t for n, t in (*module._parameters.items(), *module._buffers.items()) if n != "weight"]
        tensors = [(weight, dim)]
        if member.side != "in":
            tensors += [(t, 0) for t in beside if t is not None and t.shape == (weight.shape[dim],)]
    for tensor, dim in tensors:
        for feature in features:
            places = [torch.tensor(group.indices(member, [unit])) for unit in feature]
            total = torch.stack([tensor.index_select(dim, at) for at in places]).sum(0)
            tensor.index_copy_(dim, places[0], total if member.side == "in" else total / len(feature))
