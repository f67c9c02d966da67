"""SliceGPT: turn the residual to its principal axes without changing the function, then cut off the weak ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Width
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.core.modelmap import ModelMap, Norm
from trimtab.formats.structure import branch_path, change, put_weight, weight_of
from trimtab.parts.folding import centred, fold_norm, normalised_moment, principal_axes


@dataclass(frozen=True)
class SliceGPT(Rewriter):
    """Fold the norms, rotate what lies between each two of them to its principal axes, keep the leading `k`.

    RMSNorm(X Q) = RMSNorm(X) Q for every orthogonal Q, so with Q_l the eigenvectors of C_l = E[x x^T] of the l-th norm's output x:
    W_in <- Q_l^T W_in for the weights that read through norm l, W_out <- W_out Q_(l+1) for those that write before norm l+1, the
    embedding E <- E Q_1, and the residual around the branch between them passes S_l = Q_l^T Q_(l+1). (The paper's weights stand on
    the right of X; ours are `[out, in]`, their transposes.) A layer norm becomes an RMS norm first: its mean is taken out of every
    writer, its scale and shift go into the readers. Slicing keeps the first k columns of every Q. At `w100%` only the rotation is done.

    Fields:
        shared: one Q for the whole residual, from the mean of all C_l: no S_l are needed, and the result of a model with RMS norms
            is an ordinary, narrower one. The paper: a Q for each branch (False).
        multiple: k is rounded to a multiple of this, for the sake of the kernels; the authors' code uses 8.
        damp: share of the mean diagonal added to C_l; the authors' code uses 0.01.

    Reference: Ashkboos et al. 2024, arXiv:2401.15024, theorem 1, sections 3.1-3.4.
    Departures: all C_l are those of the dense network, as the paper's text has them; the authors' code collects each from the network
        sliced so far, in front of the norm. The norms divide by the root mean square over the k axes kept; the factor (D / k)^(1/2)
        in their scale makes that the mean over all D, as the authors' norm has it. S_l is stored as S_l - I.
    """

    shared: bool = False
    multiple: int = 8
    damp: float = 0.01

    card = Card(
        "slicegpt",
        catalogue=(169,),
        paper="arXiv:2401.15024",
        claim="Rotation alone keeps the outputs; at 25 % slicing the loss is below that of deleting random or unrotated columns.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float", "rotated", "narrowed", "norm-folded"}),
        keeps=frozenset({"deterministic"}),
        levels=("w50%", "w75%", "w100%"),
        kinds=frozenset({"channels", "embedding", "linear", "head"}),
    )

    def rewrite(self, scene: Scene, *, gram: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> None:
        """Rotate and slice the residual; every level that the scene names must be the same `Width`.

        Raises:
            UserError: different levels, or a residual that cannot be turned (the sentence says why).
        """
        stream = _stream(scene)
        keep = _size(scene, stream.width, self.multiple)
        axes = [q[:, :keep] for q in self._axes(scene, stream, gram, mean)]
        _turn(scene, stream, [axes[0]] * len(axes) if self.shared else axes)

    def _axes(self, scene: Scene, stream: _Stream, gram: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> list[Tensor]:
        """Q of each stage, `[width, width]` double."""
        moments = []
        for norms in stream.stages:
            norm = norms[0]
            seen = next((r for r in scene.modelmap.readers[norm.path] if r in gram and r in mean), None)
            if seen is None:
                raise UserError(f"slicegpt needs the input statistics of a weight behind {norm.path}, and none were collected")
            moments.append(normalised_moment(gram[seen], mean[seen], *_scale_shift(scene.model, norm)))
        if self.shared:
            return [principal_axes(torch.stack(moments).mean(0), self.damp)] * len(moments)
        return [principal_axes(m, self.damp) for m in moments]


@dataclass(frozen=True)
class _Stream:
    """The residual, in the order in which it is read and written.

    Fields:
        width: its size.
        stages: the norms that read each state of it; the last is the norm behind all branches.
        writers: (weight or parameter, its dimension along the residual, stage that reads it next).
        branches: (stage that it reads, path that it ends with) of each branch that a shortcut goes around.
    """

    width: int
    stages: tuple[tuple[Norm, ...], ...]
    writers: tuple[tuple[str, int, int], ...]
    branches: tuple[tuple[int, str], ...]


def _stream(scene: Scene) -> _Stream:
    """Read the residual from the map, and refuse one that a rotation would not leave alone."""
    modelmap: ModelMap = scene.modelmap
    residual = modelmap.residual
    if residual is None or not residual.prenorm or residual.norm not in ("rms", "layer") or any(s.post_norm for s in modelmap.sublayers):
        raise UserError("slicegpt needs a residual whose branches each begin, and do not end, with a norm, all norms of one kind")
    group = next((c for c in modelmap.coupled if set(residual.norms) <= {m.path for m in c.members if m.side == "norm"}), None)
    if group is None:
        raise UserError("slicegpt: the residual cannot be narrowed, for the model hands it out; load it with its head")
    read = {m.path for m in group.members if m.side == "in"}
    through = {r for path in residual.norms for r in modelmap.readers.get(path, ())}
    odd = [m.path for m in group.members if (m.repeat, m.stride, m.offset) != (1, 1, 0) or m.side == "depthwise"]
    odd += [p for p in sorted(read ^ through) + sorted(read) if p not in through or scene.model.get_submodule(p).weight.dim() != 2]
    if odd or group.padded:
        raise UserError(f"slicegpt: no rotation can be folded into {odd[0] if odd else 'padded channels'}")
    norms = {n.path: n for n in modelmap.norms}
    place = {m.path: i for i, m in enumerate(group.members)}
    stages: list[tuple[Norm, ...]] = []
    branches, next_stage, first_output = [], {}, 0
    for sub in modelmap.sublayers:
        if sub.norm is None or not sub.outputs:
            raise UserError(f"slicegpt: the branch {sub.path} does not read the residual through one norm")
        norm = norms[sub.norm]
        # Parallel branches: one norm for both, or a norm that runs before the other branch has written.
        if stages and (norm in stages[-1] or place[norm.path] < first_output):
            stages[-1] = tuple(dict.fromkeys((*stages[-1], norm)))
        else:
            branches.append((len(stages), branch_path(modelmap, sub) or sub.outputs[-1]))
            stages.append((norm,))
            first_output = place[sub.outputs[0]]
        next_stage |= dict.fromkeys(sub.outputs, len(stages))
    behind = tuple(norms[p] for p in residual.norms if not any(norms[p] in s for s in stages))
    if len(behind) != 1:
        raise UserError(f"slicegpt: {len(behind)} norms lie behind the last branch; one was expected")
    writers = [
        (m.path, m.dim if m.side == "param" else int(isinstance(scene.model.get_submodule(m.path), nn.Embedding)), next_stage.get(m.path, 0))
        for m in group.members
        if m.side in ("out", "param")
    ]
    return _Stream(residual.width, (*stages, behind), tuple(writers), tuple(branches))


def _size(scene: Scene, width: int, multiple: int) -> int:
    """k, from the level."""
    levels = set(scene.levels.values())
    if len(levels) != 1 or not isinstance(level := next(iter(levels)), Width):
        raise UserError(f"slicegpt takes one width for the whole residual, such as w75%; {', '.join(map(str, levels)) or 'none'} was given")
    if level.keep == 1:
        return width
    return min(width, max(1, round(level.keep * width / multiple)) * multiple)


def _scale_shift(model: nn.Module, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """A norm's effective scale and shift, double."""
    scale = torch.ones(norm.width) if norm.weight is None else norm.offset + model.get_parameter(norm.weight).detach()
    return scale.double(), None if norm.bias is None else model.get_parameter(norm.bias).detach().double()


