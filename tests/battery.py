"""What the conformance battery feeds to methods: weights, statistics, tables and models, all of them random."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from math import fsum
from typing import Any, Literal

import torch
from test_structure import ResNet, filled, gpt2, inputs, llama, mixtral, run, vit
from torch import Tensor, nn

from trimtab.core.device import Device, Heads, Kernel, Product, Work
from trimtab.core.level import NM, Codebook, Depth, Float, Int, Level, Plus, Rank, Sparse, Width
from trimtab.core.method import (
    Allocator,
    Cacher,
    Card,
    Elastic,
    Merger,
    Method,
    Pricer,
    Rewriter,
    Scene,
    Searcher,
    Solver,
    discover,
)
from trimtab.core.modelmap import ModelMap, trace
from trimtab.core.site import Site
from trimtab.core.table import Row
from trimtab.engine.merge import Piece, merged
from trimtab.formats.cache import Projection
from trimtab.formats.packed import Packed
from trimtab.formats.structure import sublayer_path

METHODS = discover()
SOLVERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Solver)}
REWRITERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Rewriter)}
MERGERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Merger)}
ALLOCATORS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Allocator)}
PRICERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Pricer)}
ELASTICS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Elastic)}
SEARCHERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Searcher)}
CACHERS = {name: cls for name, cls in METHODS.items() if issubclass(cls, Cacher)}

# what each verb may ask for by name: the contract of `trimtab.core.method`
STATISTICS = {
    "solve": {"gram", "mean", "absmean", "rng"},
    "rewrite": {"gram", "mean", "absmean", "cosine", "usage", "likeness", "sensitivity"},
    "merge": {"weight", "density", "depth", "block", "rng", "gram", "threshold", "peak"},
    "join": {"moments"},
    "allocate": {"measure", "rng", "pairs", "cosine", "outliers", "trace"},
    "price": set(),
    "wrap": {"gram", "mean", "absmean", "grad", "rng", "shared"},
    "step": {"rng", "seed", "inputs", "errors"},
    "estimate": {"rng", "rate"},
    "loss": {"weak"},
    "decide": {"rng", "changes"},
    "store": {"queries", "inputs", "place", "first", "below", "prepared"},
    "ask": {"rng", "price", "nodes", "identity"},
    "offer": set(),
    "build": set(),
    "choose": {"harm", "take", "rng"},
}


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


# ---- levels

EXAMPLES: tuple[Level, ...] = (
    *(Int(4, 32), Float(2, 1, 32, "e8m0"), Codebook(4, 16), Sparse(0.5), NM(2, 4), Rank(4), Plus(Int(4, 32), Rank(4))),
    *(Width(0.5), Depth(0)),
)


def finer(one: Level, other: Level) -> bool:
    """Whether `one` can say all that `other` can, and more: no number of it is coarser, and the rest is equal."""
    if type(one) is not type(other) or one == other:
        return False
    match one, other:
        case Int(), Int():
            same = (one.symmetric, one.scale, one.hadamard) == (other.symmetric, other.scale, other.hadamard)
            return same and one.bits >= other.bits and _group(one) <= _group(other)
        case Float(), Float():
            # of equal exponents alone: more of them do not reach as far where the top code is no number, as in E4M3
            same = (one.e, one.scale, one.hadamard) == (other.e, other.scale, other.hadamard)
            return same and one.m >= other.m and _group(one) <= _group(other)
        case Codebook(), Codebook():
            return one.dim == other.dim and one.size >= other.size and one.residual >= other.residual
        case Sparse(), Sparse():
            return one.ratio <= other.ratio
        case NM(), NM():
            return one.m == other.m and one.n >= other.n
        case Rank(), Rank():
            return one.rank >= other.rank and one.bias >= other.bias
        case Plus(), Plus():
            parts = ((one.base, other.base), (one.extra, other.extra))
            return all(a == b or finer(a, b) for a, b in parts)
        case (Width(), Width()) | (Depth(), Depth()):
            return one.keep >= other.keep
    raise AssertionError(f"the battery does not know how fine {type(one).__name__} is")


def _group(level: Int | Float) -> float:
    return float("inf") if level.group is None else level.group


def whole(level: Level) -> bool:
    """Whether a level of structure keeps everything."""
    return isinstance(level, Width | Depth) and level.keep == 1


def rank_of(level: Level) -> int:
    """The rank that a level stores; 0 for none."""
    return level.rank if isinstance(level, Rank) else level.extra.rank if isinstance(level, Plus) else 0


# ---- configurations


def other_values(cls: type[Method]) -> dict[str, Any]:
    """For each field a legal value that is not its default, by its type alone."""
    hints = typing.get_type_hints(cls)
    return {f.name: _other(f.default, hints[f.name]) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def _other(default: Any, hint: Any) -> Any:
    options = [v for part in _alternatives(hint) if typing.get_origin(part) is Literal for v in typing.get_args(part)]
    if options:
        return next(v for v in (*reversed(options), None) if v != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return type(default)(default * 2) if default else type(default)(1)
    if isinstance(default, str):
        return default + "4b"
    if isinstance(default, tuple):
        return default[:-1] if default else ("4b",)
    if default is None and (numbers := [part for part in _alternatives(hint) if part in (int, float)]):
        return numbers[0](1)
    raise AssertionError(f"the battery has no other value for {hint} = {default!r}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def small(cls: type[Method]) -> Method:
    """The method with every whole number of its configuration at most ten, so that a search ends soon."""

    def clip(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(clip, value))
        return min(value, 10) if isinstance(value, int) and not isinstance(value, bool) else value

    return cls(**{f.name: clip(f.default) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


# ---- weights and their statistics


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight as a solver sees it, and what a model would have collected of its inputs."""

    weight: Tensor
    inputs: Tensor
    site: tuple[int, ...] = ()

    def statistics(self) -> dict[str, Any]:
        """Every statistic that a solver may ask for, made anew."""
        x = self.inputs
        return {"gram": x.T @ x / len(x), "mean": x.mean(0), "absmean": x.abs().mean(0), "rng": seeded(5)}

    def damage(self, packed: Packed) -> float:
        """Squared error of the outputs, as a share of the outputs'."""
        outputs, bias = self.inputs @ self.weight.T, packed.bias()
        missed = self.inputs @ packed.dense().T + (0 if bias is None else bias) - outputs
        return float(missed.square().sum() / outputs.square().sum())


