"""A trained model as an elastic one: the widths of its sublayers, its heads and its depth become choices.

Channels that hang together, and key-value heads with the query heads that share them, are found by following the
forward; which blocks go first is told by how little each turns the residual: the mean of 1 - cos between what goes in
and what comes out. Each network is the model's own code with narrower layers and fewer blocks.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.coupling import Coupled
from trimtab.core.errors import UserError
from trimtab.core.knob import Domain, Genome, Kind, Knob
from trimtab.core.modelmap import ModelMap
from trimtab.engine.elastic import called
from trimtab.formats.cutting import out_dim
from trimtab.formats.structure import change, drop_edits, flipped, weight_of

EIGHTHS = 8  # widths are offered in eighths of the whole, where as many divide it
LEAST_BLOCKS = 0.5  # share of the blocks that the shallowest network has


class Cuts:
    """Makes the networks that a trained model can be cut to, for `engine.elastic.Supernet`.

    Args:
        name: of the model.
        model: with its weights, fp32; kept, not changed.
        modelmap: its map.
        inputs, options: of a forward that blocks are looked at with.

    Raises:
        UserError: nothing in the model can be cut.
    """

    def __init__(
        self, name: str, model: nn.Module, modelmap: ModelMap, inputs: Mapping[str, Tensor], options: Mapping[str, Any]
    ) -> None:
        self.name, self.model, self.map = name, model.eval().requires_grad_(True), modelmap
        self._skeleton = _bare(model)
        self._call = lambda module: called(module, inputs, options)
        self._owner: dict[str, Coupled] = {}
        self._gone = self._order()
        self.domain = self._domain()

    def _order(self) -> tuple[str, ...]:
        """Blocks in the order in which they are left out; those that cannot be are not among them."""
        turned: dict[str, float] = {}

        def look(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
                y = output[0] if isinstance(output, tuple) else output
                if x.shape == y.shape:
                    turned[path] = 1 - float(
                        nn.functional.cosine_similarity(x.flatten(0, -2), y.flatten(0, -2), -1).mean()
                    )

            return hook

        handles = [
            self.model.get_submodule(p).register_forward_hook(look(p), with_kwargs=True) for p in self.map.blocks
        ]
        try:
            with torch.no_grad():
                self._call(self.model)
        finally:
            for handle in handles:
                handle.remove()
        most = len(self.map.blocks) - max(1, round(LEAST_BLOCKS * len(self.map.blocks)))
        left = Counter(path.rpartition(".")[0] for path in self.map.blocks)
        gone: list[str] = []
        for path in sorted(turned, key=lambda p: turned[p]):
            with contextlib.suppress(UserError):
                drop_edits(self.model, self.map, path)
                if len(gone) < most and left[path.rpartition(".")[0]] > 1:  # a list keeps a block
                    left[path.rpartition(".")[0]] -= 1
                    gone.append(path)
        return tuple(gone)

    def _domain(self) -> Domain:
        knobs: list[Knob] = []
        if self._gone:
            total = len(self.map.blocks)
            knobs.append(Knob("blocks", tuple(range(total - len(self._gone), total + 1)), "depth"))
        fixed = {n.path for n in self.map.norms if n.kind != "batch"}
        for group in self.map.coupled:
            paths = [m.path for m in group.members]
            options = _widths(group.width)
            if group.padded or len(options) < 2 or any(p in fixed for p in paths):
                continue
            block = next((b for b in self.map.blocks if all(p.startswith(f"{b}.") for p in paths)), None)
            if block is None and self.map.residual is not None:
                continue
            name = f"{block or paths[0]}.{'heads' if group.kind == 'heads' else 'width'}"
            while name in self._owner:
                name += "+"
            kind: Kind = "heads" if group.kind == "heads" else "width"
            knob = Knob(name, options, kind, self.hangs(block) if block else ())
            self._owner[name] = group
            if self._runs(knob):
                knobs.append(knob)
        if not knobs:
            raise UserError(f"nothing in {self.name} can be cut: no channels hang together within a block")
        return Domain(tuple(knobs))

    def hangs(self, block: str) -> tuple[tuple[str, frozenset[int]], ...]:
        """The condition that a block is there, for knobs that are about it."""
        if block not in self._gone:
            return ()
        left = len(self._gone) - self._gone.index(block)
        return (("blocks", frozenset(range(left, len(self._gone) + 1))),)

    def _runs(self, knob: Knob) -> bool:
        """Whether the model's code follows when a knob is turned down."""
        module = copy.deepcopy(self.model)
        try:
            self._narrow(module, {self._owner[knob.name]: knob.options[0]}, [])
            with torch.no_grad():
                self._call(module)
        except Exception:  # whatever the model's own code raises means: it does not follow
            return False
        return True

    # ---- networks

    def edits(self, genome: Genome) -> list[dict[str, Any]]:
        """The changes that make a genome's network of the model, see `formats.structure`."""
        return self._cut(copy.deepcopy(self._skeleton), genome)

    def build(self, genome: Genome, meta: bool = True) -> tuple[nn.Module, dict[str, Any]]:
        """The network of a genome, and the model's own name for each of its tensors."""
        module = copy.deepcopy(self._skeleton if meta else self.model)
        before = {id(m): path for path, m in module.named_modules()}
        for part in module.modules():
            part._origin = before[id(part)]  # type: ignore[assignment]
        self._cut(module, genome)
        found = {}
        for path, holder in module.named_modules():
            for name in (*holder._parameters, *holder._buffers):
                old = before[id(holder)]
                found[f"{path}.{name}" if path else name] = f"{old}.{name}" if old else name
        return module, found

    def _cut(self, module: nn.Module, genome: Genome) -> list[dict[str, Any]]:
        edits: list[dict[str, Any]] = []
        setting = self.domain.setting(genome)
        widths = {self._owner[n]: k for n, k in setting.items() if n in self._owner and k < self._owner[n].width}
        self._narrow(module, widths, edits)
        gone = len(self.map.blocks) - setting.get("blocks", len(self.map.blocks))
        for path in sorted(self._gone[:gone], key=self.map.blocks.index, reverse=True):
            change(module, edits, "remove", path)
        return edits

    @staticmethod
    def _narrow(module: nn.Module, widths: Mapping[Coupled, int], edits: list[dict[str, Any]]) -> None:
        """Keep the first units of groups; what is kept of each tensor is noted at its module for `Supernet`."""
        kept: dict[str, dict[tuple[str, int], Tensor]] = {}
        for group, units in widths.items():
            for member in group.members:
                size = _size(module, member.path, member.side, member.dim)
                stays = torch.ones(size, dtype=torch.bool)
                stays[group.indices(member, list(range(units, group.width)))] = False
                sides = kept.setdefault(member.path, {})
                sides[member.side, member.dim] = (
                    sides.get((member.side, member.dim), torch.ones(size, dtype=torch.bool)) & stays
                )
        for path, sides in kept.items():
            if any(side == "param" for side, _ in sides):
                parent, _, name = path.rpartition(".")
                holder, value = module.get_submodule(parent), module.get_parameter(path)
                index: list[Any] = [slice(0, n) for n in value.shape]
                for (_, dim), stays in sides.items():
                    index[dim] = stays.nonzero()[:, 0]
                _note(holder, name, index)
                change(module, edits, "resize", path, shape=[_length(i) for i in index])
                continue
            holder = module.get_submodule(path)
            weight = weight_of(holder)
            shape, index, groups = list(weight.shape), [slice(0, n) for n in weight.shape], None
            for (side, _), stays in sides.items():
                dim = 1 if side == "in" else out_dim(holder)
                index[dim] = stays.nonzero()[:, 0]
                shape[dim] = len(index[dim])
                if side == "depthwise":
                    groups = shape[dim]
                if side != "in":
                    for name, beside in (*holder._parameters.items(), *holder._buffers.items()):
                        if name != "weight" and beside is not None and beside.shape == stays.shape:
                            _note(holder, name, [index[dim]])
            _note(holder, "weight", index[:2][::-1] if flipped(holder) else index)
            change(module, edits, "resize", path, shape=shape, groups=groups)


def _widths(full: int) -> tuple[int, ...]:
    """Eighths of a width, or as many steps as divide it."""
    steps = next(n for n in (EIGHTHS, 6, 4, 3, 2, 1) if full % n == 0 and full >= n)
    return tuple(full * (i + 1) // steps for i in range(steps))


def _size(module: nn.Module, path: str, side: str, dim: int) -> int:
    if side == "param":
        return module.get_parameter(path).shape[dim]
    holder = module.get_submodule(path)
    return weight_of(holder).shape[1 if side == "in" else out_dim(holder)]


def _length(index: Any) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def _note(holder: nn.Module, name: str, index: list[Any]) -> None:
    """Say which part of a tensor is kept; runs from the first on become slices, which are views."""
    plain = [slice(0, len(i)) if isinstance(i, Tensor) and len(i) and int(i[-1]) == len(i) - 1 else i for i in index]
    slices: dict[str, tuple[Any, ...]] = {**getattr(holder, "_slices", {}), name: tuple(plain)}
    holder._slices = slices  # type: ignore[assignment]


def _bare(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters take no memory; ties are kept."""
    made: dict[int, Any] = {}
    for p in model.parameters():
        made[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(model, made)
