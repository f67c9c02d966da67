"""What autograd keeps for the backward pass: each storage once, cheap functions of it as recipes, the rest packed.

Autograd saves every tensor that a gradient needs. Many of them are cheap functions of others that it saves as well: a
norm's output, silu(gate) * up, a repeated head, a cast. Inside `with Saver():` an observer of torch's functions notes
what such a tensor was made from, and the tensor is given up: the backward pass computes it again. What remains can go
through a codec. No architecture is known here, and no module is touched.

A storage is told by its identity together with a weak reference, which keeps the identity from being given to
another, and by its version, which every change in place raises; an address alone would soon be another tensor's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from trimtab.core.errors import UserError

Codec = Literal["exact", "bf16", "int8", "int4"]
CODECS: tuple[Codec, ...] = ("exact", "bf16", "int8", "int4")
GROUP = 64  # neighbours in a storage that share a scale
SMALL = 1 << 14  # elements below which a tensor is kept, and as it is
SWEEP = 16  # recipes noted between two looks for storages that are gone

# functions whose cost is a pass or two over memory; a name with and without underscores is the same function
CHEAP = frozenset(
    {"mul", "rmul", "multiply", "add", "radd", "sub", "rsub", "div", "truediv", "rtruediv", "true_divide", "neg", "abs"}
    | {"pow", "square", "rsqrt", "sqrt", "reciprocal", "exp", "log", "erf", "sin", "cos", "clamp", "sigmoid", "tanh"}
    | {"silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "hardswish", "softplus", "mish"}
    | {"to", "float", "bfloat16", "half", "type", "type_as", "contiguous", "clone", "reshape", "flatten"}
    | {"repeat", "repeat_interleave", "cat", "stack", "concat", "where", "masked_fill", "mean", "sum"}
    | {"layer_norm", "rms_norm", "group_norm"}
)
DEEPEST = 1  # products in a row that a recipe may have: a longer chain would bring back all of a model at once
PRODUCTS = frozenset({"linear"})  # functions that are recomputed as far as `recompute` says


# ---- codecs


@dataclass(frozen=True)
class Encoded:
    """A storage's values through a codec; `int8` and `int4` hold a 16-bit scale for each `GROUP` values."""

    codec: Codec
    codes: Tensor
    scale: Tensor | None
    count: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)


def encode(flat: Tensor, codec: Codec) -> Encoded:
    """Values `[n]` through a codec.

    Integers are symmetric, x = scale * code with scale = max |x| / 127 (or 7) of the group in bfloat16, whose range
    is that of fp32: no group overflows.

    >>> x = torch.linspace(-1, 1, 100)
    >>> float((decode(encode(x, "int8")) - x).abs().max()) < 0.006
    True
    """
    n = flat.numel()
    if codec == "bf16":
        return Encoded(codec, flat.to(torch.bfloat16), None, n, flat.dtype)
    top = 127 if codec == "int8" else 7
    padded = torch.nn.functional.pad(flat, (0, -n % GROUP)) if n % GROUP else flat
    groups = padded.view(-1, GROUP)
    low, high = torch.aminmax(groups, dim=1, keepdim=True)
    limit = torch.maximum(high, low.neg_()).float()
    scale = (limit / top).clamp_min_(1e-30).to(torch.bfloat16)
    scaled = groups * scale.float().reciprocal_()
    codes = scaled.round_().clamp_(-top, top).to(torch.int8)
    if codec == "int4":
        pairs = codes.view(-1, 2)
        codes = ((pairs[:, 0] + 8) | ((pairs[:, 1] + 8) << 4)).view(torch.uint8)
    return Encoded(codec, codes, scale, n, flat.dtype)


def decode(encoded: Encoded) -> Tensor:
    """The values again, `[n]`, in the type that they had."""
    if encoded.codec == "bf16" or encoded.scale is None:
        return encoded.codes.to(encoded.dtype)
    codes = encoded.codes
    if encoded.codec == "int4":
        codes = torch.stack((codes & 15, codes >> 4), 1).view(torch.int8) - 8
    values = codes.view(-1, GROUP).to(torch.float32).mul_(encoded.scale.float())
    return values.view(-1)[: encoded.count].to(encoded.dtype)


