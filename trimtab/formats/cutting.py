"""Weights made smaller in place: each change of shape is recorded as an edit, and the values are put where they go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.coupling import Coupled, Member
from trimtab.formats.structure import change, put_weight, weight_of

Edits = list[dict[str, Any]]
Take = Callable[[str, Tensor, Tensor], Tensor]


def bias_of(module: nn.Module) -> Tensor | None:
    """A module's bias, or None."""
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


def store(model: nn.Module, edits: Edits, path: str, weight: Tensor, bias: Tensor | None = None) -> None:
    """Put values at a module or a bare parameter, which is resized, or given a bias, as they need.

    Args:
        weight: `[out, in, ...]`, as methods see it.
        bias: `[out]`; None leaves a bias as it is.
    """
    if path in dict(model.named_parameters()):
        change(model, edits, "resize", path, shape=list(weight.shape))
        with torch.no_grad():
            model.get_parameter(path).copy_(weight)
        return
    module = model.get_submodule(path)
    new_bias = bias is not None and bias_of(module) is None
    if new_bias or weight_of(module).shape != weight.shape:
        change(model, edits, "resize", path, shape=list(weight.shape), bias=new_bias or None)
    put_weight(module, weight, bias)


def out_dim(module: nn.Module) -> int:
    """The dimension of `weight_of(module)` along which its outputs lie."""
    return 1 if isinstance(module, nn.Embedding) else 0


def units_of(model: nn.Module, group: Coupled, member: Member) -> Tensor:
    """The part of a member's weight that belongs to each unit of a group: `[units, entries]`."""
    if member.side == "param":
        weight, dim = model.get_parameter(member.path).detach(), member.dim
    else:
        module = model.get_submodule(member.path)
        weight, dim = weight_of(module), 1 if member.side == "in" else out_dim(module)
    index = torch.tensor(group.indices(member, list(range(group.width))))
    return weight.index_select(dim, index).movedim(dim, 0).reshape(group.width, -1)


def cut_units(
    model: nn.Module, edits: Edits, cuts: Mapping[Coupled, tuple[int, ...]], take: Take | None = None
) -> None:
    """Remove units of coupled dimensions from everything that they run through.

    All groups are cut at once: a weight may belong to several, and its indices are those before any cut.

    Args:
        cuts: units to remove of each group.
        take: (path, weight, kept inputs) -> the weight of those inputs; None takes the columns as they are.
    """
    gone: dict[str, dict[tuple[str, int], set[int]]] = {}
    for group, units in cuts.items():
        for member in group.members if units else ():
            places = gone.setdefault(member.path, {}).setdefault((member.side, member.dim), set())
            places |= set(group.indices(member, units))
    for path, sides in gone.items():
        if any(side == "param" for side, _ in sides):
            value = model.get_parameter(path).detach()
            for (_, dim), places in sides.items():
                value = value.index_select(dim, _rest(value.shape[dim], places))
            store(model, edits, path, value)
        else:
            _cut_module(model, edits, path, {side: places for (side, _), places in sides.items()}, take)


def _cut_module(model: nn.Module, edits: Edits, path: str, sides: Mapping[str, set[int]], take: Take | None) -> None:
    module = model.get_submodule(path)
    weight = weight_of(module)
    tensors = [*module._parameters.items(), *module._buffers.items()]
    beside = {k: v.detach() for k, v in tensors if v is not None and k != "weight"}
    groups = None
    for side, places in sides.items():
        dim = 1 if side == "in" else out_dim(module)
        size = weight.shape[dim]
        keep = _rest(size, places)
        weight = take(path, weight, keep) if side == "in" and take else weight.index_select(dim, keep)
        if side != "in":
            beside = {k: v[keep] if v.shape == (size,) else v for k, v in beside.items()}
        if side == "depthwise":
            groups = len(keep)
    change(model, edits, "resize", path, shape=list(weight.shape), groups=groups)
    put_weight(module, weight)
    for name, value in beside.items():
        getattr(module, name).detach().copy_(value)


def _rest(size: int, places: set[int]) -> Tensor:
    return torch.tensor([i for i in range(size) if i not in places])
