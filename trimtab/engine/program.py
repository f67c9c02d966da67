"""A causal language model as a program of the compiled kernels: read off its traced map, with weights shared by all who
run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.core.level import Float, Int, Plus
from trimtab.formats.cache import CacheFormat
from trimtab.formats.packed import Packed, summands
from trimtab.kernels.integer.reference import exact_step, linear
from trimtab.kernels.weight import weight_of

if TYPE_CHECKING:
    from trimtab.core.modelmap import Attention, ModelMap, Norm, Sublayer
    from trimtab.engine.adapters import Bank

ACTIVATIONS = {  # the names that configurations use, and the kernels'
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
PROOF = 16  # positions, and tokens, that a program and torch must agree on
FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # angles that do not change as a text grows


class Unknown(Exception):
    """The model has something that no program expresses; the message names it."""


@dataclass(frozen=True)
class Matrix:
    """Where a site's weight `[rows, cols]` is: the name of its parameter, of tied ones the first, stored transposed or
    not.
    """

    name: str
    rows: int
    cols: int
    transposed: bool
    kind: str


@dataclass(frozen=True)
class Scale:
    """A normalisation: `rms` or layer, over each of `groups` runs of channels, by `offset` + the named parameter."""

    rms: bool
    weight: str | None
    bias: str | None
    eps: float
    groups: int = 1
    offset: float = 0.0


@dataclass(frozen=True)
class Rotary:
    """Angles of positions: `factor` times cosine and sine of position times each of the frequencies."""

    frequencies: tuple[float, ...]
    factor: float

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[positions, frequencies]`."""
        angle = torch.arange(positions).float()[:, None] * torch.tensor(self.frequencies)
        return angle.cos() * self.factor, angle.sin() * self.factor


@dataclass(frozen=True)
class Heads:
    """An attention branch. `inputs` are the paths of q, k and v, or of the one linear that is all three."""

    norm: Scale
    inputs: tuple[str, ...]
    output: str
    heads: int
    kv_heads: int
    size: int
    scale: float
    window: int
    q_norm: Scale | None
    k_norm: Scale | None


@dataclass(frozen=True)
class Gate:
    """A feed-forward branch. `inputs` are the paths of gate and up, of the one linear that is both, or of up alone."""

    norm: Scale
    inputs: tuple[str, ...]
    output: str
    width: int
    gated: bool
    activation: str


