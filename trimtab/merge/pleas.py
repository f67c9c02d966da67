"""PLeaS: match the units of two models, keep apart what matches badly, and solve each layer for both's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.coupling import Coupled, Member
from trimtab.core.errors import UserError
from trimtab.core.method import Card, Joiner, Scene
from trimtab.formats.cutting import bias_of
from trimtab.formats.structure import put_weight, weight_of
from trimtab.parts.alignment import Blend, assignment, gathered, paired, shares, widens

Moments = Mapping[tuple[str, ...], Tensor]
Models = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class PLeaS(Joiner):
    """Two models of one architecture into one of a chosen width: permute and pair units, then least squares a layer.

    Unit i of A is paired with unit p(i) of B, p = argmin sum_i d(i, p(i)), d the distance of what the units give on
    data, summed over all layers that make or read them; the share `extra` of pairs that are least alike stays apart.
    With z = (S_A x_A + S_B x_B) the inputs of a layer of the result (the mean where joined, a model's own else) and
    y = T_A (W_A x_A + b_A) + T_B (W_B x_B + b_B) its wanted outputs, W = argmin E |W z - y|^2 + r |W - W_0|^2;
    no weight leads from a unit of A alone to one of B alone. W_0 joins the weights as z and y are joined.

    Args:
        extra: share of units kept apart, from 0 (as wide as either model) to 1 (both side by side) (0).
        damp: r, as a share of the mean diagonal of E[z z^T] (0.01).
        permute: match units; else unit i of both is taken for the same (True).
        refit: least squares; else W_0, which is the mean of the aligned models at `extra` 0 (True).

    Reference: Nasery et al. 2024, arXiv:2407.02447, sections 3.1 and 3.2, algorithm 1.
    Departures: the least squares are solved in closed form, where the authors' code takes some hundred steps of Adam
        from W_0; `extra` is one share for all layers, where they solve for a share a layer under a budget of
        operations; heads of attention keep their order; residual widths under norms, and dimensions in several
        pieces, are permuted and not widened. Batch norms are to see the result once, `engine.joining.settle`.

    >>> import copy
    >>> from trimtab.engine.joining import join
    >>> one = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> other, order = copy.deepcopy(one), torch.arange(8).flip(0)
    >>> _ = other.load_state_dict({**one.state_dict(), "0.weight": one[0].weight[order],
    ...     "0.bias": one[0].bias[order], "2.weight": one[2].weight[:, order]})
    >>> x = torch.randn(99, 4, generator=torch.Generator().manual_seed(0))
    >>> joined = join(PLeaS(), [one, other], [{"input": x}])
    >>> torch.allclose(joined(x), one(x), atol=1e-5)
    True
    """

    extra: float = 0.0
    damp: float = 0.01
    permute: bool = True
    refit: bool = True

    card = Card(
        "pleas",
        catalogue=(231,),
        paper="arXiv:2407.02447",
        claim="Two models of different origin: above permuting and averaging at equal width, and better the wider.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float"}),
        keeps=frozenset({"deterministic"}),
    )

    def places(self, scenes: Sequence[Scene]) -> tuple[tuple[str, ...], ...]:
        """Every linear and convolution that is not grouped.

        Raises:
            UserError: not two models of one architecture, or a share outside of [0, 1].
        """
        self._check(scenes)
        kinds = ("linear", "conv", "head")
        return tuple((s.path, s.path) for s in scenes[0].modelmap.sites if s.kind in kinds and s.groups == 1)

    def join(self, scenes: Sequence[Scene], *, moments: Moments) -> nn.Module:
        """The joined model, of the first one's class."""
        first, second = (scene.model for scene in scenes)
        blend = Blend(first, second, self._pairs(scenes, moments))
        result = blend.model()
        tied = {name for group in scenes[0].modelmap.tied for name in group}
        for path, _ in moments if self.refit else ():
            if f"{path}.weight" not in tied:
                self._refit(result.get_submodule(path), (first, second), path, blend.sides(path), moments[path, path])
        return result

    def _check(self, scenes: Sequence[Scene]) -> None:
        if not 0 <= self.extra <= 1:
            raise UserError(f"pleas was given extra={self.extra:g}; it is a share of the units, in [0, 1]")
        if len(scenes) != 2:
            raise UserError(f"pleas was given {len(scenes)} models; it joins two")
        shapes = [{name: tuple(t.shape) for name, t in _tensors(scene.model)} for scene in scenes]
        for name in shapes[0].keys() | shapes[1].keys():
            if shapes[0].get(name) != shapes[1].get(name):
                raise UserError(f"{name} has shape {shapes[0].get(name)} in the first model and {shapes[1].get(name)} "
                                "in the second; pleas joins models of one architecture and size")  # fmt: skip

    def _pairs(self, scenes: Sequence[Scene], moments: Moments) -> dict[Coupled, Tensor]:
        """Which units of each group are joined, and which stand alone."""
        modelmap = scenes[0].modelmap
        fixed = frozenset(n.path for n in modelmap.norms if n.kind != "batch" or n.weight is None)
        found = {}
        for group in modelmap.coupled:
            seen = [d for m in group.members if (d := _distance(scenes, group, m, moments)) is not None]
            gain = -torch.stack(seen).sum(0) if seen else torch.eye(group.width)
            free = self.permute and group.kind == "channels"
            partner = assignment(gain) if free else torch.arange(group.width)
            alone = round(self.extra * group.width) if widens(group, fixed) else 0
            found[group] = paired(partner, gain[torch.arange(group.width), partner], alone)
        return found

    def _refit(self, module: nn.Module, models: Models, path: str, sides: tuple[Tensor, Tensor], joint: Tensor) -> None:
        """Solve a layer of the result, whose weight is W_0 so far."""
        start, bias = weight_of(module).double(), bias_of(module)
        patch, ends = start[0, 0].numel() if start.dim() > 2 else 1, int(bias is not None)
        outputs, inputs = sides
        channels = torch.eye(int((inputs[:, 0] >= 0).sum()), dtype=torch.double)
        chosen = [torch.kron(shares(inputs)[:, m : m + 1] * gathered(channels, inputs[:, m], 0), torch.eye(patch))
                  for m in (0, 1)]  # fmt: skip
        select = torch.block_diag(torch.cat(chosen, 1), torch.ones(ends, 1, dtype=torch.double))
        parts = [shares(outputs)[:, m : m + 1] * gathered(_wide(models[m], path, m), outputs[:, m], 0) for m in (0, 1)]
        gram, cross = select @ joint @ select.T, (parts[0] + parts[1]) @ joint @ select.T
        weight = torch.cat([start.flatten(1), *([bias.double()[:, None]] if bias is not None else [])], 1)
        owners = [(pairs >= 0).int() @ torch.tensor([1, 2], dtype=torch.int32) for pairs in sides]  # 3: of both
        reach = torch.cat([owners[1].repeat_interleave(patch), torch.full((ends,), 3)])
        for owner in owners[0].unique().tolist():
            rows, cols = (owners[0] == owner).nonzero()[:, 0], ((reach & owner) > 0).nonzero()[:, 0]
            at = (rows[:, None], cols)
            weight[at] = _ridge(gram[cols][:, cols], cross[at], weight[at], self.damp)
        put_weight(module, weight[:, : start[0].numel()].reshape(start.shape), weight[:, -1] if ends else None)


def _ridge(gram: Tensor, cross: Tensor, old: Tensor, damp: float) -> Tensor:
    ridge = damp * gram.diagonal().mean().clamp_min(1e-12)
    inside = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(inside, (cross + ridge * old).T).T


def _wide(model: nn.Module, path: str, place: int) -> Tensor:
    """A layer's weight and bias over [x_1, x_2, 1], as which model's it is."""
    module = model.get_submodule(path)
    weight, bias = weight_of(module).double().flatten(1), bias_of(module)
    parts = [torch.zeros_like(weight), torch.zeros_like(weight), weight.new_zeros(len(weight), 1)]
    parts[place] = weight
    if bias is not None:
        parts[2] = bias.double()[:, None]
    return torch.cat(parts, 1)


def _distance(scenes: Sequence[Scene], group: Coupled, member: Member, moments: Moments) -> Tensor | None:
    """Root mean square distance between units of the two models where a member makes or reads them."""
    joint = moments.get((member.path, member.path))
    if joint is None or member.side not in ("in", "out"):
        return None
    index = torch.tensor(group.indices(member, list(range(group.width))))
    if member.side == "in":
        weight = weight_of(scenes[0].model.get_submodule(member.path))
        patch = weight[0, 0].numel() if weight.dim() > 2 else 1
        index = (index[:, None] * patch + torch.arange(patch)).flatten()
        size = len(joint) // 2
        sides = [torch.eye(len(joint), dtype=torch.double)[index + m * size] for m in (0, 1)]
    else:
        sides = [_wide(scene.model, member.path, m)[index] for m, scene in enumerate(scenes)]
    own = [((s @ joint) * s).sum(1).reshape(group.width, -1).sum(1) for s in sides]
    one, other = (s.reshape(group.width, -1, len(joint)) for s in sides)
    cross = torch.einsum("aei,ij,bej->ab", one, joint, other)
    return (own[0][:, None] + own[1] - 2 * cross).clamp_min(0).sqrt()


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
