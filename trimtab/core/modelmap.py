"""The modelmap: what a model is made of, derived by watching one forward.

Roles, blocks, residual sublayers, foldable norms, shared inputs and coupled dimensions all come from the recorded
graph: a query projection is what reaches the first operand of an attention product, a residual is an addition one of
whose terms the others depend on, a norm is what normalises. No layer or class name is read anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError
from .site import Site

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .coupling import Coupled
    from .trace import Graph

REAL_LIMIT = 50_000_000  # parameters up to which a real model is run as it is instead of on meta tensors


@dataclass(frozen=True)
class Norm:
    """A normalisation.

    Fields:
        path: the module that owns the scale, else the one that was running.
        kind: `rms` or `layer` over the last dimension, `batch` or `group` over channels.
        weight, bias: parameter names, or None.
        offset: the effective scale is `offset + weight` (1 where the weight is stored as its difference from one).
        width: size of the normalised dimension.
    """

    path: str
    kind: Literal["rms", "layer", "batch", "group"]
    weight: str | None
    bias: str | None
    offset: float
    width: int


@dataclass(frozen=True)
class Attention:
    """One attention product.

    Fields:
        block: index of its block, or None.
        q, k, v, o: paths of the linears at its operands and its output; None where there is not exactly one.
            A fused projection appears in several places.
        heads, kv_heads, head_size: query heads, key-value heads, and the size of a query head.
    """

    block: int | None
    q: str | None
    k: str | None
    v: str | None
    o: str | None
    heads: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class Sublayer:
    """One branch that is added to the residual.

    Fields:
        block: index of its block, or None.
        kind: `attention`, `mlp`, or `block` (convolutions).
        path: the module whose output is added.
        norm: the norm that the branch reads the residual through, or None.
        inputs: linears that read the residual (or that norm).
        outputs: linears that write into the residual.
        post_norm: a norm between the last linear and the residual, or over the sum; None where there is none.
    """

    block: int | None
    kind: Literal["attention", "mlp", "block"]
    path: str
    norm: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    post_norm: str | None = None

    @property
    def output(self) -> str | None:
        """The linear that writes into the residual: the last one where there are several."""
        return self.outputs[-1] if self.outputs else None


@dataclass(frozen=True)
class Residual:
    """The residual stream of a transformer.

    Fields:
        width: its size.
        writers: embeddings, added parameters and linears whose output is added to it, in forward order.
        readers: linears that read it, through a norm or bare.
        norms: norms that read it.
        norm: `rms`, `layer`, `mixed`, or None without norms.
        closed: nothing but the writers feeds it and nothing but the norms and readers reads it, so it may be rotated.
        prenorm: every norm stands at the door of a branch: none is on the stream itself, none between a writer and it.
    """

    width: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[str, ...]
    norm: Literal["rms", "layer", "mixed"] | None
    prenorm: bool
    closed: bool


@dataclass(frozen=True)
class ModelMap:
    """What a model is made of.

    Fields:
        blocks: paths of the repeated blocks in forward order.
        sites: every linear, convolution, embedding and head that ran, in forward order.
        roles: path -> role, for sites and norms: q, k, v, qkv, o, gate, up, gate_up, down, router, expert, embed,
            position, lm_head, classifier, conv, norm, other.
        readers: norm path -> the linears that read its output, where nothing else does and they read nothing else: its
            scale folds into them (a tied weight must be untied first).
        siblings: linears that read the very same tensor.
        sublayers: residual branches in forward order.
        residual: the residual stream, for transformers.
        coupled: dimensions that must be cut together.
        tied: names of parameters that are one tensor.
        parameters: number of scalars, tied ones once.
        norms: every norm that ran, in forward order.
        attentions: every attention product, in forward order.
        batch_norms: convolution -> the batch norm that alone reads it.
        idle: parameters that this forward never read, as those of experts that no token chose; no site covers them.
    """

    blocks: tuple[str, ...]
    sites: tuple[Site, ...]
    roles: dict[str, str]
    readers: dict[str, tuple[str, ...]]
    siblings: tuple[tuple[str, ...], ...]
    sublayers: tuple[Sublayer, ...]
    residual: Residual | None
    coupled: tuple[Coupled, ...]
    tied: tuple[tuple[str, ...], ...]
    parameters: int
    norms: tuple[Norm, ...] = ()
    attentions: tuple[Attention, ...] = ()
    batch_norms: dict[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()

    def site(self, path: str) -> Site:
        """The site at a path."""
        for site in self.sites:
            if site.path == path:
                return site
        raise UserError(f"The model has no site {path!r}; it has {len(self.sites)}, from {self.sites[0].path!r} on.")

    def where(self, *roles: str) -> tuple[Site, ...]:
        """The sites with one of these roles, in forward order."""
        return tuple(site for site in self.sites if site.role in roles)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and scalars."""
        return _plain(asdict(self))


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(item) for key, item in tree.items()}
    return [_plain(item) for item in tree] if isinstance(tree, (tuple, list)) else tree