@dataclass(frozen=True)
class Form:
    """All that a program needs to know of a model but its weights: plain data, see `trimtab.engine.kept`.

    Fields:
        embed, position, head: paths; `position` is None where there is no table of positions.
        offset: row of that table for the first position.
        embed_scale: factor of the embeddings.
        branches: in forward order.
        norm: the last one, or None.
        rotary: angles of positions, or None.
        limit: positions that the model knows, or None.
        matrices: path -> where its weight is.
    """

    width: int
    vocabulary: int
    embed: str
    embed_scale: float
    position: str | None
    offset: int
    branches: tuple[Heads | Gate, ...]
    norm: Scale | None
    head: str
    rotary: Rotary | None
    limit: int | None
    matrices: Mapping[str, Matrix] = field(default_factory=dict)

    @property
    def products(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the weights, those together that are one weight for the kernels."""
        tables = [(path,) for path in (self.embed, self.position) if path is not None]
        inner = [paths for branch in self.branches for paths in (branch.inputs, (branch.output,))]
        return (*tables, *inner, (self.head,))

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of all weights."""
        return tuple(path for paths in self.products for path in paths)

    def cache_bytes(self, context: int, sequences: int = 1, cache: CacheFormat | None = None) -> int:
        """Exact bytes of the keys and values of so many sequences; in fp16 unless said otherwise."""
        stored, attending = cache or CacheFormat(), [b for b in self.branches if isinstance(b, Heads)]
        return sum(stored.bytes(b.kv_heads, b.size, context, sequences) for b in attending)


# ---- from the map to the form


def form_of(model: nn.Module, found: ModelMap) -> Form:
    """What a program has to do for this model.

    Raises:
        Unknown: it does something that no program expresses.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    norms = {norm.path: norm for norm in found.norms}
    matrices = matrices_of(found)
    embed, head = (_one(found, role) for role in ("embed", "lm_head"))
    position = _one(found, "position", missing=True)
    doors = {sublayer.norm for sublayer in found.sublayers}
    last = [n for n in found.norms if n.path not in doors and not any(_inside(n.path, b) for b in found.blocks)]
    if len(last) > 1:
        raise Unknown(f"norms outside its blocks: {', '.join(n.path for n in last)}")
    rotary = rotary_of(model)
    if rotary is None and position is None:
        raise Unknown("neither a table of positions nor rotary angles")
    attentions = list(found.attentions)
    branches: list[Heads | Gate] = []
    for sublayer in found.sublayers:
        if sublayer.post_norm is not None or sublayer.norm is None or len(sublayer.outputs) != 1:
            raise Unknown(f"a norm after the branch {sublayer.path}, or none before it")
        norm = _scale(model, norms[sublayer.norm])
        if sublayer.kind == "attention" and attentions:
            branches.append(_heads(model, found, sublayer, attentions.pop(0), norm, doors))
        elif sublayer.kind == "mlp":
            branches.append(_gate(found, sublayer, norm, config))
        else:
            raise Unknown(f"the branch {sublayer.path}, of kind {sublayer.kind}")
    if attentions:
        raise Unknown(f"an attention outside the residual branches, at {attentions[0].q}")
    form = Form(
        matrices[embed].cols,
        matrices[head].rows,
        embed,
        float(getattr(model.get_submodule(embed), "embed_scale", 1.0)),
        position,
        int(getattr(model.get_submodule(position), "offset", 0)) if position else 0,
        tuple(branches),
        _scale(model, last[0]) if last else None,
        head,
        rotary,
        getattr(config, "max_position_embeddings", None),
    )
    return replace(form, matrices={path: matrices[path] for path in form.sites})


def matrices_of(found: ModelMap) -> dict[str, Matrix]:
    """Where the weight of each site is; stacks of experts are no matrices, and routers return more than a product."""
    routers = {site.path for site in found.where("router")}
    first = {name: names[0] for names in found.tied for name in names}
    made = {}
    for site in (s for s in found.sites if s.kind != "experts" and s.path not in routers):
        name, (rows, cols) = f"{site.path}.weight", site.shape[:2]
        made[site.path] = Matrix(first.get(name, name), rows, cols, site.transposed, site.kind)
    return made


def _one(found: ModelMap, role: str, missing: bool = False) -> Any:
    sites = found.where(role)
    if len(sites) > 1 or not (sites or missing):
        raise Unknown(f"{len(sites)} sites of role {role}")
    return sites[0].path if sites else None


def _inside(path: str, block: str) -> bool:
    return path.startswith(block + ".")


def _scale(model: nn.Module, norm: Norm, groups: int = 1) -> Scale:
    module = model.get_submodule(norm.path)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if norm.kind not in ("rms", "layer") or eps is None:
        raise Unknown(f"the norm {norm.path}, of kind {norm.kind}")
    return Scale(norm.kind == "rms", norm.weight, norm.bias, float(eps), groups, norm.offset)


def _heads(
    model: nn.Module, found: ModelMap, sublayer: Sublayer, at: Attention, norm: Scale, doors: set[str | None]
) -> Heads:
    if at.q is None or at.k is None or at.v is None or at.o is None or at.o != sublayer.output:
        raise Unknown(f"the attention of {sublayer.path}, whose projections are not one each")
    inputs = tuple(dict.fromkeys((at.q, at.k, at.v)))
    if len(inputs) == 2 or set(inputs) != set(sublayer.inputs):
        raise Unknown(f"the attention of {sublayer.path}, whose projections read other things than the residual")
    module = model.get_submodule(sublayer.path)
    window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
    block = found.blocks[sublayer.block] if sublayer.block is not None else ""
    inner = [n for n in found.norms if _inside(n.path, block) and n.path not in doors]
    if len(inner) not in (0, 2):
        raise Unknown(f"{len(inner)} norms inside the attention of {sublayer.path}")
    groups = [h if n.width == at.head_size else 1 for n, h in zip(inner, (at.heads, at.kv_heads), strict=False)]
    between: list[Scale | None] = [_scale(model, n, g) for n, g in zip(inner, groups, strict=True)]
    between = between or [None, None]
    return Heads(
        norm,
        inputs,
        at.o,
        at.heads,
        at.kv_heads,
        at.head_size,
        float(getattr(module, "scaling", at.head_size**-0.5)),
        int(window or 0),
        *between,
    )


def _gate(found: ModelMap, sublayer: Sublayer, norm: Scale, config: Any) -> Gate:
    output = sublayer.outputs[0]
    roles = {found.roles[path]: path for path in sublayer.inputs}
    name = getattr(config, "hidden_act", getattr(config, "activation_function", None))
    width = found.site(output).shape[1]
    if found.roles[output] != "down" or set(roles) not in ({"gate", "up"}, {"gate_up"}, {"up"}):
        raise Unknown(f"the branch {sublayer.path}, whose linears are {', '.join(sorted(roles))}")
    if name not in ACTIVATIONS:
        raise Unknown(f"the activation {name}")
    inputs = tuple(roles[role] for role in ("gate", "gate_up", "up") if role in roles)
    return Gate(norm, inputs, output, width, "up" not in roles or "gate" in roles, ACTIVATIONS[name])


def rotary_of(model: nn.Module) -> Rotary | None:
    """The angles of the model's own module of them, whose outputs they must be."""
    owners = [module for module in model.modules() if "inv_freq" in dict(module.named_buffers(recurse=False))]
    if not owners:
        return None
    kind = getattr(owners[0], "rope_type", "default")
    if len(owners) > 1 or kind not in FIXED_ROPE:
        raise Unknown(f"rotary angles of type {kind}, in {len(owners)} places")
    frequencies: Any = owners[0].inv_freq
    rotary = Rotary(tuple(frequencies.float().tolist()), float(getattr(owners[0], "attention_scaling", 1.0)))
    theirs = owners[0](torch.zeros(1), torch.arange(PROOF)[None])
    for ours, other in zip(rotary.angles(PROOF), theirs, strict=True):
        if not torch.allclose(ours, other[0, :, : other.shape[-1] // 2].float(), atol=1e-6):
            raise Unknown(f"rotary angles of type {kind} that are not those of its frequencies")
    return rotary


# ---- weights


class Store(Protocol):
    """What holds a model's parameters."""

    def matrix(self, at: Matrix) -> Packed | Tensor:
        """What is stored of a weight, `[out, in]`."""

    def is_packed(self, at: Matrix) -> bool:
        """Whether it is packed."""

    def nbytes(self, at: Matrix) -> int:
        """About how many bytes the kernels will hold of it."""

    def vector(self, name: str) -> Tensor | None:
        """A parameter of one dimension, fp32; None where there is none of that name."""


class ModuleStore:
    """A module's own parameters.

    Args:
        packed: parameter name -> reader of the packed weight, for those that an artifact stores packed.
    """

    def __init__(self, model: nn.Module, packed: Mapping[str, Callable[[], Packed]]) -> None:
        self.model, self.packed = model, packed

    def _held(self, at: Matrix) -> Any:
        return getattr(self.model.get_submodule(at.name.removesuffix(".weight")), "packed", None)

    def matrix(self, at: Matrix) -> Packed | Tensor:
        """What is stored of a weight, `[out, in]`."""
        if isinstance(held := self._held(at), Packed):
            return held
        if at.name in self.packed:
            return self.packed[at.name]()
        weight = self.model.get_parameter(at.name).detach()
        return weight.T if at.transposed else weight

    def is_packed(self, at: Matrix) -> bool:
        """Whether it is packed."""
        return isinstance(self._held(at), Packed) or at.name in self.packed

    def nbytes(self, at: Matrix) -> int:
        """About how many bytes the kernels will hold of it."""
        stored = self.matrix(at) if self.is_packed(at) else None
        return stored.nbytes if isinstance(stored, Packed) else 2 * at.rows * at.cols

    def vector(self, name: str) -> Tensor | None:
        """A parameter of one dimension, fp32; None where there is none of that name."""
        path, _, key = name.rpartition(".")
        found = getattr(self.model.get_submodule(path), key, None)
        return None if found is None else found.detach().float()


class Weights:
    """The weights of a model as the kernels hold them, each made once, whichever programs run it.

    Args:
        kernels: the compiled kernels, or None for plain torch.
        store: holds them as they are stored.
        matrices: path -> where its weight is.
    """

    def __init__(self, kernels: Any, store: Store, matrices: Mapping[str, Matrix]) -> None:
        self.kernels, self.store, self.matrices = kernels, store, matrices
        self.made: dict[tuple[str, ...], Any] = {}
        self.users: dict[tuple[str, ...], Any] = {}  # paths -> the weight that holds their rows one above the other

    def get(self, paths: tuple[str, ...]) -> Any:
        """One weight for all of these, their rows one above the other; without kernels it is for one path."""
        keys = tuple(self.matrices[path].name for path in paths)
        if keys not in self.made:
            parts: list[Any] = [self.store.matrix(self.matrices[path]) for path in paths]
            self.made[keys] = PlainWeight(*parts) if self.kernels is None else weight_of(self.kernels, parts)
        self.users[paths] = self.made[keys]
        return self.made[keys]

    def bias(self, paths: tuple[str, ...]) -> np.ndarray | None:
        """The biases of a weight, end to end; zero where one has none and another has."""
        found = [self.store.vector(f"{path}.bias") for path in paths]
        if all(b is None for b in found):
            return None
        pairs = zip(paths, found, strict=True)
        return torch.cat([torch.zeros(self.matrices[path].rows) if b is None else b for path, b in pairs]).numpy()

    def scale(self, scale: Scale) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Factors and shifts of a norm."""
        factors, shifts = (None if name is None else self.store.vector(name) for name in (scale.weight, scale.bias))
        if factors is not None and scale.offset:
            factors = scale.offset + factors
        return None if factors is None else factors.numpy(), None if shifts is None else shifts.numpy()

    def is_packed(self, path: str) -> bool:
        """Whether a site's weight is packed."""
        return self.store.is_packed(self.matrices[path])

    def forwards(self, model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
        """path -> a forward of the module there with the weight that was made for it."""
        made: dict[str, Callable[[Tensor], Tensor]] = {}
        for paths, weight in self.users.items():
            first = 0
            for path in paths:
                rows = self.matrices[path].rows
                module = model.get_submodule(path)
                if not isinstance(module, nn.Embedding):
                    made[path] = _linear(module, weight, first, rows)
                elif type(module).forward is nn.Embedding.forward:
                    made[path] = _looked_up(weight)
                first += rows
        return made

    def nbytes(self, paths: Iterable[str]) -> int:
        """About how many bytes the weights at these paths take."""
        stored = {self.matrices[path].name: self.matrices[path] for path in paths}
        return sum(self.store.nbytes(at) for at in stored.values())

    def read_bytes(self, form: Form) -> int:
        """Bytes of weights that a step reads: all of those made but the tables that it looks rows up in."""
        tables = (form.embed, form.position)
        read = {id(weight): weight.nbytes for paths, weight in self.users.items() if paths[0] not in tables}
        return sum(read.values())


class PlainWeight:
    """A packed weight with the kernels' face and arithmetic, in plain torch."""

    def __init__(self, packed: Packed) -> None:
        self.packed = packed
        self.rows, self.cols = packed.shape

    def apply(self, x: np.ndarray) -> np.ndarray:
        """`x [m, cols]` to `[m, rows]`: with 8-bit inputs where the level has integers, else in fp32."""
        return _plain(self.packed, torch.from_numpy(x)).numpy()


def _plain(packed: Packed, x: Tensor) -> Tensor:
    level = packed.level
    if isinstance(level, Plus):
        base, extra = summands(packed)
        return _plain(base, x) + _plain(extra, x)
    integers = isinstance(level, Int) or (isinstance(level, Float) and exact_step(level.e, level.m) is not None)
    return linear(packed, x) if integers else nn.functional.linear(x, packed.dense())


def _linear(module: nn.Module, weight: Any, first: int, rows: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = weight.apply(np.ascontiguousarray(x.detach().reshape(-1, x.shape[-1]).float().numpy()))
        out = torch.from_numpy(y[:, first : first + rows]).reshape(*x.shape[:-1], rows)
        bias = getattr(module, "bias", None)
        return out if bias is None else out + bias

    return forward


def _looked_up(weight: Any) -> Callable[[Tensor], Tensor]:
    def forward(tokens: Tensor) -> Tensor:
        rows = [weight.row(token) for token in tokens.reshape(-1).tolist()]
        return torch.from_numpy(np.stack(rows)).reshape(*tokens.shape, -1)

    return forward


# ---- the program


def compile_form(
    form: Form,
    weights: Weights,
    *,
    rows: int,
    outputs: int,
    sequences: int,
    context: int,
    cache: CacheFormat,
    bank: Bank | None = None,
    paged: bool = False,
) -> tuple[Any, Any]:
    """The program, and the slice of it that holds the logits.

    Args:
        rows: tokens that a step takes at most.
        outputs: tokens whose logits a step gives at most.
        sequences, context: texts that are written at once, and tokens that each may have.
        cache: how keys and values are stored.
        bank: adapters that sequences may use.
        paged: a sequence takes memory for the tokens that it holds, and not for its whole context.
    """
    p = weights.kernels.Program(rows, outputs, sequences, context, paged)
    if bank is not None:
        p.adapt(bank.pool)
    x, h, y = (p.buffer(form.width) for _ in range(3))
    wide = max((b.width * (1 + b.gated) for b in form.branches if isinstance(b, Gate)), default=1)
    attending = [b for b in form.branches if isinstance(b, Heads)]
    mixed = p.buffer(max((b.heads * b.size for b in attending), default=1))
    hidden = p.buffer(max([wide, *[(b.heads + 2 * b.kv_heads) * b.size for b in attending]]))
    angles = p.angles(*(t.contiguous().numpy() for t in form.rotary.angles(context))) if form.rotary else None

    def norm(scale: Scale, source: Any, out: Any, add: Any = None) -> None:
        p.norm(source, out, add, scale.rms, *weights.scale(scale), scale.eps, scale.groups)

    def product(source: Any, out: Any, paths: tuple[str, ...]) -> None:
        weight = weights.get(paths)
        parts = [] if bank is None else bank.parts(paths)
        p.linear(source, out.part(0, weight.rows), weight, weights.bias(paths), parts)

    p.embed(x, weights.get((form.embed,)), form.embed_scale)
    if form.position is not None:
        p.place(x, weights.get((form.position,)), form.offset)
    added = None  # what the branch before gave, added to x as the next one reads it
    for branch in form.branches:
        norm(branch.norm, x, h, added)
        added = y
        if isinstance(branch, Gate):
            product(h, hidden.part(0, branch.width * (1 + branch.gated)), branch.inputs)
            first = hidden.part(0, branch.width)
            p.activate(
                branch.activation, first, hidden.part(branch.width, branch.width) if branch.gated else None, first
            )
            product(first, y, (branch.output,))
            continue
        queries, keys = branch.heads * branch.size, branch.kv_heads * branch.size
        q, k, v = hidden.part(0, queries), hidden.part(queries, keys), hidden.part(queries + keys, keys)
        product(h, hidden.part(0, queries + 2 * keys), branch.inputs)
        for part, scale, heads in ((q, branch.q_norm, branch.heads), (k, branch.k_norm, branch.kv_heads)):
            if scale is not None:
                norm(scale, part, part)
            if angles is not None:
                p.rotate(part, heads, angles)
        layer = p.cache(branch.kv_heads, branch.size, str(cache))
        p.append(k, v, layer)
        p.attend(q, mixed.part(0, queries), layer, branch.scale, branch.window)
        product(mixed.part(0, queries), y, (branch.output,))
    if form.norm is not None:
        norm(form.norm, x, h, added)
    elif added is not None:
        p.norm(x, None, added)
    last, logits = p.buffer(form.width, True), p.buffer(form.vocabulary, True)
    p.select(h if form.norm is not None else x, last)
    product(last, logits, (form.head,))
    return p, logits