def _turn(scene: Scene, stream: _Stream, axes: list[Tensor]) -> None:
    """Fold every norm, and write everything that touches the residual in the axes of its stage, each `[width, k]`."""
    model, modelmap, layer = scene.model, scene.modelmap, scene.modelmap.residual.norm == "layer"
    touched = {p for norms in stream.stages for n in norms for p in modelmap.readers[n.path]} | {p for p, _, _ in stream.writers}
    for path in [n.rpartition(".")[0] for group in modelmap.tied for n in group[1:]]:
        if path in touched:
            change(model, scene.edits, "untie", path)
    for q, norms in zip(axes, stream.stages, strict=True):
        for norm in norms:
            scale, shift = _scale_shift(model, norm)
            for path in modelmap.readers[norm.path]:
                module = model.get_submodule(path)
                bias = None if module.bias is None else module.bias.detach().double()
                weight, bias = fold_norm(weight_of(module).double(), bias, scale, shift)
                _store(scene, path, weight @ q, bias)
            _renorm(scene, norm, q.shape[1], layer)
    for path, dim, stage in stream.writers:
        bare = path in dict(model.named_parameters())
        module = None if bare else model.get_submodule(path)
        weight = (model.get_parameter(path).detach() if module is None else weight_of(module)).double()
        bias = None if module is None or getattr(module, "bias", None) is None else module.bias.detach().double()
        if layer:
            weight, bias = centred(weight, dim), None if bias is None else centred(bias, 0)
        weight = torch.tensordot(weight, axes[stage], dims=([dim], [0])).movedim(-1, dim)
        _store(scene, path, weight, None if bias is None else bias @ axes[stage])
    for stage, branch in stream.branches if not all(q is axes[0] for q in axes) else ():
        turn = axes[stage].T @ axes[stage + 1]
        path = f"{branch.rpartition('.')[0]}.shortcut_{stage}"
        change(model, scene.edits, "shortcut", path, norm=stream.stages[stage][0].path, branch=branch, width=len(turn))
        put_weight(model.get_submodule(path), turn.T - torch.eye(len(turn), dtype=turn.dtype))


def _store(scene: Scene, path: str, weight: Tensor, bias: Tensor | None) -> None:
    """Put values at a module or bare parameter, resized as they need."""
    model = scene.model
    if path in dict(model.named_parameters()):
        change(model, scene.edits, "resize", path, shape=list(weight.shape))
        with torch.no_grad():
            model.get_parameter(path).copy_(weight)
        return
    module = model.get_submodule(path)
    new_bias = bias is not None and module.bias is None
    if new_bias or weight_of(module).shape != weight.shape:
        change(model, scene.edits, "resize", path, shape=list(weight.shape), bias=new_bias or None)
    put_weight(module, weight, bias)


def _renorm(scene: Scene, norm: Norm, k: int, layer: bool) -> None:
    """Leave a norm with no scale but the one that makes its mean over k axes the mean over all."""
    if layer:
        eps = float(scene.model.get_submodule(norm.path).eps)
        change(scene.model, scene.edits, "norm", norm.path, width=k, eps=eps)
    elif k != norm.width:
        change(scene.model, scene.edits, "resize", norm.path, shape=[k])
    offset = 0.0 if layer else norm.offset
    put_weight(scene.model.get_submodule(norm.path), torch.full((k,), (norm.width / k) ** 0.5 - offset))
