"""How a changed structure is recorded, and rebuilt without running anyone's code.

An edit is a small dict of JSON values, `{"op": ..., "path": ..., ...}`; a changed model is its original configuration
and a list of edits, replayed in order on the skeleton that the configuration gives. Paths are those at the time of the
edit.

| op | what it does | arguments |
|---|---|---|
| `drop` | a module becomes `Dropped`: it gives zeros, and its weights are gone | `returns`, `width` |
| `remove` | a whole block leaves its list; the configuration counts one less | |
| `resize` | a module's weight, or a bare parameter, gets another shape | `shape`, `bias`, `groups` |
| `widen` | the same, up to twice as large | `shape`, `groups` |
| `norm` | a layer norm becomes an RMS norm | `width`, `eps` |
| `factor` | a linear or convolution becomes two thin ones | `rank` |
| `gather` | the inputs of a linear are put into another order before it | |
| `shortcut` | the residual passes a matrix on its way around a branch | `norm`, `branch`, `width` |
| `share` | of a stack of experts fewer are left, and each old place is one of them | `members` |
| `thin` | a stack of matrices becomes thin factors and a few whole rows | `rank`, `rows`, `flipped` |
| `untie` | a weight that was shared becomes the module's own | |
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError

EXPERTS = 1 << 12  # no stack holds more experts
LARGEST = 1 << 24  # no dimension of a weight is larger; a file that says so is broken


class Dropped(nn.Module):
    """Stands for a module that was removed: zeros of the shape of its input, in the structure of the original's output.

    Args:
        returns: items of the tuple that the original returned, zeros first and None after; 0: it returned a tensor.
        width: size of the last dimension; None: that of the input.
    """

    def __init__(self, returns: int = 0, width: int | None = None) -> None:
        super().__init__()
        self.returns, self.width = returns, width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
        # Made from a shape, not from x: whoever traces the model sees a constant, and the residual runs straight on.
        shape = x.shape if self.width is None else (*x.shape[:-1], self.width)
        zeros = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return (zeros, *[None] * (self.returns - 1)) if self.returns else zeros

    def extra_repr(self) -> str:
        return f"returns={self.returns}, width={self.width}"


class Shortcut(nn.Module):
    """A matrix on the residual around a branch, the block's code untouched: x -> x S + f(norm(x)), S = I + weight^T.

    The norm's input x is kept when the norm runs, and x (S - I) is added to what the branch returns; the block's own
    addition of x completes the sum.

    Args:
        width: size of the residual.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self._held: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)

    def take(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Hook before the norm."""
        x = args[0] if args else next(iter(kwargs.values()))
        owner = getattr(x, "_shortcut", self)
        if owner is not self:
            raise UserError(
                "two branches read the same state of the residual, so it can turn only once: slice with shared=True"
            )
        x._shortcut = self
        self._held = x

    def give(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Hook behind the branch."""
        assert self._held is not None, "the branch ran before its norm"
        x, self._held = self._held, None
        if isinstance(output, tuple):
            return (output[0] + self(x).view_as(output[0]), *output[1:])
        return output + self(x).view_as(output)


class Shared:
    """Hook before a stack of experts: what was routed to an expert goes to the one that it became.

    Args:
        members: for each expert that the router knows its place in the stack.
    """

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tuple(map(self.moved, args)), {name: self.moved(value) for name, value in kwargs.items()}

    def moved(self, value: Any) -> Any:
        """The places of experts, which are the whole numbers among the arguments."""
        if not isinstance(value, Tensor) or value.is_floating_point():
            return value
        return torch.tensor(self.members, device=value.device)[value]


class Thin:
    """Hooks around a module: one of its stacks of matrices is made for a forward, W = left right, and some rows added.

    The module holds `<name>_left [stack, out, rank]`, `<name>_right [stack, rank, in]`, `<name>_rows [rows, in]` and
    `<name>_places [rows]`, which says to which of all outputs of the stack each row belongs.

    Args:
        name: of the stack's parameter, which the module no longer has.
        flipped: the module's code reads matrices `(in, out)`.
    """

    def __init__(self, name: str, flipped: bool) -> None:
        self.name, self.flipped = name, flipped

    def make(self, module: nn.Module, args: tuple) -> None:
        """Hook before the module."""
        left, right, rows, places = (
            getattr(module, f"{self.name}_{part}") for part in ("left", "right", "rows", "places")
        )
        stack = left @ right
        stack = stack.flatten(0, 1).index_add(0, places, rows).view_as(stack)
        setattr(module, self.name, stack.mT if self.flipped else stack)

    def forget(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook behind the module."""
        delattr(module, self.name)


class Factored(nn.Module):
    """Two thin layers in place of one: `left(right(x))`; the bias, if any, is the left one's."""

    def __init__(self, right: nn.Module, left: nn.Module) -> None:
        super().__init__()
        self.right, self.left = right, left

    def forward(self, x: Tensor) -> Tensor:
        return self.left(self.right(x))


# ---- weights as methods see them


class Gathered(nn.Module):
    """A linear whose columns lie in another order than its inputs: `linear(x[..., order])`.

    Args:
        linear: the linear itself.
        order: `[in]`, the input that each column multiplies; a buffer that is loaded like a weight.
    """

    def __init__(self, linear: nn.Linear, order: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.order: Tensor
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.index_select(-1, self.order))


def flipped(module: nn.Module) -> bool:
    """Whether the module stores its weight as `(in, out)`, as GPT-2's Conv1D and transposed convolutions do."""
    return isinstance(getattr(module, "nf", None), int) or isinstance(module, nn.modules.conv._ConvTransposeNd)


def weight_of(module: nn.Module) -> Tensor:
    """A module's weight as methods see it: `[out, in, ...]`, `[width]` of a norm."""
    weight = module.get_parameter("weight").detach()
    return weight.transpose(0, 1) if flipped(module) else weight


def put_weight(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Store values of the module's own shape, in its own type; a bias only where one is given."""
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight.transpose(0, 1) if flipped(module) else weight)
        if bias is not None:
            module.get_parameter("bias").copy_(bias)


def swap(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put another module at a path; hooks of shortcuts move along with the place."""
    old = model.get_submodule(path)
    for when in ("forward_pre_hooks", "forward_hooks"):
        getattr(new, f"_{when}").update(getattr(old, f"_{when}"))
        getattr(new, f"_{when}_with_kwargs").update(getattr(old, f"_{when}_with_kwargs"))
    parent, _, key = path.rpartition(".")
    setattr(model.get_submodule(parent), key, new.train(old.training))


def returned(module: nn.Module) -> int:
    """How many items the tuple has that a module's forward returns, by its source; 0 where it returns one value."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
        body = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return 0
    found: list[int] = []
    queue = list(ast.iter_child_nodes(body))
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            found.append(len(node.value.elts))
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            queue += ast.iter_child_nodes(node)
    return max(found, default=0)


# ---- edits


def replay(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> nn.Module:
    """Apply edits in order to a skeleton made from the original configuration; weights are loaded afterwards.

    The model is changed in place, and so is its `config` where blocks are removed or weights untied. New parameters lie
    on the device of the old ones, with no values.

    Raises:
        UserError: an edit that is not one of the table above, a path that is no module, a shape that makes no sense.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> edits = [{"op": "resize", "path": "0", "shape": [6, 4]}, {"op": "resize", "path": "2", "shape": [2, 6]}]
    >>> replay(model, edits)(torch.ones(1, 4)).shape
    torch.Size([1, 2])
    """
    for edit in edits:
        apply_edit(model, edit)
    return model


def change(model: nn.Module, edits: list[dict[str, Any]], op: str, path: str, **arguments: Any) -> None:
    """Apply one edit and record it."""
    edit = {"op": op, "path": path, **{k: v for k, v in arguments.items() if v is not None}}
    apply_edit(model, edit)
    edits.append(edit)


def apply_edit(model: nn.Module, edit: Mapping[str, Any]) -> None:
    """Validate and apply one edit.

    Raises:
        UserError: see `replay`.
    """
    if not isinstance(edit, Mapping) or not isinstance(edit.get("op"), str) or not isinstance(edit.get("path"), str):
        raise UserError(f"{edit!r:.200} is no edit; an edit has an op ({', '.join(OPS)}) and a path")
    op, path = edit["op"], edit["path"]
    if op not in OPS:
        raise UserError(f"unknown edit {op!r} of {path!r}; this version knows {', '.join(OPS)}")
    parameters = dict(list(inspect.signature(OPS[op]).parameters.items())[2:])
    arguments = {k: v for k, v in edit.items() if k not in ("op", "path")}
    for name, value in arguments.items():
        if name not in parameters:
            raise UserError(f"edit {op} of {path!r}: it takes {', '.join(parameters) or 'no arguments'}, not {name!r}")
        if not _fits(value, str(parameters[name].annotation)):
            needed = parameters[name].annotation
            raise UserError(f"edit {op} of {path!r}: {name}={value!r:.80} was given, {needed} is needed")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"edit {op} of {path!r} lacks {', '.join(missing)}")
    OPS[op](model, path, **arguments)


def _fits(value: Any, annotation: str) -> bool:
    def size(v: Any) -> bool:
        return type(v) is int and 0 <= v <= LARGEST

    kind = annotation.removesuffix(" | None")
    if value is None:
        return kind != annotation
    return {
        "int": size(value),
        "bool": type(value) is bool,
        "float": type(value) in (int, float) and 0 <= value < 1,
        "str": type(value) is str,
        "Sequence[int]": type(value) is list and 1 <= len(value) <= EXPERTS and all(size(v) for v in value),
        "list[int]": type(value) is list and 1 <= len(value) <= 5 and all(size(v) and v > 0 for v in value),
    }[kind]


def _module(model: nn.Module, op: str, path: str) -> nn.Module:
    try:
        if path:
            return model.get_submodule(path)
    except AttributeError:
        pass
    raise UserError(
        f"edit {op}: the model has no module {path!r}; the edits belong to another model or another state of it"
    )


def _parameter(like: Tensor, shape: Iterable[int]) -> nn.Parameter:
    fresh = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return nn.Parameter(fresh, requires_grad=like.requires_grad)


def _drop(model: nn.Module, path: str, returns: int = 0, width: int | None = None) -> None:
    _module(model, "drop", path)
    if returns > 16:
        raise UserError(f"edit drop of {path!r}: a tuple of {returns} items was asked for, at most 16 make sense")
    types = _cache_types(model)
    swap(model, path, Dropped(returns, width))
    _renumber(model, types)


def _remove(model: nn.Module, path: str) -> None:
    _module(model, "remove", path)
    parent, _, key = path.rpartition(".")
    blocks = model.get_submodule(parent)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not key.isdigit() or len(blocks) < 2:
        raise UserError(f"edit remove: {path!r} is no block of a list of at least two")
    if any(isinstance(m, Shortcut) for m in blocks[int(key)].modules()):
        raise UserError(
            f"edit remove: {path!r} turns the residual for the next block; drop blocks before slicing, not after"
        )
    types = _cache_types(model)
    if (config := _list_config(model, path, len(blocks))) is not None:
        for name, value in list(vars(config).items()):
            if "layer" in name and isinstance(value, list) and len(value) == len(blocks):
                setattr(config, name, [v for i, v in enumerate(value) if i != int(key)])
        config.num_hidden_layers = len(blocks) - 1
    del blocks[int(key)]
    _renumber(model, types)


def _resize(model: nn.Module, path: str, shape: list[int], bias: bool | None = None, groups: int | None = None) -> None:
    parent, _, key = path.rpartition(".")
    modules = dict(model.named_modules())
    if path not in modules and parent in modules and (bare := modules[parent]._parameters.get(key)) is not None:
        _check_shape(path, shape, tuple(bare.shape))
        modules[parent]._parameters[key] = _parameter(bare, shape)
        return
    module = _module(model, "resize", path)
    old = module._parameters.get("weight")
    if old is None:
        raise UserError(f"edit resize: {path!r} ({type(module).__name__}) has no weight")
    seen = tuple(weight_of(module).shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        before, after = module.groups, groups or module.groups
        _check_shape(path, shape, seen, grouped=before > 1)
        if shape[0] % after or list(seen[2:]) != shape[2:]:
            kernel = list(seen[2:])
            raise UserError(f"edit resize of {path!r}: {shape} does not make {after} groups of the kernel {kernel}")
    else:
        _check_shape(path, shape, seen)
    give_shape(module, shape, bias, groups)


def _widen(model: nn.Module, path: str, shape: list[int], groups: int | None = None) -> None:
    module = _module(model, "widen", path)
    if module._parameters.get("weight") is None:
        raise UserError(f"edit widen: {path!r} ({type(module).__name__}) has no weight")
    seen = tuple(weight_of(module).shape)
    grows = len(seen) == len(shape) and all(a <= b <= 2 * a for a, b in zip(seen, shape, strict=True))
    if not grows or (groups is not None and (not isinstance(module, nn.modules.conv._ConvNd) or shape[0] % groups)):
        raise UserError(f"edit widen of {path!r}: its shape is {list(seen)}, {shape} was asked for; a dimension "
                        "at most doubles, and groups divide the outputs")  # fmt: skip
    give_shape(module, shape, groups=groups)


def widening(before: nn.Module, after: nn.Module) -> list[dict[str, Any]]:
    """The edits that give a model's modules the shapes that those of a wider one have.

    >>> widening(nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 5)))
    [{'op': 'widen', 'path': '0', 'shape': [5, 2]}]
    """
    edits: list[dict[str, Any]] = []
    for path, module in before.named_modules():
        if module._parameters.get("weight") is None:
            continue
        new = after.get_submodule(path)
        shape = list(weight_of(new).shape)
        if shape != list(weight_of(module).shape):
            groups = getattr(new, "groups", 1)
            more = {"groups": groups} if groups != getattr(module, "groups", 1) else {}
            edits.append({"op": "widen", "path": path, "shape": shape, **more})
    return edits


def give_shape(module: nn.Module, shape: list[int], bias: bool | None = None, groups: int | None = None) -> None:
    """Give a module a weight of another shape, with all that has one number an output, and sizes that say so.

    Args:
        shape: `[out, in, ...]`, as methods see it.
        bias: make one where there is none.
        groups: of a convolution; None: as many as it has.
    """
    old, seen = module.get_parameter("weight"), tuple(weight_of(module).shape)
    stored = (shape[1], shape[0], *shape[2:]) if flipped(module) else tuple(shape)
    if isinstance(module, nn.modules.conv._ConvNd):
        after = groups or module.groups
        module.groups, module.out_channels, module.in_channels = after, shape[0], shape[1] * after
    for name, value in [*module._parameters.items(), *module._buffers.items()]:
        if name != "weight" and value is not None and tuple(value.shape) == seen[:1]:
            fresh = _parameter(value, shape[:1])
            if name in module._parameters:
                module._parameters[name] = fresh
            else:
                module._buffers[name] = fresh.detach()
    if bias and module._parameters.get("bias") is None:
        module._parameters["bias"] = _parameter(old, shape[:1])
    module._parameters["weight"] = _parameter(old, stored)
    sizes: dict[str, Any] = dict.fromkeys(("out_features", "nf", "num_embeddings", "num_features"), shape[0])
    sizes |= dict.fromkeys(("in_features", "nx", "embedding_dim"), shape[-1]) | {"normalized_shape": (shape[-1],)}
    for name, size in sizes.items():
        if name in vars(module):
            setattr(module, name, size)


def _check_shape(path: str, shape: list[int], seen: tuple[int, ...], grouped: bool = False) -> None:
    if len(shape) != len(seen) or (any(a > b for a, b in zip(shape, seen, strict=True)) and not grouped):
        raise UserError(
            f"edit resize of {path!r}: its shape is {list(seen)}, {shape} was asked for; dimensions only shrink"
        )


def _norm(model: nn.Module, path: str, width: int, eps: float = 1e-6) -> None:
    old = _module(model, "norm", path)
    if not isinstance(old, nn.LayerNorm) or not 1 <= width <= old.normalized_shape[-1]:
        raise UserError(f"edit norm: {path!r} is {type(old).__name__}; a layer norm at least {width} wide is needed")
    like = next(model.parameters()) if old.weight is None else old.weight
    swap(model, path, nn.RMSNorm(width, eps=eps, device=like.device, dtype=like.dtype))


def _factor(model: nn.Module, path: str, rank: int) -> None:
    old = _module(model, "factor", path)
    plain = isinstance(old, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or (flipped(old) and hasattr(old, "nf"))
    if not plain or getattr(old, "groups", 1) != 1 or rank < 1:
        found = type(old).__name__
        raise UserError(f"edit factor: {path!r} is {found}, the rank {rank}; a linear or plain convolution is factored")
    rows, cols = weight_of(old).shape[:2]
    like, bias = old.get_parameter("weight"), old._parameters.get("bias") is not None
    made: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    kind: Any = type(old) if isinstance(old, nn.modules.conv._ConvNd) else nn.Linear
    if kind is nn.Linear:
        right, left = kind(cols, rank, bias=False, **made), kind(rank, rows, bias=bias, **made)
    else:
        spread = {k: getattr(old, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        right, left = kind(cols, rank, bias=False, **spread, **made), kind(rank, rows, 1, bias=bias, **made)
    swap(model, path, Factored(right, left))


def _gather(model: nn.Module, path: str) -> None:
    old = _module(model, "gather", path)
    if type(old) is not nn.Linear:
        raise UserError(f"edit gather: {path!r} is {type(old).__name__}; the inputs of a linear are gathered")
    made = {"device": old.weight.device, "dtype": old.weight.dtype}
    linear = nn.Linear(old.in_features, old.out_features, old.bias is not None, **made)
    swap(model, path, Gathered(linear, torch.arange(old.in_features, dtype=torch.int32)))


def _shortcut(model: nn.Module, path: str, norm: str, branch: str, width: int) -> None:
    parent, _, key = path.rpartition(".")
    before, behind = _module(model, "shortcut", norm), _module(model, "shortcut", branch)
    owner = _module(model, "shortcut", parent)
    if not re.fullmatch(r"shortcut_\w+", key) or key in owner._modules or width < 1:
        raise UserError(f"edit shortcut: {path!r} is taken, or is not called shortcut_...")
    like = next(model.parameters())
    made = Shortcut(width).to(device=like.device, dtype=like.dtype)
    owner.add_module(key, made.train(owner.training))
    before.register_forward_pre_hook(made.take, with_kwargs=True)
    behind.register_forward_hook(made.give)


def _share(model: nn.Module, path: str, members: Sequence[int]) -> None:
    module = _module(model, "share", path)
    stacks = {n: p for n, p in module._parameters.items() if p is not None and len(p) == len(members)}
    if not stacks or sorted(set(members)) != [*range(max(members) + 1)]:
        raise UserError(f"edit share: {path!r} holds no {len(members)} experts, or their places {members} leave a gap")
    for name, value in stacks.items():
        module._parameters[name] = _parameter(value, (max(members) + 1, *value.shape[1:]))
    for name, value in vars(module).items():
        if "experts" in name and value == len(members):
            setattr(module, name, max(members) + 1)
    module.register_forward_pre_hook(Shared(members), with_kwargs=True)


def _thin(model: nn.Module, path: str, rank: int, rows: int, flipped: bool = False) -> None:
    parent, _, name = path.rpartition(".")
    module = _module(model, "thin", parent)
    old = module._parameters.get(name)
    if old is None or old.dim() != 3:
        raise UserError(f"edit thin: {path!r} is no stack of matrices")
    count, outputs, inputs = (old.mT if flipped else old).shape
    if not 1 <= rank <= min(outputs, inputs) or rows > count * outputs:
        raise UserError(f"edit thin of {path!r}: a rank of {rank} and {rows} rows were asked for, of {count} matrices "
                        f"{outputs} x {inputs}")  # fmt: skip
    del module._parameters[name]
    for part, shape in (("left", (count, outputs, rank)), ("right", (count, rank, inputs)), ("rows", (rows, inputs))):
        module.register_parameter(f"{name}_{part}", _parameter(old, shape))
    module.register_buffer(f"{name}_places", torch.zeros(rows, dtype=torch.int32, device=old.device))
    thin = Thin(name, flipped)
    module.register_forward_pre_hook(thin.make)
    module.register_forward_hook(thin.forget)


def _untie(model: nn.Module, path: str) -> None:
    module = _module(model, "untie", path)
    weight = module._parameters.get("weight")
    if weight is None:
        raise UserError(f"edit untie: {path!r} has no weight")
    own = weight.detach().clone() if not weight.is_meta else torch.empty_like(weight)
    module._parameters["weight"] = nn.Parameter(own, requires_grad=weight.requires_grad)
    whole: Any = model
    if tied := getattr(model, "all_tied_weights_keys", None):
        name = f"{path}.weight"
        whole.all_tied_weights_keys = {k: v for k, v in tied.items() if name not in (k, v)}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        whole.config.tie_word_embeddings = False


OPS: dict[str, Callable[..., None]] = {
    "drop": _drop,
    "remove": _remove,
    "resize": _resize,
    "widen": _widen,
    "norm": _norm,
    "factor": _factor,
    "gather": _gather,
    "shortcut": _shortcut,
    "share": _share,
    "thin": _thin,
    "untie": _untie,
}


# ---- which edits drop a sublayer or a block


def branch_path(modelmap: Any, sublayer: Any) -> str | None:
    """The module that holds all linears of a sublayer and no other's; None where they lie loose in the block."""
    paths = [p.split(".") for p in (*sublayer.inputs, *sublayer.outputs)]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    path = ".".join(shared)
    others = (p for s in modelmap.sublayers if s != sublayer for p in (*s.inputs, *s.outputs))
    within = [p for p in others if p == path or p.startswith(path + ".")]
    return path if path and path not in modelmap.blocks and not within else None


def sublayer_path(modelmap: Any, sublayer: Any) -> str:
    """The path under which a plan speaks of a sublayer: its module, or the linear that it writes with."""
    return branch_path(modelmap, sublayer) or sublayer.output or sublayer.path


def drop_edits(model: nn.Module, modelmap: Any, path: str) -> list[dict[str, Any]]:
    """The edits that drop a sublayer or a whole block.

    With a sublayer goes the norm that it alone reads. Where no module holds the sublayer, each of its linears goes; all
    but those that write into the residual then give nothing at all.

    Args:
        model: the model as it is now; it is not changed.
        modelmap: its map.
        path: a sublayer's (`sublayer_path`) or a block's.

    Raises:
        UserError: no sublayer or block has that path, or a norm with a shift lies behind it, which makes more of zeros.
    """
    if path in modelmap.blocks:
        if not _keeps_shape(model.get_submodule(path), modelmap, modelmap.blocks.index(path)):
            raise UserError(f"the block {path!r} was to be dropped, but it hands on another shape than it is given")
        return [{"op": "remove", "path": path}]
    sublayer = next((s for s in modelmap.sublayers if path == sublayer_path(modelmap, s)), None)
    if sublayer is None or sublayer.kind == "block":
        raise UserError(f"{path!r} was to be dropped, and is no sublayer or block of this model")
    holder = branch_path(modelmap, sublayer)
    if holder is not None:
        edits: list[dict[str, Any]] = [{"op": "drop", "path": holder}]
        if count := returned(model.get_submodule(holder)):
            edits[0]["returns"] = count
    else:
        loose = dict.fromkeys((*sublayer.inputs, *sublayer.outputs))
        widths = {p: len(weight_of(model.get_submodule(p))) if p in sublayer.outputs else 0 for p in loose}
        edits = [{"op": "drop", "path": p, "width": width} for p, width in widths.items()]
    if sublayer.norm and set(modelmap.readers.get(sublayer.norm, ())) <= set(sublayer.inputs):
        edits.append({"op": "drop", "path": sublayer.norm})
    if any(n.path == sublayer.post_norm and n.bias for n in modelmap.norms):
        raise UserError(
            f"{path!r} was to be dropped, but the norm {sublayer.post_norm!r} behind it would add its shift"
        )
    return edits


def _keeps_shape(block: nn.Module, modelmap: Any, index: int) -> bool:
    """Whether a block can be left out: it adds to a residual, and its convolutions neither stride nor change the
    channels.
    """
    branches = [s for s in modelmap.sublayers if s.block == index]
    shapes = {s.path: s.shape for s in modelmap.sites}
    groups = {s.path: s.groups for s in modelmap.sites}
    widths = {groups[p] * shapes[p][1] for s in branches if s.kind == "block" for p in s.inputs}
    widths |= {shapes[p][0] for s in branches if s.kind == "block" for p in s.outputs}
    convolutions = [m for m in block.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    return bool(branches) and len(widths) <= 1 and all(set(m.stride) == {1} for m in convolutions)


# ---- the cache: places of the attentions that are left


def _list_config(model: nn.Module, path: str, count: int) -> Any:
    """The configuration that counts the blocks of a list: the nearest one above it with that number."""
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if getattr(config, "num_hidden_layers", None) == count:
            return config
    return None


def _holders(model: nn.Module) -> list[nn.Module]:
    """Modules that write to the cache: they have a place in it, and nothing inside them has, or had."""
    numbered = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    inside = {m: {c for c in m.modules() if c is not m} for m in numbered}
    return [m for m in numbered if not any(c in inside or isinstance(c, Dropped) for c in inside[m])]


def _layer_types(model: nn.Module) -> list[Any]:
    config = getattr(model, "config", None)
    reader = getattr(config, "get_text_config", None)
    return list(getattr(reader(decoder=True), "layer_types", None) or []) if callable(reader) else []


def _cache_types(model: nn.Module) -> dict[nn.Module, Any]:
    """What sort of cache layer (full, sliding) each attention writes to."""
    types = _layer_types(model)
    holders = _holders(model)
    return {m: types[m.layer_idx] if m.layer_idx < len(types) else None for m in holders}  # type: ignore[operator,index]


def _renumber(model: nn.Module, types: Mapping[nn.Module, Any]) -> None:
    """Close the gaps in the cache: the attentions left take the first places of their sort.

    A cache answers how long it is, and how large the mask must be, from its first layer of a sort; an empty one there
    would restart the positions at every decoded token.
    """
    left = _holders(model)
    if len(left) == len(types):
        return
    if not left or any(getattr(m, "kv_shared_layer_index", None) is not None for m in left):
        raise UserError(
            "an attention was to be dropped that is needed: the last one, or one that shares keys and values"
        )
    used = [types[m] for m in left]
    layer_types = _layer_types(model)
    # Places of a sort that no attention is left of would stay empty; the blocks there attend to nothing, so that any
    # name will do for them.
    if layer_types and (stale := set(layer_types) - set(used)):
        layer_types = [used[0] if t in stale else t for t in layer_types]
        whole: Any = model
        whole.config.get_text_config(decoder=True).layer_types = layer_types
    places: dict[Any, list[int]] = {}
    for i, kind in enumerate(layer_types or [None] * len(types)):
        places.setdefault(kind, []).append(i)
    moved: dict[Any, dict[int, int]] = {}
    for module, kind in zip(left, used, strict=True):
        mapping = moved.setdefault(kind, {})
        old: int = module.layer_idx  # type: ignore[assignment]
        module.layer_idx = mapping.setdefault(old, places[kind][len(mapping)])  # type: ignore[assignment]


# ---- whether an edited model is still a plain one


STRANGE = frozenset({"drop", "norm", "factor", "gather", "shortcut", "share", "thin"})  # no configuration says these


def plain_config_changes(model: nn.Module, edits: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What to change in the original configuration so that it gives the edited model; None if nothing does.

    With the changes, the edited model can be written as a plain Hugging Face folder. The candidates are the sizes that
    the edits leave; the answer is checked by building the model that they describe, on the meta device, and comparing
    every name and shape.

    Args:
        model: the edited model, with the configuration that `replay` left it.
        edits: all its edits.
    """
    edits = list(edits)
    config = getattr(model, "config", None)
    if config is None or any(
        e["op"] in ("drop", "norm", "factor", "gather", "shortcut", "share", "thin") for e in edits
    ):
        return None
    changes: dict[str, Any] = {}
    if any(e["op"] == "remove" for e in edits):
        count = changes["num_hidden_layers"] = config.num_hidden_layers
        changes |= {k: v for k, v in vars(config).items() if "layer" in k and isinstance(v, list) and len(v) == count}
    if any(e["op"] == "untie" for e in edits):
        changes["tie_word_embeddings"] = False
    whole: Any = model
    table = whole.get_input_embeddings()
    hidden = table.embedding_dim if isinstance(table, nn.Embedding) else config.hidden_size
    if hidden != config.hidden_size:
        changes["hidden_size"] = hidden
        changes["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = {tuple(weight_of(m).shape) for m in model.modules() if isinstance(m, nn.Linear) or flipped(m)}
    inner = sorted(
        {rows for rows, cols in shapes if cols == hidden} & {cols for rows, cols in shapes if rows == hidden}
    )
    inner_names = [n for n in ("intermediate_size", "ffn_dim", "n_inner") if hasattr(config, n)]
    tries = [{}, *({name: size} for name in inner_names for size in inner)]
    return next((changes | extra for extra in tries if _same_shapes(model, config, changes | extra)), None)


def _same_shapes(model: nn.Module, config: Any, changes: Mapping[str, Any]) -> bool:
    import copy

    try:
        other = type(config).from_dict({**copy.deepcopy(config).to_dict(), **changes})
        with torch.device("meta"):
            plain = type(model)(other)
    except Exception:  # a configuration validates itself in ways of its own; any refusal means: not plain
        return False
    return {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
