"""Record what a model's forward does, tensor by tensor, as a small graph that the modelmap reads.

The graph is taken below autograd, where every torch call has one of a few hundred well-defined forms, so nothing in it
depends on how the model's author spelt an operation, or on the name of any layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Composite calls that say more whole than taken apart.
WHOLE = {
    "linear", "matmul", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm", "scaled_dot_product_attention",
    "dropout", "softmax", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d",
    "max_pool2d", "max_pool3d", "repeat_interleave", "embedding",
}  # fmt: skip
CASTS = {"_to_copy", "clone", "alias", "detach", "dropout", "native_dropout", "lift_fresh", "contiguous", "_to_dense"}
RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze"}
TAKES = {"slice", "select", "index", "index_select", "repeat_interleave", "expand", "permute", "transpose"}
FLIPS = {"t", "transpose", "permute", "numpy_T", "mT"}
# What may stand between a parameter and its use as a weight.
WEIGHT_STEPS = CASTS | RESHAPES | FLIPS | {"slice", "select", "index", "index_select", "split", "split_with_sizes",
                                           "unbind", "expand", "_to_copy"}  # fmt: skip
VIEWS = RESHAPES | FLIPS | CASTS | {"slice", "select", "split", "split_with_sizes", "unbind", "expand", "cat", "stack",
                                    "repeat", "repeat_interleave"}  # fmt: skip
# Calls that take of their tensor its shape alone.
SHAPED = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones",
          "new_empty", "new_full", "new_empty_strided"}  # fmt: skip


@dataclass(frozen=True)
class Ref:
    """Stands for the value `number` in the recorded arguments of a node."""

    number: int


@dataclass(eq=False)
class Value:
    """One tensor at one moment: an in-place write makes a new value."""

    number: int
    shape: tuple[int, ...]
    floating: bool
    producer: Node | None = field(default=None, repr=False)
    name: str | None = None  # of the parameter or buffer it is
    parameter: bool = False
    source: str | None = None  # the one parameter or buffer that it is a rearrangement of
    flipped: bool = False  # whether the last two dimensions of that source are swapped in it
    active: bool = False  # depends on the model's inputs
    ancestors: int = field(default=0, repr=False)  # bit set of the active values it depends on, itself included


@dataclass(eq=False)
class Node:
    """One call."""

    index: int
    op: str
    call: Any
    args: tuple
    kwargs: dict
    inputs: list[Value]
    outputs: list[Value]
    module: str
    pointwise: bool = False
    gone: bool = False  # absorbed into a recognised whole

    @property
    def out(self) -> Value:
        return self.outputs[0]


@dataclass(frozen=True)
class Call:
    """One execution of a module: the nodes `start <= index < end`, and the values that went in and came out."""

    path: str
    kind: type
    start: int
    end: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    leaf: bool


@dataclass
class Graph:
    """Everything that one forward did."""

    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of parameters and buffers
    aliases: dict[str, list[str]] = field(default_factory=dict)  # every name of the tensor first met under this one

    def is_parameter(self, name: str) -> bool:
        return any(value.name == name and value.parameter for value in self.values)

    def live(self) -> Iterator[Node]:
        return (node for node in self.nodes if not node.gone)

    def consumers(self) -> dict[Value, list[Node]]:
        """Who reads each value."""
        table: dict[Value, list[Node]] = {}
        for node in self.live():
            for value in dict.fromkeys(node.inputs):
                table.setdefault(value, []).append(node)
        return table


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nest of tuples, lists and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)


def _map(tree: Any, change: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(item, change) for item in tree) if type(tree) in (tuple, list) else tree
    if isinstance(tree, dict):
        return {key: _map(item, change) for key, item in tree.items()}
    return tree


class Recorder(TorchDispatchMode):
    """Writes every call below autograd into a `Graph`."""

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self.stack: list[str] = []
        self._now: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # ids are only unique among living objects
        self._storages: dict[int, list[Tensor]] = {}

    def new(self, tensor: Tensor, **facts: Any) -> Value:
        """A fresh value for what `tensor` holds now."""
        number = len(self.graph.values)
        value = Value(number, tuple(tensor.shape), tensor.is_floating_point(), **facts)
        if value.active:
            value.ancestors |= 1 << number
        self.graph.values.append(value)
        if id(tensor) not in self._now:
            self._alive.append(tensor)
            self._storages.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self._now[id(tensor)] = value
        return value

    def value(self, tensor: Tensor) -> Value:
        """What `tensor` holds now."""
        found = self._now.get(id(tensor))
        return self.new(tensor) if found is None else found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        op = func._schema.name.split("::")[1]
        if op not in WHOLE and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = [] if op in SHAPED else [self.value(tensor) for tensor in tensors((args, kwargs))]
        template = _map(args, lambda t: Ref(self.value(t).number)), _map(kwargs, lambda t: Ref(self.value(t).number))
        written = [
            tensor
            for position, slot in enumerate(func._schema.arguments)
            if slot.alias_info is not None and slot.alias_info.is_write
            for tensor in tensors(args[position] if position < len(args) else kwargs.get(slot.name))
        ]
        result = func(*args, **kwargs)
        fresh = written or [t for t in tensors(result) if not any(t is known for known in tensors((args, kwargs)))]
        if fresh:
            tags = torch.Tag.pointwise in func.tags
            self._node(op.rstrip("_") if written else op, func, *template, inputs, fresh, bool(written), tags)
        return result

    def _node(
        self, op: str, func: Any, args: Any, kwargs: Any, inputs: list, fresh: list, written: bool, pointwise: bool
    ) -> Node:
        graph = self.graph
        module = self.stack[-1] if self.stack else ""
        node = Node(len(graph.nodes), op, func, args, kwargs, inputs, [], module, pointwise)
        graph.nodes.append(node)
        active = any(value.active for value in inputs)
        ancestors = 0
        for value in inputs:
            ancestors |= value.ancestors
        source, flipped = self._lineage(node)
        for tensor in fresh:
            facts = {"producer": node, "active": active, "ancestors": ancestors, "source": source, "flipped": flipped}
            node.outputs.append(self.new(tensor, **facts))
        if written:
            for tensor in fresh:
                others = [t for t in self._storages[tensor.untyped_storage()._cdata] if t is not tensor]
                if others and op != "scatter_into_views":
                    before = [self.value(t) for t in others]
                    self._node("scatter_into_views", None, (), {}, [self.value(tensor), *before], others, True, False)
        return node

    @staticmethod
    def _lineage(node: Node) -> tuple[str | None, bool]:
        if node.op not in WEIGHT_STEPS and not (node.op in ("add", "mul") and len(node.inputs) == 1):
            return None, False
        first = node.inputs[0] if node.inputs else None
        if first is None or first.source is None:
            return None, False
        return first.source, first.flipped ^ (node.op in FLIPS)


def record(model: nn.Module, args: tuple, kwargs: dict, weights: dict[str, Tensor] | None = None) -> Graph:
    """Run `model` once and return the graph of what it did.

    Args:
        model: left as it was: training flags are put back, and hooks removed.
        args, kwargs: the forward's arguments.
        weights: stand-ins for parameters and buffers by name (meta copies), or None to use the model's own.
    """
    recorder = Recorder()
    graph = recorder.graph
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
    for name, own in named.items():
        tensor = own if weights is None else weights[name]
        graph.shapes[name] = tuple(tensor.shape)
        if id(tensor) not in recorder._now:
            recorder.new(tensor, name=name, source=name, parameter=name in parameters)
        graph.aliases.setdefault(recorder.value(tensor).name or name, []).append(name)
    for tensor in tensors((args, kwargs)):
        recorder.new(tensor, active=True)

    open_calls: list[tuple[int, tuple[Value, ...]]] = []

    def enter(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            recorder.stack.append(path)
            open_calls.append((len(graph.nodes), tuple(recorder.value(t) for t in tensors((args, kwargs)))))

        return hook

    def leave(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            recorder.stack.pop()
            start, inputs = open_calls.pop()
            outputs = tuple(recorder.value(t) for t in tensors(output))
            leaf = next(module.children(), None) is None
            graph.calls.append(Call(path, type(module), start, len(graph.nodes), inputs, outputs, leaf))

        return hook

    flags = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    handles = []
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(path), with_kwargs=True))
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), recorder:
            if weights is None:
                output = model(*args, **kwargs)
            else:
                output = torch.func.functional_call(model, weights, args, kwargs, tie_weights=False)
        graph.outputs = [recorder.value(tensor) for tensor in tensors(output)]
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, flag in flags.items():
            module.training = flag
    return graph


def canonical(value: Value) -> Value:
    """The value that `value` merely restates: casts, copies, and views that keep the last dimension whole."""
    while (node := value.producer) is not None and node.inputs and not node.gone and restates(node, value):
        value = node.inputs[0]
    return value


def restates(node: Node, value: Value) -> bool:
    """Whether `value`, an output of `node`, is the node's first input up to its type and the grouping of its rows."""
    before = node.inputs[0].shape
    if node.op in CASTS:
        return len(node.inputs) == 1
    if node.op == "slice":
        return before == value.shape
    # A view that keeps the last dimension whole only regroups rows; one of an image ([N, C, H, W]) must keep its shape.
    return node.op in RESHAPES and bool(before) and bool(value.shape) and before[-1] == value.shape[-1]