def _inputs(rows: int, cols: int, rng: torch.Generator) -> Tensor:
    """Correlated inputs off the origin, a few channels of them large, as behind a norm."""
    mixing = torch.randn(cols, cols, generator=rng) / cols**0.5 + torch.eye(cols)
    x = torch.randn(rows, cols, generator=rng) @ mixing + 0.3 * torch.randn(cols, generator=rng)
    x[:, ::17] *= 8
    return x


def cases() -> dict[str, Case]:
    """Weights of odd shapes and contents."""
    rng = seeded(0)

    def case(rows: int, cols: int, samples: int = 200, site: tuple[int, ...] = ()) -> Case:
        return Case(torch.randn(rows, cols, generator=rng) * 0.05, _inputs(samples, cols, rng), site)

    plain, outlying, starved = case(24, 160), case(12, 64), case(9, 40, samples=7)
    outlying.weight[3, 5], outlying.weight[:, 11] = 40.0, 0.0
    starved.inputs[:, 4:9] = 0
    return {
        "plain": plain,
        "columns that no group divides": case(7, 101),
        "one row": case(1, 70),
        "one column": case(6, 1),
        "fewer columns than a vector, group or rank": case(5, 3),
        "values of bfloat16": dataclasses.replace(plain, weight=plain.weight.bfloat16().float()),
        "an outlier and an empty column": outlying,
        "zeros": dataclasses.replace(plain, weight=torch.zeros(24, 160)),
        "few samples, and inputs that are always zero": starved,
        "a convolution": case(10, 45, site=(10, 5, 3, 3)),
    }