# ---- nodes: a storage at a version


@dataclass(frozen=True)
class _View:
    """How a tensor lies in a storage."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> _View:
        return _View(tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def on(self, flat: Tensor) -> Tensor:
        return flat.view(self.dtype).as_strided(self.size, self.stride, self.offset)


def _flat(tensor: Tensor) -> Tensor:
    """All of a tensor's storage, in its type."""
    n = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((n,), (1,), 0)


class _Node:
    """A storage that is kept, or how it is computed from others."""

    __slots__ = ("__weakref__", "call", "depth", "kept", "nbytes", "saver", "uses", "value", "version", "view")

    def __init__(self, saver: Saver, tensor: Tensor, call: _Call | None) -> None:
        self.saver, self.version, self.view, self.call = saver, tensor._version, _View.of(tensor), call
        self.nbytes = tensor.untyped_storage().nbytes()
        self.kept: Tensor | Encoded | None = None if call else _flat(tensor)
        self.depth = call.depth() if call else 0
        self.uses = 0  # handles, and recipes in use, that need this node
        self.value: Tensor | None = None  # computed again, while handles will ask for it

    def retain(self) -> None:
        self.uses += 1
        if self.uses == 1:
            if self.call is None:
                self.saver.held += self.nbytes
                self.saver.peak = max(self.saver.peak, self.saver.held)
            else:
                for node in self.call.nodes():
                    node.retain()

    def release(self) -> None:
        self.uses -= 1
        if self.uses == 0:
            self.value = None
            if self.call is None:
                self.saver.held -= self.nbytes
            else:
                for node in self.call.nodes():
                    node.release()

    def pack(self, codec: Codec) -> None:
        """Send what is kept through the codec."""
        if not isinstance(self.kept, Tensor) or codec == "exact" or self.kept.numel() < SMALL:
            return
        if not self.kept.is_floating_point() or self.kept.element_size() < 2 or self.kept.dtype == torch.float64:
            return
        if codec == "bf16" and self.kept.element_size() == 2:
            return
        self._checked()
        with torch.no_grad():
            self.kept = encode(self.kept, codec)
        self.saver.held += self.kept.nbytes - self.nbytes
        self.nbytes = self.kept.nbytes

    def become(self, call: _Call) -> None:
        """Give up what is kept, for a recipe."""
        self.saver.held -= self.nbytes
        self.kept, self.call = None, call
        for node in call.nodes():
            node.retain()

    def flat(self) -> Tensor:
        """All the storage's values."""
        if self.kept is not None:
            return decode(self.kept) if isinstance(self.kept, Encoded) else self._checked()
        if self.value is not None:
            return self.value
        assert self.call is not None
        out = self.call.run()
        if out.stride() != self.view.stride or out.storage_offset() != self.view.offset:
            out = torch.empty_strided(self.view.size, self.view.stride, dtype=out.dtype, device=out.device).copy_(out)
        flat = _flat(out)
        if self.uses > 1:  # another will ask
            self.value = flat
        return flat

    def _checked(self) -> Tensor:
        assert isinstance(self.kept, Tensor)
        if self.kept._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {self.view.size} that a gradient needs was changed in place after it was used"
            )
        return self.kept


@dataclass(frozen=True)
class _Ref:
    """A tensor as a recipe's argument, or as what autograd holds: a node and a view."""

    node: _Node
    view: _View

    def tensor(self) -> Tensor:
        return self.view.on(self.node.flat())


class _Handle:
    """What autograd holds in place of a tensor."""

    __slots__ = ("ref",)

    def __init__(self, ref: _Ref) -> None:
        self.ref = ref
        ref.node.retain()

    def __del__(self) -> None:
        self.ref.node.release()


