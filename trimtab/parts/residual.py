"""The residual stream in the order in which it is read and written, for whoever wants to turn it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trimtab.core.coupling import Coupled
from trimtab.core.errors import UserError
from trimtab.core.modelmap import ModelMap, Norm, Residual
from trimtab.formats.cutting import out_dim
from trimtab.formats.structure import branch_path


@dataclass(frozen=True)
class Stages:
    """The states of the residual: each branch reads one and writes the next.

    Fields:
        width: size of the residual.
        norms: the norms that read each state; the last state is behind all branches.
        writers: (weight or parameter, its dimension along the residual, state that it writes to).
        branches: (state that it reads, path that it ends with) of one branch between each two states.
    """

    width: int
    norms: tuple[tuple[Norm, ...], ...]
    writers: tuple[tuple[str, int, int], ...]
    branches: tuple[tuple[int, str], ...]


def stages(model: nn.Module, modelmap: ModelMap) -> Stages:
    """Read the stages of the residual from the map.

    Raises:
        UserError: a residual that is read or written in a way that a rotation would not leave alone.
    """
    residual = modelmap.residual
    after = any(s.post_norm for s in modelmap.sublayers)
    if residual is None or not residual.prenorm or residual.norm not in ("rms", "layer") or after:
        raise UserError(
            "the residual cannot be turned: its branches must each begin, and not end, with a norm, all of one kind"
        )
    group = _group(model, modelmap, residual)
    norms = {n.path: n for n in modelmap.norms}
    place = {m.path: i for i, m in enumerate(group.members)}
    states: list[tuple[Norm, ...]] = []
    branches: list[tuple[int, str]] = []
    writes: dict[str, int] = {}
    first_output = 0
    for sub in modelmap.sublayers:
        if sub.norm is None or not sub.outputs:
            raise UserError(f"the residual cannot be turned: the branch {sub.path} does not read it through one norm")
        norm = norms[sub.norm]
        # Parallel branches: one norm for both, or a norm that runs before the other branch has written.
        if states and (norm in states[-1] or place[norm.path] < first_output):
            states[-1] = tuple(dict.fromkeys((*states[-1], norm)))
        else:
            branches.append((len(states), branch_path(modelmap, sub) or sub.outputs[-1]))
            states.append((norm,))
            first_output = place[sub.outputs[0]]
        writes |= dict.fromkeys(sub.outputs, len(states))
    behind = tuple(norms[p] for p in residual.norms if not any(norms[p] in s for s in states))
    if len(behind) != 1:
        raise UserError(f"the residual cannot be turned: {len(behind)} norms lie behind its last branch, not one")
    writers = [
        (m.path, m.dim if m.side == "param" else out_dim(model.get_submodule(m.path)), writes.get(m.path, 0))
        for m in group.members
        if m.side in ("out", "param")
    ]
    return Stages(residual.width, (*states, behind), tuple(writers), tuple(branches))


def _group(model: nn.Module, modelmap: ModelMap, residual: Residual) -> Coupled:
    """The coupled dimension that is the residual; everything on it must be able to take a rotation."""

    def holds(group: Coupled) -> bool:
        return set(residual.norms) <= {m.path for m in group.members if m.side == "norm"}

    group = next((c for c in modelmap.coupled if holds(c)), None)
    if group is None:
        raise UserError("the residual cannot be turned: the model hands it out; load the model with its head")
    read = {m.path for m in group.members if m.side == "in"}
    folded = {r for path in residual.norms for r in modelmap.readers.get(path, ())}
    odd = [m.path for m in group.members if (m.repeat, m.stride, m.offset) != (1, 1, 0) or m.side == "depthwise"]
    odd += sorted(read ^ folded)
    odd += [s.path for s in modelmap.sites if s.kind == "experts" and s.path in {m.path for m in group.members}]
    odd += [p for p in sorted(read & folded - set(odd)) if model.get_submodule(p).get_parameter("weight").dim() != 2]
    if odd or group.padded or not residual.closed:
        raise UserError(
            f"the residual cannot be turned: no rotation folds into {odd[0] if odd else 'what else reads it'}"
        )
    return group