CASES = cases()


# ---- parents to merge

PARENT_SHAPES: dict[str, tuple[int, ...]] = {
    **{"a matrix": (24, 160), "one row": (1, 70), "one column": (6, 1), "odd": (7, 101), "a vector": (33,)},
    **{"a number": (), "a convolution": (10, 5, 3, 3), "more than a tile": (600, 911)},
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Parents that were tuned from one base, each in another part and a little everywhere."""

    base: Tensor
    parents: list[Tensor]

    @staticmethod
    def of(shape: tuple[int, ...], count: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> Family:
        rng = seeded(seed)
        base = torch.randn(shape, generator=rng)
        changed = [torch.randn(shape, generator=rng) * torch.rand(shape, generator=rng) ** 4 for _ in range(count)]
        return Family(base.to(dtype), [(base + 0.1 * c).to(dtype) for c in changed])

    def merged(self, method: Merger, order: tuple[int, ...] | None = None, seed: int = 0) -> Tensor:
        """By the method, with other numbers for each parent; the parents in another order keep their own."""
        count = len(self.parents) if method.most is None else min(method.most, len(self.parents))
        order = tuple(range(count)) if order is None else order
        weight, density = (tuple(start + step * i for i in order) for start, step in ((0.5, 0.25), (0.2, 0.3)))
        names = tuple(f"parent {i}" for i in order)
        piece = Piece("blocks.0.weight", tuple(self.base.shape), method, names, weight, density, 0.5, seed)
        return merged(piece, [self.parents[i] for i in order], self.base if method.needs_base() else None)


# ---- models

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(3),
    "gpt2": gpt2,
    "vit": vit,
    "cnn": ResNet,
    "mixtral": mixtral,
}


@dataclasses.dataclass(frozen=True)
class Traced:
    """A tiny random model, its map, and data for it."""

    make: Callable[[], nn.Module]
    model: nn.Module
    modelmap: ModelMap
    calibration: dict[str, Tensor]
    fresh: dict[str, Tensor]

    @staticmethod
    def of(make: Callable[[], nn.Module]) -> Traced:
        model = filled(make)
        batch = inputs(model)
        return Traced(make, model, trace(model, batch), batch, inputs(model, seed=9))

    def sites(self) -> list[Site]:
        """All that a plan can name: weights, sublayers and blocks."""
        found = list(self.modelmap.sites)
        subs = [s for s in self.modelmap.sublayers if s.kind != "block"]
        found += [Site(sublayer_path(self.modelmap, s), "sublayer", (), s.block, s.kind) for s in subs]
        return found + [Site(p, "block", (), i, "block") for i, p in enumerate(self.modelmap.blocks)]

    def named(self, card: Card, level: Level) -> dict[str, Level]:
        """What a plan names: every site of the card's kinds; of what can be dropped, the second of each sort."""
        fit = [s for s in self.sites() if s.kind in card.kinds]
        if isinstance(level, Depth):
            sorts = {(s.kind, s.role): [t.path for t in fit if (t.kind, t.role) == (s.kind, s.role)] for s in fit}
            return dict.fromkeys((paths[min(1, len(paths) - 1)] for paths in sorts.values()), level)
        return dict.fromkeys((s.path for s in fit), level)

    def rewritten(self, method: Rewriter, levels: Mapping[str, Level]) -> tuple[nn.Module, list[dict[str, Any]]]:
        """A copy of the model as the method leaves it, block by block where that is its scope, and the edits."""
        model, edits = copy.deepcopy(self.model), []
        blocks = tuple(range(len(self.modelmap.blocks)))
        block_of = {s.path: s.block for s in self.sites()}
        at_once = method.scope == "model" or not blocks
        for group in [blocks] if at_once else [(i,) for i in blocks]:
            here = {p: v for p, v in levels.items() if at_once or p not in block_of or block_of[p] in group}
            stats = self._statistics(model, [s for s in self.modelmap.sites if at_once or s.block in group])
            scene = Scene(model, self.modelmap, group, here)
            method.rewrite(scene, **{name: stats[name] for name in method.needs()})
            edits += scene.edits
        return model, edits

    def _statistics(self, model: nn.Module, sites: list[Site]) -> dict[str, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        with Hooks() as hooks:
            for site in sites:
                if site.kind not in ("embedding", "experts") and site.groups == 1:
                    hooks.before(model.get_submodule(site.path), lambda rows, p=site.path: seen.__setitem__(p, rows))
            run(model, self.calibration)
        paths = [s.path for s in self.sites() if s.kind in ("sublayer", "block")]
        return {
            "gram": {p: x.T @ x / len(x) for p, x in seen.items()},
            "mean": {p: x.mean(0) for p, x in seen.items()},
            "absmean": {p: x.abs().mean(0) for p, x in seen.items()},
            **routing(self.modelmap),
            "sensitivity": {
                s.path: torch.rand(model.get_parameter(s.path).shape, generator=seeded(5))
                for s in self.modelmap.sites
                if s.kind == "experts"
            },
            "cosine": dict(zip(paths, torch.rand(len(paths), generator=seeded(3)), strict=True)),
        }


def routing(modelmap: ModelMap) -> dict[str, dict[str, Tensor]]:
    """How often each expert of each stack is used, and how alike their routers' logits are."""
    rng, stacks = seeded(6), {s.path.rpartition(".")[0]: s.shape[0] for s in modelmap.sites if s.kind == "experts"}
    usage = {path: torch.rand(count, generator=rng).softmax(0) for path, count in stacks.items()}
    logits = {path: torch.randn(count, 50, generator=rng) for path, count in stacks.items()}
    return {"usage": usage, "likeness": {path: torch.corrcoef(x) for path, x in logits.items()}}


class Hooks(contextlib.ExitStack):
    """Forward hooks that end with a `with`."""

    def before(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """Show a module's inputs, as rows, to `see`; a convolution's as patches."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if isinstance(module, nn.Conv2d):
                x = nn.functional.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                x = x.transpose(1, 2)
            see(x.reshape(-1, x.shape[-1]))

        self.callback(module.register_forward_pre_hook(hook).remove)


# ---- tables


def table(seed: int, units: int = 5, ragged: bool = False) -> list[Row]:
    """Rows of units that hurt more the less they cost; in a ragged table not every unit has every choice."""
    rng = seeded(seed)

    def draw() -> float:
        return float(torch.rand((), generator=rng))

    rows = []
    for unit in range(units):
        weights, slow, hurt = 64 + int(900 * draw()), 1e-6 * (0.5 + draw()), 0.01 + draw()
        for bits in (2, 3, 4, 8, 16):
            damage = 0.0 if bits == 16 else hurt * 4.0**-bits * (0.8 + 0.4 * draw())
            choice = "bf16" if bits == 16 else f"rtn@{bits}b/g32"
            row = Row(f"blocks.{unit}.linear", choice, weights * bits // 8, slow * bits, damage, weights)
            if not ragged or bits in (2, 8) or draw() < 0.5:
                rows.append(row)
    return rows


def by_unit(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each unit."""
    return {unit: [r for r in rows if r.unit == unit] for unit in dict.fromkeys(r.unit for r in rows)}


def extreme(rows: list[Row], cost: str, pick: Callable[..., float]) -> float:
    """The least or largest sum of a cost over all plans."""
    return fsum(pick(getattr(r, cost) for r in offers) for offers in by_unit(rows).values())


def resources(rows: list[Row]) -> dict[str, Any]:
    """Everything that an allocator may ask for by name, made anew; end to end, damages add up."""
    units, rng = list(by_unit(rows)), seeded(7)

    def scores() -> dict[str, float]:
        return dict(zip(units, torch.rand(len(units), generator=rng).tolist(), strict=True))

    def measure(choice: Mapping[str, Row], samples: int | None = None) -> float:
        return fsum(row.damage for row in choice.values())

    pairs = {pair: 1e-3 * float(torch.rand((), generator=rng)) for pair in itertools.combinations(units, 2)}
    return {
        **{"measure": measure, "rng": seeded(11), "pairs": pairs},
        **{"cosine": scores(), "outliers": scores(), "trace": scores()},
    }


def subclasses(cls: type) -> Iterator[type]:
    """All classes below one."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses(sub)


# ---- work and machines, for pricers


def device(**changes: Any) -> Device:
    """A machine with round numbers and a profile of two levels, attention and passes."""
    levels, inputs = ("fp32", "4b/g64"), (1, 64)
    rows = [Kernel("linear", t, m, "vnni", 1e-6, 1e-10, 0.5, 0.8, 0.0, 0.9, 1.2) for t in levels for m in inputs]
    rows += [
        Kernel("attention", "", 1, "vnni", 1e-6, 0.0, 0.5, 0.5),
        Kernel("pass", "", 1, "vnni", 1e-7, 0.0, 0.2, 0.2),
    ]
    plain: dict[str, Any] = {
        **{"name": "a processor", "cores": 2, "memory_bytes": 1 << 33, "threads": 2, "variant": "vnni"},
        **{"caches": {"l1": 1 << 15, "l2": 1 << 20, "l3": 1 << 25}, "kernels": tuple(rows)},
        **{"bandwidth": ((1 << 20, 4e11), (1 << 24, 2e11), (1 << 28, 4e10)), "spill": ((1 << 24, 0.0), (1 << 26, 1.0))},
        "limits": {"int8": 2e12, "fp32": 5e11},
    }
    return Device(**{**plain, **changes})


def work(level: Level, rows: int = 512, cols: int = 512, layers: int = 4, **changes: Any) -> Work:
    """A forward of a few layers."""
    products = tuple(Product(level, rows, cols) for _ in range(layers))
    return Work(products, (Heads(8, 4, 64),) * layers, (cols,) * layers, **changes)


# ---- keys and values, for cachers


def windows() -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values `[..., heads, tokens, channels]` of odd shapes and contents."""
    rng = seeded(0)

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)

    large = pair(2, 96, 40)
    large[0][..., 7] *= 1e6  # beyond what 16 bits hold
    return {
        "plain": pair(2, 3, 128, 64),
        "one token": pair(2, 1, 64),
        "one channel": pair(1, 64, 1),
        "groups that divide nothing": pair(3, 45, 39),
        "numbers of 16 bits": (pair(2, 64, 32)[0].half(), pair(2, 64, 32)[1].half()),
        "a channel too large": large,
        "all the same": (torch.full((2, 64, 32), 1.5), torch.zeros(2, 64, 32)),
    }


WINDOWS = windows()
CACHER_FIELDS: dict[str, dict[str, Any]] = {"cskv": {"keep": 0.75}}  # random windows have no structure to be found


def stored_by(cacher: Cacher, keys: Tensor, values: Tensor) -> Any:
    """What a cacher stores of a window, given all that it asks for: inputs are keys and values side by side."""
    heads = keys.shape[-3]
    flat = [t.transpose(-2, -3).flatten(-2) for t in (keys, values)]
    inputs, width = torch.cat(flat, -1).clamp(-65504, 65504), flat[0].shape[-1]
    both, zeros = torch.eye(2 * width), torch.zeros(width)
    projection = Projection(0, both[:width], both[width:], zeros, zeros, heads)

    def place(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    given = {"queries": keys, "inputs": inputs, "place": place, "first": 0, "below": None}
    if "prepared" in cacher.needs():
        gram = {"gram": both} if "gram" in signature(cacher.prepare).parameters else {}
        given["prepared"] = cacher.prepare(projection, **gram)
    return cacher.store(keys, values, **{name: given[name] for name in cacher.needs()})