def rows(value: Value) -> Value:
    """The value whose rows (vectors along the last dimension) `value` holds, all or some of them, in any order."""
    while (node := value.producer) is not None and node.inputs and not node.gone:
        if restates(node, value) or keeps_rows(node, value):
            value = node.inputs[0]
        else:
            break
    return value


def keeps_rows(node: Node, value: Value) -> bool:
    """Whether `value`, an output of `node`, is made of whole rows of the node's first input."""
    if node.op not in TAKES or not node.inputs[0].shape or not value.shape:
        return False
    before = node.inputs[0].shape
    last = len(before) - 1
    if before[-1] != value.shape[-1]:
        return False
    arguments = [a for a in node.args[1:]]
    if node.op == "permute":
        return arguments[0][-1] % len(before) == last
    if node.op == "transpose":
        return last not in (arguments[0] % len(before), arguments[1] % len(before))
    if node.op in ("slice", "select", "index_select"):
        dim = arguments[0] if arguments else 0
        return dim % len(before) != last
    if node.op == "repeat_interleave":
        dim = arguments[1] if len(arguments) > 1 else node.kwargs.get("dim")
        return dim is not None and dim % len(before) != last
    if node.op == "index":
        return len(arguments[0]) < len(before) and all(i is not None for i in arguments[0])
    return node.op == "expand"