@dataclass(frozen=True)
class _Call:
    """A function with its arguments, tensors as `_Ref`s."""

    function: Callable[..., Tensor]
    args: Any
    kwargs: Any
    product: bool

    def nodes(self) -> list[_Node]:
        found: list[_Node] = []
        _map((self.args, self.kwargs), lambda x: found.append(x.node) if isinstance(x, _Ref) else None)
        return found

    def depth(self) -> int:
        """How many products follow one another on the way from what is kept."""
        return self.product + max((node.depth for node in self.nodes()), default=0)

    @torch.no_grad()
    def run(self) -> Tensor:
        args, kwargs = _map((self.args, self.kwargs), lambda x: x.tensor() if isinstance(x, _Ref) else x)
        return self.function(*args, **kwargs)

    def leaves(self, seen: dict[int, _Node]) -> bool:
        """Gather what has to be kept for this, and say whether a product must be computed that is not computed yet."""
        product = self.product
        for node in self.nodes():
            if node.call is None:
                seen[id(node)] = node
            elif not node.uses:
                product |= node.call.leaves(seen)
        return product


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(tree, tuple | list):
        return type(tree)([_map(x, change) for x in tree]) if type(tree) in (tuple, list) else change(tree)
    if type(tree) is dict:
        return {k: _map(v, change) for k, v in tree.items()}
    return change(tree)


# ---- the saver


class _Observer(TorchFunctionMode):
    """Shows the saver every function of torch's that makes a tensor."""

    def __init__(self, saver: Saver) -> None:
        self.saver = saver

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if type(out) is Tensor and torch.is_grad_enabled():
            self.saver.made(out, func, args, kwargs)
        return out


def _same(node: _Node) -> _Node:
    return node


_active: list[Saver] = []