def trace(model: nn.Module, inputs: Mapping[str, Tensor] | tuple | Tensor) -> ModelMap:
    """Derive the modelmap of a model from one forward.

    A model on the meta device is traced there, without weights. A real one is run as it is when it is small; a large
    one is traced on meta stand-ins, and run for real only where its forward asks for values.

    Args:
        model: any module; left unchanged.
        inputs: the forward's arguments, by name or in order; a short sequence or one image is enough.
    Raises:
        UserError: the forward cannot be traced on these inputs.
    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = trace(model, torch.ones(1, 4))
        >>> found.roles
        {'0': 'norm', '1': 'other', '3': 'classifier'}
        >>> found.readers, found.coupled[0].width
        ({'0': ('1',)}, 8)
    """
    import torch

    from .anatomy import Anatomy

    graph = _record(model, inputs)
    with torch.device("cpu"):  # a caller's default device is for the model, not for the small index tensors used here
        return Anatomy(graph, model).map()


def _record(model: nn.Module, inputs: Any) -> Graph:
    import torch

    from .trace import record

    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    args = () if kwargs or isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    real = not any(tensor.is_meta for tensor in named.values())

    def move(item: Any, device: Any) -> Any:
        return item.to(device) if isinstance(item, torch.Tensor) else item

    def run(device: Any, weights: dict[str, Tensor] | None) -> Graph:
        moved = {key: move(item, device) for key, item in kwargs.items()}
        return record(model, tuple(move(item, device) for item in args), moved, weights)

    def stand_ins(dtype: torch.dtype | None) -> dict[str, Tensor]:
        made: dict[int, Tensor] = {}
        for tensor in named.values():
            like = dtype if tensor.is_floating_point() else None
            made.setdefault(id(tensor), torch.empty_like(tensor, device="meta", dtype=like))
        return {name: made[id(tensor)] for name, tensor in named.items()}

    device = next((tensor.device for tensor in named.values()), torch.device("cpu"))
    attempts = []
    if not real or sum(p.numel() for p in model.parameters()) > REAL_LIMIT:
        # Some grouped kernels take bfloat16 only; on meta the type is free.
        attempts += [lambda: run("meta", stand_ins(None)), lambda: run("meta", stand_ins(torch.bfloat16))]
    if real:
        attempts.append(lambda: run(device, None))
    failures: list[Exception] = []
    for attempt in attempts:
        try:
            return attempt()
        except Exception as error:
            failures.append(error)
    reason = " ".join(str(failures[-1] if real else failures[0]).split())[:300]
    cure = (
        "Check that these are the arguments that its forward takes."
        if real
        else "If its forward looks at values, load the real weights and trace again."
    )
    raise UserError(
        f"The forward of {type(model).__name__} could not be traced on inputs {sorted(kwargs) or len(args)}: "
        f"{type(failures[-1 if real else 0]).__name__}: {reason} {cure}"
    ) from failures[-1]
