"""SliceGPT: turn the residual to its principal axes without changing the function, then cut off the weak ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Width
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.core.modelmap import Norm
from trimtab.formats.cutting import bias_of, store
from trimtab.formats.structure import change, put_weight, weight_of
from trimtab.parts.folding import centred, fold_norm, normalised_moment, principal_axes
from trimtab.parts.residual import Stages, stages


@dataclass(frozen=True)
class SliceGPT(Rewriter):
    """Fold the norms, rotate what lies between each two of them to its principal axes, keep the leading `k`.

    RMSNorm(X Q) = RMSNorm(X) Q for every orthogonal Q, so with Q_l the eigenvectors of C_l = E[x x^T] of the output x
    of the l-th norm: W_in <- Q_l^T W_in for the weights that read through norm l, W_out <- W_out Q_(l+1) for those that
    write before norm l+1, the embedding E <- E Q_1, and the residual around the branch between them passes
    S_l = Q_l^T Q_(l+1). (The paper's weights stand on the right of X; ours are `[out, in]`, their transposes.) A layer
    norm becomes an RMS norm first: its mean is taken out of every writer, its scale and shift go into the readers.
    Slicing keeps the first k columns of every Q. At `w100%` only the rotation is done.

    Fields:
        shared: one Q for the whole residual, from the mean of all C_l: no S_l are needed, and a model with RMS norms
            becomes an ordinary, narrower one. The paper: a Q for each branch (False).
        multiple: k is rounded to a multiple of this, for the sake of the kernels; the authors' code uses 8.
        damp: share of the mean diagonal added to C_l; the authors' code uses 0.01.

    Reference: Ashkboos et al. 2024, arXiv:2401.15024, theorem 1, sections 3.1-3.4.
    Departures: all C_l are those of the dense network, as the paper's text has them; the authors' code collects each
        from the network sliced so far, in front of the norm. The norms divide by the root mean square over the k axes
        kept; the factor (D / k)^(1/2) in their scale makes that the mean over all D, as the authors' norm has it. What
        is stored is S_l - I. A norm whose readers have no statistics (a head tied to the embedding) takes the C of the
        norm before. Of parallel branches with a norm each, the map does not tell that they are parallel; such
        a model says so at its first run, and takes `shared=True`.

    >>> from torch import nn
    >>> from trimtab.core.modelmap import trace
    >>> class Branch(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
    ...     def forward(self, x):
    ...         return x + self.down(self.up(self.norm(x)).relu())
    >>> model = nn.Sequential(nn.Embedding(9, 8), Branch(), Branch(), nn.RMSNorm(8), nn.Linear(8, 9))
    >>> ids = torch.arange(9)[None]
    >>> before, modelmap = model(ids), trace(model, ids)
    >>> eye = {site.path: torch.eye(8) for site in modelmap.sites}
    >>> zero = {site.path: torch.zeros(8) for site in modelmap.sites}
    >>> scene = Scene(model, modelmap, levels={"0": Width(1.0)})
    >>> SliceGPT().rewrite(scene, gram=eye, mean=zero)
    >>> bool((model(ids) - before).abs().max() < 1e-4), [edit["op"] for edit in scene.edits]
    (True, ['shortcut', 'shortcut'])
    """

    shared: bool = False
    multiple: int = 8
    damp: float = 0.01

    card = Card(
        "slicegpt",
        catalogue=(169,),
        paper="arXiv:2401.15024",
        claim="Rotation keeps the outputs; at 25 % slicing the loss is below deleting random or unrotated columns.",
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
        stream = stages(scene.model, scene.modelmap)
        keep = _size(scene, stream.width, self.multiple)
        axes = [q[:, :keep] for q in self._axes(scene, stream, gram, mean)]
        _turn(scene, stream, [axes[0]] * len(axes) if self.shared else axes)

    def _axes(
        self, scene: Scene, stream: Stages, gram: Mapping[str, Tensor], mean: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Q of each stage, `[width, width]` double."""
        moments: list[Tensor] = []
        for norms in stream.norms:
            norm = norms[0]
            seen = next((r for r in scene.modelmap.readers[norm.path] if r in gram and r in mean), None)
            if seen is not None:
                moments.append(normalised_moment(gram[seen], mean[seen], *_scale_shift(scene.model, norm)))
            elif moments:
                moments.append(moments[-1])
            else:
                raise UserError(f"slicegpt needs the input statistics of a weight behind {norm.path}; there are none")
        if self.shared:
            return [principal_axes(torch.stack(moments).mean(0), self.damp)] * len(moments)
        return [principal_axes(m, self.damp) for m in moments]


def _size(scene: Scene, width: int, multiple: int) -> int:
    """k, from the level."""
    if strange := set(scene.levels) - {s.path for s in scene.modelmap.sites}:
        raise UserError(f"slicegpt: {min(strange)!r} was named, and is no weight of this model")
    levels = set(scene.levels.values())
    if len(levels) != 1 or not isinstance(level := next(iter(levels)), Width):
        given = ", ".join(sorted(map(str, levels))) or "none"
        raise UserError(f"slicegpt takes one width for the whole residual, such as w75%; {given} was given")
    if level.keep == 1:
        return width
    return min(width, max(1, round(level.keep * width / multiple)) * multiple)


def _scale_shift(model: nn.Module, norm: Norm) -> tuple[Tensor, Tensor | None]:
    """A norm's effective scale and shift, double."""
    scale = torch.ones(norm.width) if norm.weight is None else norm.offset + model.get_parameter(norm.weight).detach()
    return scale.double(), None if norm.bias is None else model.get_parameter(norm.bias).detach().double()


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _turn(scene: Scene, stream: Stages, axes: list[Tensor]) -> None:
    """Fold every norm, and write everything that touches the residual in the axes of its stage, each `[width, k]`."""
    model, modelmap, layer = scene.model, scene.modelmap, scene.modelmap.residual.norm == "layer"
    touched = {p for p, _, _ in stream.writers} | {
        p for ns in stream.norms for n in ns for p in modelmap.readers[n.path]
    }
    for path in [n.rpartition(".")[0] for group in modelmap.tied for n in group[1:]]:
        if path in touched:
            change(model, scene.edits, "untie", path)
    for q, norms in zip(axes, stream.norms, strict=True):
        for norm in norms:
            scale, shift = _scale_shift(model, norm)
            for path in modelmap.readers[norm.path]:
                module = model.get_submodule(path)
                weight, bias = fold_norm(weight_of(module).double(), _double(bias_of(module)), scale, shift)
                store(model, scene.edits, path, weight @ q, bias)
            _renorm(scene, norm, q.shape[1], layer)
    parameters = dict(model.named_parameters())
    for path, dim, stage in stream.writers:
        bare = path in parameters
        weight = (parameters[path].detach() if bare else weight_of(model.get_submodule(path))).double()
        bias = None if bare else _double(bias_of(model.get_submodule(path)))
        if layer:
            weight, bias = centred(weight, dim), None if bias is None else centred(bias, 0)
        weight = torch.tensordot(weight, axes[stage], dims=([dim], [0])).movedim(-1, dim)
        store(model, scene.edits, path, weight, None if bias is None else bias @ axes[stage])
    for stage, branch in stream.branches if not all(q is axes[0] for q in axes) else ():
        turn = axes[stage].T @ axes[stage + 1]
        path = f"{branch.rpartition('.')[0]}.shortcut_{stage}"
        change(model, scene.edits, "shortcut", path, norm=stream.norms[stage][0].path, branch=branch, width=len(turn))
        put_weight(model.get_submodule(path), turn.T - torch.eye(len(turn), dtype=turn.dtype))


def _renorm(scene: Scene, norm: Norm, k: int, layer: bool) -> None:
    """Leave a norm with no scale but the one that makes its mean over k axes the mean over all."""
    if layer:
        eps = getattr(scene.model.get_submodule(norm.path), "eps", 1e-5)
        change(scene.model, scene.edits, "norm", norm.path, width=k, eps=eps)
    elif k != norm.width:
        change(scene.model, scene.edits, "resize", norm.path, shape=[k])
    offset = 0.0 if layer else norm.offset
    put_weight(scene.model.get_submodule(norm.path), torch.full((k,), (norm.width / k) ** 0.5 - offset))
