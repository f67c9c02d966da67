"""AWQ: scale the input channels that the activations make salient, before the weights are rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError
from trimtab.core.level import Float, Int
from trimtab.core.method import Card, Rewriter, Scene
from trimtab.core.modelmap import ModelMap, Norm
from trimtab.core.site import Site
from trimtab.parts.grids import grid_for, rotate


@dataclass(frozen=True)
class _Fold:
    """Linears that read one tensor, and what wrote it: a norm, or rows of a linear.

    Fields:
        readers: paths of the linears whose columns are multiplied by s.
        norm: the norm whose scale and shift are divided by s; None where a linear wrote the tensor.
        writer: path of the linear whose rows are divided by s; None where a norm wrote the tensor.
        rows: `[in]`: the writer's row behind each column of the readers.
    """

    readers: tuple[str, ...]
    norm: Norm | None = None
    writer: str | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class AWQ(Rewriter):
    """Multiply input channel j of a linear by s_j and divide what writes it by s_j: the function stays, rounding gains.

    s = s_X^alpha, s_X = mean |x| of each channel, divided by sqrt(max s * min s); alpha is searched over `grid` values
    from 0 on for the least error of the outputs under round-to-nearest at the site's level, ||Q(W diag(s)) diag(s)^-1 X
    - W X||^2, which is tr(dW gram dW^T). Linears that read one tensor share s. What writes the channel is the norm
    before them, the values' projection before the output projection, and the up projection before the down projection;
    only linears that the plan names are touched.

    Args:
        grid: values of alpha that are tried, i / grid for i = 0 .. grid - 1 (paper: 20).
        rows: output rows of each linear that the error is taken over, evenly spaced; 0 takes all.

    Reference: Lin et al. 2023, arXiv:2306.00978, section 3.2, equations 4 and 5.
    Departures: the error is that of the linears' own outputs, where the paper's code takes the attention's or the
        MLP's; over a sample of rows. With grouped queries the channels of the values are scaled by the mean over the
        queries that share them, where the paper's code leaves them. s_X is bounded below by 1e-4 of its mean. No
        clipping: `rtn(rule='mse')` as the next step shrinks ranges.

    >>> from trimtab.core.modelmap import trace
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8))
    >>> x = torch.randn(64, 32)
    >>> stats = {"1": model[0](x).detach()}
    >>> scene = Scene(model, trace(model, x), levels={"1": Int(3, 16)})
    >>> before = model(x)
    >>> AWQ().rewrite(scene, gram={"1": stats["1"].T @ stats["1"] / 64}, absmean={"1": stats["1"].abs().mean(0)})
    >>> torch.allclose(model(x), before, atol=1e-5)
    True
    """

    grid: int = 20
    rows: int = 512

    scope = "block"
    card = Card(
        "awq",
        catalogue=(53,),
        paper="arXiv:2306.00978",
        claim="Before round-to-nearest at 3 and 4 bits, perplexity falls below round-to-nearest alone at equal bytes.",
        requires=frozenset({"float"}),
        leaves=frozenset({"float"}),
        keeps=frozenset({"function", "shape", "deterministic"}),
        levels=("2b/g32", "3b/g64", "4b/row", "4b/g64", "mxfp4"),
        kinds=frozenset({"linear", "head"}),
    )

    def rewrite(self, scene: Scene, *, gram: Mapping[str, Tensor], absmean: Mapping[str, Tensor]) -> None:
        """Scale the linears that `scene.levels` names and fold the inverse into what feeds them.

        Raises:
            UserError: a path that the model does not have, or a level that is neither integers nor minifloats.
        """
        for path, level in scene.levels.items():
            scene.modelmap.site(path)
            if not isinstance(level, Int | Float):
                raise UserError(f"awq was asked for {level} at {path}; it takes integers and minifloats, like 4b/g64")
        for fold in _folds(scene.modelmap, set(scene.levels) & set(gram) & set(absmean)):
            sites = [scene.modelmap.site(path) for path in fold.readers]
            salience = _pooled(absmean[fold.readers[0]].float(), fold.rows)
            weights = [_weight(scene.model, s) for s in sites]
            levels = [scene.levels[s.path] for s in sites]
            scale = self._search(weights, levels, gram[fold.readers[0]].float(), salience)  # type: ignore[arg-type]
            for site, weight in zip(sites, weights, strict=True):
                _put(scene.model, site, weight * scale)
            if fold.norm is not None:
                _divide_norm(scene.model, fold.norm, scale)
            else:
                assert fold.writer is not None and fold.rows is not None
                by_row = torch.ones(scene.modelmap.site(fold.writer).shape[0]).index_copy(0, fold.rows, scale)
                _divide_rows(scene.model, scene.modelmap.site(fold.writer), by_row)

    def _search(self, weights: list[Tensor], levels: list[Int | Float], gram: Tensor, salience: Tensor) -> Tensor:
        """The scale `[in]` of least output error over the grid of alpha."""
        salience = (salience / salience.mean().clamp_min(torch.finfo(torch.float32).tiny)).clamp_min(1e-4)
        picked = [w[:: max(1, len(w) // self.rows)] if self.rows else w for w in weights]
        best, least = torch.ones_like(salience), float("inf")
        for i in range(self.grid):
            scale = salience ** (i / self.grid)
            scale = scale / (scale.max() * scale.min()).sqrt()
            error = 0.0
            for weight, whole, level in zip(picked, weights, levels, strict=True):
                missed = _nearest(weight * scale, level) / scale - weight
                error += float(((missed @ gram) * missed).sum()) * len(whole) / len(weight)
            if error < least:
                best, least = scale, error
        return best


def _nearest(weight: Tensor, level: Int | Float) -> Tensor:
    turned = rotate(weight, level)
    return rotate(grid_for(turned, level).round(turned)[1], level)


def _folds(modelmap: ModelMap, named: set[str]) -> Iterable[_Fold]:
    """What may be scaled: each linear touched is named and has its own weight; nothing else reads what is divided."""
    tied = {name.removesuffix(".weight") for group in modelmap.tied for name in group}
    own = {s.path for s in modelmap.sites if s.path in named and s.path not in tied and s.kind in ("linear", "head")}
    norms = {n.path: n for n in modelmap.norms}
    for path, readers in modelmap.readers.items():
        if set(readers) <= own and norms[path].weight is not None:
            yield _Fold(readers, norm=norms[path])
    for group in modelmap.coupled:
        reads = [m for m in group.members if m.side == "in"]
        writes = [m for m in group.members if m.side == "out"]
        only = len(reads) == 1 and len(reads) + len(writes) == len(group.members)
        if not only or reads[0].path not in own or group.padded:
            continue
        role = "v" if group.kind == "heads" else "up"
        writer = [m for m in writes if modelmap.roles.get(m.path) == role and m.path in own]
        gated = any(modelmap.roles.get(m.path) == "gate" for m in writes)
        if len(writer) != 1 or (role == "up" and not gated):
            continue
        rows = torch.empty(modelmap.site(reads[0].path).shape[1], dtype=torch.long).fill_(-1)
        for unit in range(group.width):
            columns = torch.tensor(group.indices(reads[0], [unit]))
            sources = torch.tensor(group.indices(writer[0], [unit]))
            rows[columns] = sources.repeat(len(columns) // len(sources))
        if bool((rows >= 0).all()):
            yield _Fold((reads[0].path,), writer=writer[0].path, rows=rows)


def _pooled(salience: Tensor, rows: Tensor | None) -> Tensor:
    """The mean salience of the columns that one row writes, given back to each of them: they must share their scale."""
    if rows is None:
        return salience
    total = torch.zeros(int(rows.max()) + 1).index_add_(0, rows, salience)
    count = torch.zeros_like(total).index_add_(0, rows, torch.ones_like(salience))
    return (total / count.clamp_min(1))[rows]


def _weight(model: nn.Module, site: Site) -> Tensor:
    weight = model.get_submodule(site.path).weight.detach().float()  # type: ignore[union-attr, operator]
    return weight.t() if site.transposed else weight


def _put(model: nn.Module, site: Site, weight: Tensor) -> None:
    _replace(model, f"{site.path}.weight", weight.t().contiguous() if site.transposed else weight)


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """A new tensor in place of a parameter: the old one may be shared with the file that it was read from."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, key)
    setattr(module, key, nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad))


def _divide_rows(model: nn.Module, site: Site, scale: Tensor) -> None:
    _put(model, site, _weight(model, site) / scale[:, None])
    bias = model.get_submodule(site.path).bias
    if bias is not None:
        _replace(model, f"{site.path}.bias", bias.detach().float() / scale)  # type: ignore[operator]


def _divide_norm(model: nn.Module, norm: Norm, scale: Tensor) -> None:
    assert norm.weight is not None
    weight = model.get_parameter(norm.weight).detach().float()
    _replace(model, norm.weight, (weight + norm.offset) / scale - norm.offset)
    if norm.bias is not None:
        _replace(model, norm.bias, model.get_parameter(norm.bias).detach().float() / scale)
