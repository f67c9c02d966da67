"""Units of two models of one architecture, matched and laid out side by side in one.

A unit of a coupled dimension may be joined, one of each model, or stand alone. A layout says for every index of a
dimension of the result which index of the first model and which of the second goes in, -1 being none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.core.coupling import Coupled, Member
from trimtab.formats.cutting import out_dim
from trimtab.formats.structure import give_shape, weight_of

Pairs = Mapping[Coupled, Tensor]
"""For each group the pairs of its units, see `paired`."""


def assignment(gain: Tensor) -> Tensor:
    """For each row a column of its own, so that the sum of gains is largest.

    >>> assignment(torch.tensor([[1.0, 5.0], [2.0, 4.0]]))
    tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(gain.double().numpy(), maximize=True)[1])


def paired(partner: Tensor, likeness: Tensor, alone: int) -> Tensor:
    """Pairs of units `[units + alone, 2]`: of the first model in its order, then those of the second that stand alone.

    Args:
        partner: for each unit of the first model its partner in the second.
        likeness: of each such pair.
        alone: how many pairs, the least alike, are not joined.

    >>> paired(torch.tensor([1, 0, 2]), torch.tensor([3.0, 1.0, 2.0]), 1).tolist()
    [[0, 1], [1, -1], [2, 2], [-1, 0]]
    """
    apart = likeness.argsort(stable=True)[:alone].sort().values
    joined = partner.clone()
    joined[apart] = -1
    first = torch.stack([torch.arange(len(partner)), joined], 1)
    return torch.cat([first, torch.stack([torch.full_like(apart, -1), partner[apart]], 1)])


def widens(group: Coupled, fixed: frozenset[str]) -> bool:
    """Whether units can be added to a group: each lies in one piece, and no norm or padding counts them.

    Args:
        fixed: paths of the norms over the dimension itself.
    """
    return group.kind == "channels" and not group.padded and all(
        m.stride == m.repeat and m.path not in fixed for m in group.members
    )  # fmt: skip


def layout(size: int, placed: Mapping[Member, Tensor]) -> Tensor:
    """Indices of both models for each index of a dimension of the result `[new size, 2]`.

    Args:
        size: of the dimension in either model.
        placed: the groups' members that lie on it, each with the pairs of its units.

    >>> pairs = torch.tensor([[0, 1], [1, -1], [-1, 0]])
    >>> layout(3, {Member("up", "out"): pairs}).tolist()
    [[0, 1], [1, -1], [-1, 0], [2, 2]]
    """
    rows: list[list[tuple[int, int]]] = [[(i, i)] for i in range(size)]
    for member, pairs in placed.items():
        units = int((pairs[:, 0] >= 0).sum())
        last = member.offset + (units - 1) * member.stride + member.repeat - 1
        for first, second in pairs.tolist():
            for k in range(member.repeat):
                at, other = (member.offset + unit * member.stride + k for unit in (first, second))
                if first < 0:
                    rows[last].append((-1, other))
                else:
                    rows[at][0] = (at, other if second >= 0 else -1)
    return torch.tensor([pair for row in rows for pair in row])


def gathered(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """The slices of a tensor at these indices, zeros where an index is -1."""
    taken = tensor.index_select(dim, index.clamp_min(0))
    gone = (index < 0).reshape([-1 if d == dim % tensor.dim() else 1 for d in range(tensor.dim())])
    return taken.masked_fill(gone, 0)


def shares(pairs: Tensor) -> Tensor:
    """How much of each model goes into each output `[outputs, 2]`: a half where both do, else all of the one."""
    there = (pairs >= 0).double()
    return there / there.sum(1, keepdim=True)


def blended(first: Tensor, second: Tensor, outputs: Tensor, dim: int = 0, inputs: Tensor | None = None) -> Tensor:
    """A tensor of the result: joined outputs are the mean of both models', others one model's own.

    Args:
        outputs: layout of the dimension `dim`.
        inputs: layout of dimension 1; None: as it is.

    >>> pairs = torch.tensor([[0, 1], [1, -1], [-1, 0]])
    >>> blended(torch.tensor([2.0, 4.0]), torch.tensor([6.0, 8.0]), pairs)
    tensor([5., 4., 6.])
    """
    result: Tensor | None = None
    for model, tensor in enumerate((first, second)):
        part = gathered(tensor, outputs[:, model], dim)
        if inputs is not None:
            part = gathered(part, inputs[:, model], 1)
        share = shares(outputs)[:, model].to(part.dtype)
        part = part * share.reshape([-1 if d == dim else 1 for d in range(part.dim())])
        result = part if result is None else result + part
    assert result is not None
    return result


class Blend:
    """Two models of one architecture laid out in one, every tensor blended: joined units the mean, others their own.

    Args:
        first, second: the models, whose tensors have the same names and shapes.
        pairs: of the units of each coupled group.
    """

    def __init__(self, first: nn.Module, second: nn.Module, pairs: Pairs) -> None:
        self.first, self.second = first, second
        self.placed: dict[tuple[str, str, int], dict[Member, Tensor]] = {}
        for group, units in pairs.items():
            for member in group.members:
                self.placed.setdefault((member.path, member.side, member.dim), {})[member] = units

    def sides(self, path: str) -> tuple[Tensor, Tensor]:
        """Layouts of the outputs and of the inputs of a module with a weight; the latter alike where it has none."""
        weight, dim = weight_of(self.first.get_submodule(path)), out_dim(self.first.get_submodule(path))
        made = next((p for side in ("out", "norm", "depthwise") if (p := self.placed.get((path, side, 0)))), {})
        inputs = weight.shape[1] if weight.dim() > 1 else 0
        return layout(weight.shape[dim], made), layout(inputs, self.placed.get((path, "in", 0), {}))

    def model(self) -> nn.Module:
        """The blended model, of the first one's class."""
        result = copy.deepcopy(self.first)
        others = {**dict(self.second.named_parameters(remove_duplicate=False)), **dict(self.second.named_buffers())}
        with torch.no_grad():
            for path, module in result.named_modules(remove_duplicate=False):
                self._module(path, module, others)
        return result

    def _module(self, path: str, module: nn.Module, others: Mapping[str, Tensor]) -> None:
        source = self.first.get_submodule(path)
        outputs = None
        if source._parameters.get("weight") is not None:
            outputs, inputs = self.sides(path)
            dim, weight = out_dim(source), weight_of(source)
            across = inputs if dim == 0 and weight.dim() > 1 else None
            weight = blended(weight, weight_of(self.second.get_submodule(path)), outputs, dim, across)
            if weight.shape != weight_of(module).shape:
                groups = weight.shape[0] if getattr(module, "groups", 1) > 1 else None
                give_shape(module, list(weight.shape), groups=groups)
            weight_of(module).copy_(weight)
        for name, own in {**source._parameters, **source._buffers}.items():
            if own is None or name == "weight" or not own.is_floating_point():
                continue
            value, parameter = own.detach(), f"{path}.{name}" if path else name
            second = others[parameter].detach()
            spread = [(dim, p) for dim in range(value.dim()) if (p := self.placed.get((parameter, "param", dim)))]
            if outputs is not None and value.shape == (int((outputs[:, 0] >= 0).sum()),):
                new = blended(value, second, outputs)
            elif spread:
                new = blended(value, second, layout(value.shape[spread[0][0]], spread[0][1]), spread[0][0])
            else:
                new = (value + second) / 2
            getattr(module, name).detach().copy_(new)