def derived(out: Tensor, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Tell the saver at work, if any, that `out` is `function(*args)`, a product; gives `out` back.

    For functions with a backward of their own, which no observer sees.
    """
    if _active and torch.is_grad_enabled():
        _active[-1].made(out, function, args, {}, product=True)
    return out


def cheap(out: Tensor, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """The same for a function that costs a pass or two over memory."""
    if _active and torch.is_grad_enabled():
        _active[-1].made(out, function, args, {}, known=True)
    return out


class Saver:
    """Inside `with`, autograd keeps each storage once, cheap functions as recipes, and the rest through a codec.

    Args:
        free: tensors that are there anyway (parameters and buffers): they cost nothing, and go by themselves.
        codec: how what must be kept is kept: `exact`, `bf16`, `int8` or `int4` (groups of 64 with a 16-bit scale).
        recompute: share of the bytes of matrix products, which a recipe could give, that is computed again and not
            kept: 0 none, 1 all, and then what is cheaply computed from products too: a transformer block then keeps
            its two residual states and the output of attention.

    With `exact` the gradients are those of plain autograd, bit for bit where a function computes the same twice.

    >>> w = torch.nn.Parameter(torch.eye(300))
    >>> x = torch.ones(300, 300)
    >>> with Saver([w]) as saver:
    ...     gate = x @ w
    ...     loss = (torch.nn.functional.silu(gate) * 2 @ w).sum()
    >>> loss.backward()  # of x, gate, silu(gate) and 2 silu(gate), two were kept
    >>> saver.peak == 2 * 4 * 300 * 300, saver.held
    (True, 0)
    """

    def __init__(self, free: Iterable[Tensor] = (), codec: Codec = "exact", recompute: float = 0.0) -> None:
        if codec not in CODECS:
            raise UserError(f"saved tensors were asked for as {codec!r}; they are kept as {', '.join(CODECS)}")
        if not 0 <= recompute <= 1:
            raise UserError(f"a share of {recompute} of the products to compute again was asked for; it is 0 to 1")
        self.codec: Codec = codec
        self.recompute = recompute
        self.held = 0  # bytes kept now
        self.peak = 0  # most bytes kept since the last `with`
        self._free = {t.untyped_storage()._cdata for t in free}
        self._nodes: dict[int, tuple[StorageWeakRef, Callable[[], _Node | None]]] = {}
        self._pending: list[weakref.ref[_Node]] = []
        self._noted = 0
        self._credit = 0.0
        self._entered: list[Any] = []

    def __enter__(self) -> Saver:
        self._nodes.clear()
        self.peak, self._credit = self.held, 0.0
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        observer = _Observer(self)
        hooks.__enter__()
        observer.__enter__()
        self._entered = [observer, hooks]
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        for context in self._entered:
            context.__exit__(*error)
        self._settle()
        self._nodes.clear()  # recipes that nobody needs hold tensors

    # ---- noting recipes

    def made(
        self, out: Tensor, function: Any, args: Any, kwargs: Any, product: bool = False, known: bool = False
    ) -> None:
        """Note that `out` is a function of the arguments, where it is a cheap one or a product."""
        name = getattr(function, "__name__", "").strip("_")
        product = product or name in PRODUCTS
        known = known or product or name in CHEAP
        if not known or torch.is_autocast_enabled(out.device.type) or kwargs.get("out") is not None:
            self._settle()
            return
        storage = out.untyped_storage()
        tiny = out.numel() < SMALL  # worth keeping: to compute it again takes a pass over what it came from
        if tiny or storage._cdata in self._free or self._shares(storage, args) or (product and not self.recompute):
            self._settle()
            return
        named, given = _map((args, kwargs), self._argument)
        call = _Call(function, named, given, product)
        # a residual addition is kept: small beside the products that can be computed again from it
        residual = name.endswith("add") and any(n.call is not None and n.call.product for n in call.nodes())
        if residual or call.depth() > DEEPEST:
            self._settle()
            return
        before = self._find(out)
        if before is None:
            self._nodes[storage._cdata] = (StorageWeakRef(storage), partial(_same, _Node(self, out, call)))
            self._noted += 1
            if self._noted % SWEEP == 0:
                self._nodes = {k: v for k, v in self._nodes.items() if not v[0].expired()}
        elif before.call is None and isinstance(before.kept, Tensor) and before.uses and self._worth(call, before):
            before.become(call)  # the function saved its own output, before its recipe was known
        self._settle()

    def _shares(self, storage: Any, args: Any) -> bool:
        """Whether a result is only a view of an argument."""
        found: list[bool] = []

        def look(x: Any) -> None:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata == storage._cdata:
                found.append(True)

        _map(args, look)
        return bool(found)

    def _argument(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in self._free:
            return value.detach() if isinstance(value, Tensor) else value
        return _Ref(self._find(value) or self._leaf(value), _View.of(value))

    def _find(self, tensor: Tensor) -> _Node | None:
        """The node of a tensor's storage, if its content is still what the node stands for."""
        entry = self._nodes.get(tensor.untyped_storage()._cdata)
        node = entry[1]() if entry is not None else None
        return node if node is not None and node.version == tensor._version else None

    def _leaf(self, tensor: Tensor) -> _Node:
        node = _Node(self, tensor, None)
        storage = tensor.untyped_storage()
        self._nodes[storage._cdata] = (StorageWeakRef(storage), weakref.ref(node))
        return node

    # ---- what autograd calls

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata in self._free or tensor.layout != torch.strided:
            return tensor
        node = self._find(tensor)
        if node is None or (node.call is not None and not node.uses and not self._worth(node.call, node)):
            node = self._leaf(tensor)
        if node.call is None and not node.uses:
            self._pending.append(weakref.ref(node))
        return _Handle(_Ref(node, _View.of(tensor)))

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        return packed.ref.tensor() if isinstance(packed, _Handle) else packed

    def _worth(self, call: _Call, node: _Node) -> bool:
        """Whether a recipe needs fewer bytes than the tensor: what must be kept for it counts, if it is not kept
        already. A recipe with a product takes part of what `recompute` allows.
        """
        leaves: dict[int, _Node] = {}
        product = call.leaves(leaves)
        new = sum(leaf.nbytes for leaf in leaves.values() if not leaf.uses)
        if new >= node.nbytes:
            return False
        if not product:
            return True
        if not call.product and self.recompute < 1:
            return False  # passes behind the product as well: only where all is computed again
        self._credit += self.recompute * node.nbytes
        if self._credit < node.nbytes * (1 - 1e-9):
            return False
        self._credit -= node.nbytes
        return True

    def _settle(self) -> None:
        """Send what was kept since the last function through the codec."""
        if self._pending:
            for reference in self._pending:
                if (node := reference()) is not None and node.uses:
                    node.pack(self.codec)
            self._pending.clear()
