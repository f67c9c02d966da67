"""Read a recorded forward: its norms, weights, attention products, blocks and residual stream, and what each is for."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .coupling import Coupled, Coupler, Member
from .modelmap import Attention, ModelMap, Norm, Residual, Sublayer
from .site import Kind, Site
from .trace import CASTS, RESHAPES, VIEWS, Call, Graph, Node, Ref, Value, canonical, keeps_rows, restates, rows

GATES = {
    "silu", "gelu", "sigmoid", "relu", "tanh", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu", "softplus",
    "mish", "erf", "exp", "clamp_min", "relu6", "square",
}  # fmt: skip
RESTATING = {
    "view", "_unsafe_view", "reshape", "slice", "select", "squeeze", "unsqueeze", "alias", "transpose", "permute",
    "clone", "_to_copy",
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """A weight at work in one node."""

    path: str
    parameter: str
    read: Value
    shape: tuple[int, ...]  # (out, in, ...)
    transposed: bool
    groups: int
    kind: Kind


class Anatomy:
    """Everything inferred from one graph, step by step."""

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.norms: dict[Node, Norm] = {}
        self.uses: dict[Node, Use] = {}
        self._find_norms()
        self._find_ancestors()
        self._find_uses()
        self.readers_of = graph.consumers()
        self.bits = {1 << use_node.out.number: use_node for use_node in self.uses}
        self.site_mask = sum(self.bits)
        self.cores = self._find_cores()
        self.core_mask = sum({1 << core[3].number for core in self.cores})
        self.final = {value for value in graph.outputs}
        self.block_calls = self._find_blocks()
        self.roles: dict[str, str] = {}
        self.times = Counter(call.path for call in graph.calls)
        self.idle = tuple(v.name for v in graph.values if v.parameter and v.name and v not in self.readers_of)
        # Experts that no token chose read what their siblings read, unseen by this forward.
        self.partial = bool(self.idle) and any(
            self._dispatched(n) for n, use in self.uses.items() if use.kind == "linear"
        )

    # ---- names

    def _owner(self, parameter: str, module: str) -> str:
        """The site's path: the module if it calls the parameter its weight, else the parameter's own name."""
        names = self.graph.aliases.get(parameter, [parameter])
        own = next((name for name in names if name.rpartition(".")[0] == module), names[0])
        head, _, tail = own.rpartition(".")
        return head if tail == "weight" and head else own

    def _node_values(self, node: Node) -> list[Any]:
        return [self.graph.values[a.number] if isinstance(a, Ref) else a for a in node.args]

    # ---- norms

    def _find_norms(self) -> None:
        readers = self.graph.consumers()
        for node in self.graph.nodes:
            if node.gone:
                continue
            arguments = self._node_values(node)
            if node.op in ("layer_norm", "rms_norm"):
                weight, bias = (arguments + [None] * 4)[2:4]
                kind = "layer" if node.op == "layer_norm" else "rms"
                self._norm(node, kind, weight, bias if kind == "layer" else None, arguments[1][-1])
            elif node.op == "batch_norm":
                self._norm(node, "batch", arguments[1], arguments[2], node.out.shape[1])
            elif node.op == "group_norm":
                weight, bias = (arguments + [None] * 4)[2:4]
                self._norm(node, "group", weight, bias, node.out.shape[1])
            elif node.op == "instance_norm":
                self._norm(node, "group", arguments[1], arguments[2], node.out.shape[1])
            elif node.op in ("rsqrt", "pow", "reciprocal", "sqrt") and node.inputs and node.inputs[0].active:
                self._composed_norm(node, readers)

    def _norm(
        self, node: Node, kind: Any, weight: Value | None, bias: Value | None, width: int, offset: float = 0.0
    ) -> None:
        names = [value.source if value is not None else None for value in (weight, bias)]
        own = next((name for name in names if name), None)
        path = self._owner(own, node.module).removesuffix(".bias") if own else node.module
        self.norms[node] = Norm(path, kind, names[0], names[1], offset, width)

    def _composed_norm(self, root: Node, readers: dict[Value, list[Node]]) -> None:
        """Recognise x / sqrt(mean(x^2) + eps), scaled, and make it one node."""
        if root.op == "pow" and root.args[1] != -0.5:
            return

        def bare(value: Value) -> Value:
            while value.producer is not None and value.producer.op in CASTS:
                value = value.producer.inputs[0]
            return value

        def made_by(value: Value, *ops: str) -> Node | None:
            node = value.producer
            return node if node is not None and node.op in ops else None

        inside = [root]
        value = root.inputs[0]
        if root.op == "reciprocal":
            rooted = made_by(value, "sqrt")
            if rooted is None:
                return
            inside.append(rooted)
            value = rooted.inputs[0]
        while step := made_by(value, "add", "clamp", "clamp_min", *CASTS):
            if sum(v.active for v in step.inputs) != 1:
                break
            inside.append(step)
            value = step.inputs[0]
        mean = made_by(value, "mean", "var")
        if mean is None or not mean.inputs[0].shape:
            return
        dims = mean.args[1] if len(mean.args) > 1 else mean.kwargs.get("dim")
        rank = len(mean.inputs[0].shape)
        if dims is None or [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])] != [rank - 1]:
            return
        inside.append(mean)
        source = mean.inputs[0]
        if mean.op == "mean":
            square = made_by(source, "pow", "mul", "square")
            squared = square is not None and (
                (square.op == "pow" and square.args[1] == 2)
                or square.op == "square"
                or (square.op == "mul" and len(square.inputs) == 2 and bare(square.inputs[0]) is bare(square.inputs[1]))
            )
            if square is None or not squared:
                return
            inside.append(square)
            source = square.inputs[0]
        source, kind = bare(source), "layer" if mean.op == "var" else "rms"
        centred = made_by(source, "sub")
        average = made_by(centred.inputs[-1], "mean") if centred is not None else None
        if centred is not None and average is not None and bare(average.inputs[0]) is bare(centred.inputs[0]):
            inside += [centred, average]
            source, kind = bare(centred.inputs[0]), "layer"
        wanted = "div" if root.op == "sqrt" else "mul"
        scaled = next((n for n in readers.get(root.out, []) if n.op == wanted and not n.gone), None)
        if scaled is None:
            return
        data = scaled.inputs[0] if wanted == "div" else next((v for v in scaled.inputs if v is not root.out), None)
        if data is None or data is root.out:
            return
        origin = bare(data)
        if origin is not source:
            shift = made_by(origin, "sub")
            if shift is None or bare(shift.inputs[0]) is not source or made_by(shift.inputs[-1], "mean") is None:
                return
            inside += [shift, *[n for n in [made_by(shift.inputs[-1], "mean")] if n is not None]]
        weight = bias = None
        offset = 0.0
        end = scaled
        while len(after := readers.get(end.out, [])) == 1:
            step = after[0]
            other = [v for v in step.inputs if v is not end.out]
            vector = len(other) == 1 and other[0].source is not None and other[0].shape == end.out.shape[-1:]
            if step.op in CASTS and not other:
                pass
            elif step.op == "mul" and vector and weight is None:
                weight = other[0]
                maker = made_by(weight, "add")
                offset = float(maker.args[1]) if maker is not None and isinstance(maker.args[1], (int, float)) else 0.0
            elif step.op == "add" and vector and weight is not None and bias is None:
                bias = other[0]
            else:
                break
            inside.append(end)
            end = step
        if end is not scaled:
            inside.append(scaled)
        for node in sorted(set(inside) - {end}, key=lambda n: -n.index):  # what others read as well stays
            node.gone = all(reader is end or reader.gone for reader in readers.get(node.out, []))
        end.op, end.pointwise = "norm", False
        end.inputs = [source, *[v for v in (weight, bias) if v is not None]]
        self._norm(end, kind, weight, bias, end.out.shape[-1], offset)

    def _find_ancestors(self) -> None:
        for node in self.graph.live():
            mask = 0
            for value in node.inputs:
                mask |= value.ancestors
            for value in node.outputs:
                value.ancestors = (mask | 1 << value.number) if value.active else 0

    # ---- weights

    def _find_uses(self) -> None:
        for node in self.graph.live():
            if node in self.norms or node.pointwise or not node.outputs:
                continue
            use = self._use(node)
            if use is not None:
                self.uses[node] = use

    def _use(self, node: Node) -> Use | None:
        arguments = self._node_values(node)
        if node.op == "embedding":
            weight, read = arguments[:2]
            return self._make_use(node, weight, read, weight.shape, False, 1, "embedding") if weight.source else None
        if node.op.startswith("conv"):
            read, weight = arguments[:2]
            if not weight.source or not read.active:
                return None
            flipped = "transpose" in node.op
            groups = arguments[7 if flipped else 6] if len(arguments) > (7 if flipped else 6) else 1
            if flipped:
                groups = arguments[6] if len(arguments) > 6 else 1
                shape = (weight.shape[1] * groups, weight.shape[0] // groups, *weight.shape[2:])
            else:
                shape = weight.shape
            return self._make_use(node, weight, read, shape, flipped, groups, "conv")
        if node.op == "linear":
            read, weight = arguments[:2]
            swapped = weight.flipped
        elif "mm" in node.op or node.op == "matmul":
            first, second = arguments[1:3] if node.op in ("addmm", "baddbmm") else arguments[:2]
            if getattr(second, "source", None) and first.active:
                read, weight, swapped = first, second, not second.flipped
            elif getattr(first, "source", None) and second.active:
                read, weight, swapped = second, first, first.flipped
                if read.producer is not None and read.producer.op == "unsqueeze" and read.shape[-1] == 1:
                    read = read.producer.inputs[0]
            else:
                return None
        else:
            return None
        if not weight.source or not read.active or len(weight.shape) < 2:
            return None
        stored = self.graph.shapes[weight.source]
        if len(stored) < 2:
            return None
        shape = (*stored[:-2], stored[-1], stored[-2]) if swapped else stored
        return self._make_use(node, weight, read, shape, swapped, 1, "experts" if len(stored) > 2 else "linear")

    def _make_use(
        self, node: Node, weight: Value, read: Value, shape: Any, swapped: bool, groups: int, kind: Kind
    ) -> Use:
        path = self._owner(weight.source or "", node.module)
        return Use(path, weight.source or "", read, tuple(shape), swapped, groups, kind)

    # ---- searching the graph

    def nearest_back(self, value: Value) -> list[Node]:
        """The weights closest behind a value."""
        found, seen, queue = [], {value}, [value]
        while queue:
            node = queue.pop().producer
            if node is None:
                continue
            if node in self.uses:
                if node not in found:
                    found.append(node)
                continue
            for source in node.inputs:
                if source.active and source not in seen:
                    seen.add(source)
                    queue.append(source)
        return sorted(found, key=lambda n: n.index)

    def nearest_ahead(self, value: Value) -> list[Node]:
        """The weights that read a value, itself or through other operations, up to where it joins a residual."""
        found, seen, queue = [], {value}, [value]
        while queue:
            current = queue.pop()
            for node in self.readers_of.get(current, []):
                if node in self.uses:
                    if self.uses[node].read.ancestors >> value.number & 1 and node not in found:
                        found.append(node)
                    continue
                if self._direct_join(node):
                    continue
                for out in node.outputs:
                    if out not in seen:
                        seen.add(out)
                        queue.append(out)
        return sorted(found, key=lambda n: n.index)

    def _terms(self, node: Node) -> list[Value] | None:
        """The terms of a sum of activations of one shape; inner sums that nothing else reads are opened."""
        if node.op != "add" or len(node.inputs) != 2:
            return None
        if not all(v.active and v.floating and v.shape == node.out.shape for v in node.inputs):
            return None
        terms: list[Value] = []
        for value in node.inputs:
            inner = value.producer
            alone = inner is not None and len(self.readers_of.get(value, [])) == 1
            terms += (self._terms(inner) if alone and inner is not None and not inner.gone else None) or [value]
        return terms

    def _shortcut(self, terms: list[Value]) -> Value | None:
        """The term that all the others depend on through a weight."""
        for term in terms:
            start = canonical(term)
            others = [t for t in terms if t is not term]
            if all(t.ancestors >> start.number & 1 and t.ancestors & ~start.ancestors & self.site_mask for t in others):
                return term
        return None

    def _direct_join(self, node: Node) -> bool:
        terms = self._terms(node)
        return terms is not None and self._shortcut(terms) is not None

    # ---- attention products

    def _find_cores(self) -> list[tuple[Value, Value, Value, Value, int]]:
        """(query, key, value, output, index of the node) of every attention product."""
        cores = []
        for node in self.graph.live():
            if node.op == "scaled_dot_product_attention":
                q, k, v = node.inputs[:3]
                cores.append((q, k, v, node.out, node.index))
            elif node.op in ("softmax", "_softmax"):
                score = node.inputs[0]
                while (step := score.producer) is not None and step.op not in ("matmul", "bmm", "baddbmm"):
                    ahead = [v for v in step.inputs if v.active and v.floating]
                    plain = step.pointwise or step.op in CASTS | RESHAPES | {"masked_fill"}
                    if step in self.uses or not ahead or not plain:
                        step = None
                        break
                    score = ahead[0]
                if step is None or step in self.uses:
                    continue
                q, k = step.inputs[-2:]
                while k.producer is not None and k.producer.op in ("transpose", "permute", "mul", "clone"):
                    swapped = k.producer.op in ("transpose", "permute")
                    k = k.producer.inputs[0]
                    if swapped:
                        break
                share, product = node.out, None
                while product is None and (after := self.readers_of.get(share)):
                    product = next((n for n in after if n.op in ("matmul", "bmm") and n.inputs[0] is share), None)
                    onward = next((n for n in after if n.op in CASTS | RESHAPES | {"expand", "mul"}), None)
                    if product is None and onward is None:
                        break
                    share = share if product is not None else onward.out  # type: ignore[union-attr]
                if product is not None and product not in self.uses:
                    cores.append((q, k, product.inputs[1], product.out, product.index))
        return cores

    # ---- blocks

    def _find_blocks(self) -> list[Call]:
        """The longest chain of modules of one class, each fed by the one before."""
        by_kind: dict[type, list[Call]] = {}
        for call in sorted(self.graph.calls, key=lambda c: (c.start, -c.end)):
            if not call.leaf:
                by_kind.setdefault(call.kind, []).append(call)
        indices = sorted(node.index for node in self.uses)
        joins = sorted(node.index for node in self.graph.live() if node.op == "add" and self._direct_join(node))

        def within(call: Call, where: list[int]) -> int:
            return bisect_left(where, call.end) - bisect_left(where, call.start)

        best: tuple[tuple, list[Call]] = ((), [])
        for calls in by_kind.values():
            chain: list[Call] = []
            chains = []
            for call in calls:
                if chain and call.end <= chain[-1].end:
                    continue  # inside the previous one
                fed = {canonical(v) for v in call.inputs if v.active}
                if chain and not fed & {canonical(v) for v in chain[-1].outputs if v.active and v.floating}:
                    chains.append(chain)
                    chain = []
                chain.append(call)
            for run in [*chains, chain]:
                if not all(within(call, indices) for call in run):
                    continue
                repeated = len({call.path for call in run})
                adding = sum(bool(within(call, joins)) for call in run)
                alone = len(run) == 1 and not (adding and self._in_list(run[0].path))
                if alone:
                    continue
                rank = (len(run) > 1, adding > 0, repeated, run[0].path.count("."), adding)
                if rank > best[0]:
                    best = rank, run
        return best[1]

    def _in_list(self, path: str) -> bool:
        parent = path.rpartition(".")[0]
        return isinstance(self.model.get_submodule(parent), (nn.ModuleList, nn.Sequential))

    def block_of(self, path: str) -> int | None:
        for index, block in enumerate(self.blocks):
            if path == block or path.startswith(block + "."):
                return index
        return None

    # ---- the residual stream

    def _walk(self) -> None:
        """Follow the stream from its end back to its origin, taking each branch off as a sublayer."""
        # (node, shortcut, branches, norm after it, run)
        self.joins: list[tuple[Node, Value | None, list[Value], Node | None, int]] = []
        self.stream: list[tuple[Value, int]] = []
        self.stream_norms: list[tuple[Node, int]] = []
        self.starts: dict[int, Value] = {}  # the stream value before the first sublayer of each run
        run = 0
        if self.block_calls:
            run = self._follow(next(v for v in self.block_calls[-1].outputs if v.floating), run, inside=True)
        self.origin = [self.starts[run]] if run in self.starts else []
        ends = [v for v in self.graph.outputs if v.floating]
        if ends:  # a second stack (a decoder), or everything where there are no blocks
            last = self._follow(ends[0], run + 1, inside=False)
            if not self.origin:
                self.origin = [self.starts.get(last, ends[0])]

    def _follow(self, value: Value, run: int, inside: bool) -> int:
        """One walk along the stream; returns the last run, where a run is a stretch that no weight interrupts."""
        norm: Node | None = None
        known = {join[0] for join in self.joins}
        while (node := value.producer) is not None and node not in known:
            self.stream.append((value, run))
            terms = self._terms(node)
            if terms is not None:
                shortcut = self._shortcut(terms)
                start = shortcut if shortcut is not None else self._common(terms)
                if start is None:
                    break
                branches = terms if shortcut is None else [t for t in terms if t is not shortcut]
                self.joins.append((node, shortcut, branches, norm if inside else None, run))
                run += shortcut is None
                self.starts[run] = start
                value, norm, inside = start, None, True
            elif node in self.norms:
                inside = inside or norm is not None
                norm = node
                self.stream_norms.append((node, run))
                value = node.inputs[0]
            elif node in self.uses:
                if node.op == "embedding" or self._is_origin(node):
                    break
                value, norm, run = self.uses[node].read, None, run + 1
            else:
                sources = [v for v in node.inputs if v.active and v.floating]
                if len(sources) != 1:
                    break
                if not (node.pointwise or node.op in CASTS | RESTATING):
                    norm = None
                value = sources[0]
        else:
            self.stream.append((value, run))
        return run

    def _is_origin(self, node: Node) -> bool:
        """Whether no other weight lies before this one."""
        return not self.uses[node].read.ancestors & self.site_mask

    def _common(self, terms: list[Value]) -> Value | None:
        """The latest activation that every term depends on, where a weight lies between it and some term."""
        mask = terms[0].ancestors
        for term in terms[1:]:
            mask &= term.ancestors
        while mask:
            top = mask.bit_length() - 1
            value = self.graph.values[top]
            if value.floating:
                between = [t.ancestors & ~value.ancestors & self.site_mask for t in terms]
                return value if any(between) and value.producer is not None else None
            mask &= ~(1 << top)
        return None

    def _branch_sites(self, branch: Value, start: Value) -> list[Node]:
        mask = branch.ancestors & ~start.ancestors & self.site_mask
        found = []
        while mask:
            low = mask & -mask
            node = self.bits[low]
            if node.out.ancestors >> start.number & 1:
                found.append(node)
            mask ^= low
        return sorted(found, key=lambda n: n.index)

    def _make_sublayers(self) -> tuple[Sublayer, ...]:
        made: list[tuple[int, Sublayer]] = []
        self.sublayer_nodes: dict[Sublayer, tuple[list[Node], Value]] = {}
        for join, shortcut, branches, after, _ in self.joins:
            start = canonical(shortcut) if shortcut is not None else self._common(branches)
            assert start is not None
            if shortcut is None:  # a shortcut with weights of its own: the longer side is the branch
                branches = [max(branches, key=lambda t: len(self._branch_sites(t, start)))]
            for branch in branches:
                sites = self._branch_sites(branch, start)
                norms = [
                    n
                    for n in self.norms
                    if branch.ancestors >> n.out.number & 1 and canonical(n.inputs[0]) is start and not n.gone
                ]
                doors = {start, *[n.out for n in norms]}
                inputs = [n for n in sites if rows(self.uses[n].read) in doors]
                outputs = self.nearest_back(branch)
                outputs = [n for n in outputs if n in sites and not self._routes(n)]
                inner = branch.ancestors & ~start.ancestors
                kind: Any = "attention" if inner & self.core_mask else "mlp"
                if any(self.uses[n].kind == "conv" for n in sites):
                    kind = "block"
                post = self._norm_before(branch, start) or after
                path = self._module_of(branch, join, start, sites)
                sublayer = Sublayer(
                    self.block_of(path) if self.blocks else None,
                    kind,
                    path,
                    self.norms[norms[0]].path if len(norms) == 1 else None,
                    tuple(dict.fromkeys(self.uses[n].path for n in inputs)),
                    tuple(dict.fromkeys(self.uses[n].path for n in outputs)),
                    self.norms[post].path if post is not None and kind != "block" else None,
                )
                self.sublayer_nodes[sublayer] = (sites, branch)
                made.append((max((n.index for n in sites), default=join.index), sublayer))
        return tuple(sublayer for _, sublayer in sorted(made, key=lambda pair: pair[0]))

    def _norm_before(self, branch: Value, start: Value) -> Node | None:
        value = branch
        while (node := value.producer) is not None and node not in self.uses and value is not start:
            if node in self.norms:
                return node
            sources = [v for v in node.inputs if v.active and v.floating]
            if len(sources) != 1:
                return None
            value = sources[0]
        return None

    def _module_of(self, branch: Value, join: Node, start: Value, sites: list[Node]) -> str:
        """The outermost module that gives this branch."""
        value: Value | None = branch
        while value is not None:
            target = canonical(value)
            fits = [
                call
                for call in self.graph.calls
                if any(canonical(out) is target for out in call.outputs) and not call.start <= join.index < call.end
            ]
            whole = [call for call in fits if sites and call.start <= sites[-1].index < call.end]
            # A module that holds no weight of the branch (a norm after it) names it only if it serves nothing else.
            fits = whole or [call for call in fits if self.times[call.path] == 1]
            if fits:
                return min(fits, key=lambda call: (call.path.count("."), call.end - call.start)).path
            node = target.producer
            if node is None or node in self.uses or target is start:
                break
            sources = [v for v in node.inputs if v.active and v.floating]
            value = sources[0] if sources else None
        return self.uses[sites[-1]].path if sites else join.module

    # ---- roles

    def _assign_roles(self) -> None:
        roles = self.roles
        paths = list(dict.fromkeys(use.path for use in self.uses.values()))

        def give(nodes: Iterable[Node], role: str) -> None:
            for node in nodes:
                roles.setdefault(self.uses[node].path, role)

        tables = {self.uses[n].shape[0] for n in self.uses if n.op == "embedding"}
        for node, use in self.uses.items():
            if node.op == "embedding":
                length = max(use.read.shape[-1:], default=1)
                place = not use.read.active or not self._is_token_index(use.read)
                give([node], "position" if place and use.shape[0] >= length and use.shape[0] > 2 else "embed")
        for q, k, v, out, _ in self.cores:
            sides = [self.nearest_back(operand) for operand in (q, k, v)]
            shared = [n for n in sides[0] if n in sides[1] or n in sides[2]]
            give(shared, "qkv")
            give([n for n in sides[1] if n in sides[2] and n not in sides[0]], "kv")
            for nodes, role in zip(sides, "qkv", strict=True):
                give(nodes, role)
            give(self.nearest_ahead(out), "o")
        for sublayer in self.sublayers:
            sites, _ = self.sublayer_nodes[sublayer]
            free = [n for n in sites if self.uses[n].path not in roles]
            if sublayer.kind == "block":
                continue
            give([n for n in free if self._routes(n)], "router")
            give([n for n in free if self.uses[n].kind == "experts" or self._dispatched(n)], "expert")
            for name in sublayer.outputs:
                ends = [n for n in sites if self.uses[n].path == name and n in free]
                if not ends or roles.get(name) in ("router", "expert"):
                    continue
                if sublayer.kind == "mlp":
                    before = [m for m in self.nearest_back(self.uses[ends[0]].read) if m in free]
                    if before:
                        give(ends, "down")
                        self._gate_and_up(self.uses[ends[0]].read, before, give)
        for node, use in self.uses.items():
            if use.path in roles:
                continue
            vocabulary = use.kind == "linear" and use.shape[0] in tables
            if self._is_head(node, vocabulary):
                roles[use.path] = "lm_head" if vocabulary else "classifier"
        embeds = {canonical(v) for v in self._origins()} if self.residual is not None else set()
        for node, use in self.uses.items():
            if use.path not in roles and node.out in embeds and self.block_of(use.path) is None:
                roles[use.path] = "embed"
        for name in self._loose_parameters() if self.residual is not None else ():
            roles.setdefault(name, "position" if name in self.added else "embed")
        for path in paths:
            kind = next(use.kind for use in self.uses.values() if use.path == path)
            roles.setdefault(path, "conv" if kind == "conv" else "other")
        for norm in self.norms.values():
            roles.setdefault(norm.path, "norm")
        first = {norm.path: node.index for node, norm in reversed(self.norms.items())}
        first |= {use.path: node.index for node, use in reversed(self.uses.items())}
        self.roles = dict(sorted(roles.items(), key=lambda item: first.get(item[0], -1)))

    def _is_token_index(self, value: Value) -> bool:
        """Whether an index is an input as it was given, rather than counted from one."""
        while (node := value.producer) is not None:
            if node.op not in CASTS | RESHAPES | {"slice", "select", "expand"}:
                return False
            value = node.inputs[0]
        return value.active

    def _gate_and_up(self, read: Value, before: list[Node], give: Any) -> None:
        value, node = read, read.producer
        while node is not None and node not in self.uses:
            sources = [v for v in node.inputs if v.active and v.floating]
            if node.op == "mul" and len(sources) == 2:
                sides = [self.nearest_back(v) for v in sources]
                if sides[0] == sides[1] and len(before) == 1 and self._halved(sources):
                    give(before, "gate_up")
                    return
                if sides[0] != sides[1] and len(before) > 1:
                    bent = [self._bends(v) for v in sources]
                    if bent[0] != bent[1]:
                        give([n for n in sides[bent.index(True)]], "gate")
                        give([n for n in sides[bent.index(False)]], "up")
                        return
            if not sources:
                break
            value = sources[0]
            node = value.producer
        give(before, "up")

    def _halved(self, sources: list[Value]) -> bool:
        """Whether both factors are parts of one projection, rather than an activation spelt out."""
        for value in sources:
            while (node := value.producer) is not None and node not in self.uses:
                cuts = node.op in ("split", "slice", "split_with_sizes", "unbind", "select")
                if cuts and node.inputs[0].shape != value.shape:
                    return True
                ahead = [v for v in node.inputs if v.active and v.floating]
                if not ahead:
                    break
                value = ahead[0]
        return False

    def _bends(self, value: Value) -> bool:
        """Whether a nonlinearity lies between a value and the weights behind it."""
        queue, seen = [value], set()
        while queue:
            node = queue.pop().producer
            if node is None or node in self.uses or node in seen:
                continue
            seen.add(node)
            if node.op in GATES:
                return True
            queue += [v for v in node.inputs if v.active]
        return False

    def _routes(self, node: Node) -> bool:
        """Whether a linear's output picks the largest few."""
        queue, seen = [node.out], {node.out}
        while queue:
            for reader in self.readers_of.get(queue.pop(), []):
                if reader.op in ("topk", "argmax"):
                    return True
                if reader in self.uses or not (
                    reader.pointwise or reader.op in ("softmax", "_softmax", "_to_copy", "view")
                ):
                    continue
                fresh = [v for v in reader.outputs if v not in seen]
                seen |= set(fresh)
                queue += fresh
        return False

    def _dispatched(self, node: Node) -> bool:
        """Whether a linear sees only rows picked by an index that the data decides."""
        value = self.uses[node].read
        while (maker := value.producer) is not None and maker not in self.norms:
            if maker.op in ("index", "index_select") and any(v.active for v in maker.inputs[1:]):
                return True
            sources = [v for v in maker.inputs if v.active and v.floating]
            if not sources:
                return False
            if maker in self.uses:
                value = self.uses[maker].read
                continue
            value = sources[0]
        return False

    def _is_head(self, node: Node, capped: bool) -> bool:
        """Whether a weight's output is a model output, up to views, scaling and, if `capped`, a soft cap."""
        if self.block_of(self.uses[node].path) is not None or self.uses[node].kind == "embedding":
            return False
        queue = [node.out]
        while queue:
            value = queue.pop()
            if value in self.final:
                return True
            for reader in self.readers_of.get(value, []):
                if reader in self.uses or reader in self.norms:
                    continue
                active = [v for v in reader.inputs if v.active]
                pooled = "pool" in reader.op or reader.op == "mean"
                plain = reader.op in RESTATING | {"mul", "div", "split", "split_with_sizes"}
                if len(active) == 1 and (plain or pooled or (capped and reader.op == "tanh")):
                    queue += reader.outputs
        return False

    # ---- where the stream comes from

    def _origins(self) -> list[Value]:
        """Outputs of the weights, and the parameters, that are summed or joined into the start of the stream."""
        found: list[Value] = []
        self.added: set[str] = set()
        self.rooted = True  # nothing but weights and parameters feeds the stream
        queue = [(v, False) for v in self.origin]
        while queue:
            value, summed = queue.pop()
            node = value.producer
            if node in self.uses:
                found.append(value)
            elif value.source is not None and not value.active:
                if self.graph.is_parameter(value.source):
                    found.append(value)
                    if summed:
                        self.added.add(value.source)
            elif node is not None:
                sum_here = node.op == "add"
                inputs = node.inputs[:1] if node in self.norms else node.inputs
                for v in inputs:
                    if v.floating and (v.active or v.source is not None or v.producer is not None):
                        queue.append((v, sum_here or (summed and node.op != "cat")))
            else:
                self.rooted = False
        return found

    def _loose_parameters(self) -> list[str]:
        names = [v.source for v in self._origins() if v.producer not in self.uses]
        return [n for n in dict.fromkeys(names) if n is not None]

    def _make_residual(self) -> Residual | None:
        runs: dict[int, int] = {}
        for _, shortcut, _, _, run in self.joins:
            if shortcut is not None:
                runs[run] = runs.get(run, 0) + 1
        if not runs:
            return None
        run = max(runs, key=lambda r: runs[r])
        joins = [join for join in self.joins if join[4] == run]
        writers: list[Node] = []
        for sublayer in self.sublayers:
            sites, branch = self.sublayer_nodes[sublayer]
            if any(branch in join[2] for join in joins):
                if sublayer.kind == "block":
                    return None
                writers += [n for n in sites if self.uses[n].path in sublayer.outputs]
        stream = [value for value, r in self.stream if r == run]
        width = stream[0].shape[-1]
        if any(v.shape[-1:] != (width,) for join in joins for v in (join[0].out, *join[2])):
            return None
        known = {rows(v) for v in stream} | set(stream)
        norms = [n for n in self.norms if n.inputs[0] in known or rows(n.inputs[0]) in known]
        doors = known | {n.out for n in norms}
        readers = [
            n for n, use in self.uses.items()
            if rows(use.read) in doors and use.shape[-1] == width and use.kind != "conv"
        ]  # fmt: skip
        names = [self.uses[n].path for n in sorted(writers, key=lambda n: n.index)]
        starts: list[str] = []
        if [self.starts.get(run)] == self.origin:
            for value in self._origins():
                use = self.uses.get(value.producer) if value.producer is not None else None
                starts.append((value.source or "") if use is None else use.path)
        order = {use.path: i for i, use in enumerate(self.uses.values())}
        starts = sorted((s for s in dict.fromkeys(starts) if s), key=lambda s: order.get(s, -1))
        kinds = {self.norms[n].kind for n in norms}
        first, last = joins[-1][0].index, joins[0][0].index
        on_stream = [n for n, r in self.stream_norms if r == run and first < n.index]
        after_last = [n for n in on_stream if n.index > last and not self.block_calls]
        return Residual(
            width,
            tuple(dict.fromkeys([*starts, *names])),
            tuple(dict.fromkeys(self.uses[n].path for n in sorted(readers, key=lambda n: n.index))),
            tuple(dict.fromkeys(self.norms[n].path for n in sorted(norms, key=lambda n: n.index))),
            (next(iter(kinds)) if len(kinds) == 1 else "mixed") if kinds else None,  # type: ignore[arg-type]
            len(on_stream) == len(after_last) and not any(sublayer.post_norm for sublayer in self.sublayers),
            bool(starts)
            and self.rooted
            and not self.partial
            and self._closed(doors, set(norms), set(readers), {join[0] for join in joins}),
        )

    def _closed(self, doors: set[Value], norms: set[Node], readers: set[Node], joins: set[Node]) -> bool:
        """Whether only the listed norms, linears and residual additions read the stream and its normed copies."""
        queue, seen = list(doors), set(doors)
        while queue:
            value = queue.pop()
            if value in self.final:
                return False
            for node in self.readers_of.get(value, []):
                if node in norms or node in joins:
                    continue
                if node in self.uses:
                    if node not in readers:
                        return False
                    continue
                outer = node  # an inner sum of a join whose terms were opened
                while (
                    outer.op == "add" and outer not in joins and len(after := self.readers_of.get(outer.out, [])) == 1
                ):
                    outer = after[0]
                if outer in joins:
                    continue
                if not all(v in doors or restates(node, v) or keeps_rows(node, v) for v in node.outputs):
                    if node.op == "unsqueeze" and self._expert_door(node):
                        continue
                    return False
                queue += [v for v in node.outputs if v not in seen]
                seen |= set(node.outputs)
        return True

    # ---- pairs

    def _foldable(self) -> dict[str, tuple[str, ...]]:
        """Norms over the last dimension that only linears read, linears that read nothing else."""
        doors: dict[str, list[Node]] = {}
        barred: set[str] = set()
        for node, norm in sorted(self.norms.items(), key=lambda pair: pair[0].index):
            found = self._only_linears(node.out)
            if found is None or norm.kind not in ("rms", "layer") or (norm.weight is None and norm.bias is None):
                barred.add(norm.path)
            else:
                doors.setdefault(norm.path, []).extend(found)
        runs = Counter(use.path for use in self.uses.values())
        table = {}
        for path, nodes in doors.items():
            covered = Counter(self.uses[node].path for node in dict.fromkeys(nodes))
            unseen = self.partial and any(self._dispatched(node) for node in nodes)
            if path not in barred and covered and not unseen and all(runs[name] == n for name, n in covered.items()):
                table[path] = tuple(covered)
        return table

    def _only_linears(self, value: Value) -> list[Node] | None:
        """The linears that read a value or rows of it; None if anything else does."""
        if value in self.final:
            return None
        found: list[Node] = []
        for reader in self.readers_of.get(value, []):
            use = self.uses.get(reader)
            if use is not None:
                more = [reader] if use.kind in ("linear", "experts") and self._reads(reader, value, use) else None
            elif reader.op == "unsqueeze" and self._expert_door(reader):
                more = [self.readers_of[reader.out][0]]
            elif reader.inputs[0] is value and (restates(reader, reader.out) or keeps_rows(reader, reader.out)):
                further = [self._only_linears(out) for out in reader.outputs]
                more = None if None in further else [node for nodes in further for node in nodes or []]
            else:
                more = None
            if more is None:
                return None
            found += more
        return found

    def _expert_door(self, node: Node) -> bool:
        after = self.readers_of.get(node.out, [])
        return len(after) == 1 and after[0] in self.uses and self.uses[after[0]].read is node.inputs[0]

    @staticmethod
    def _reads(node: Node, value: Value, use: Use) -> bool:
        return use.read is value and sum(v is value for v in node.inputs) == 1

    def _siblings(self) -> tuple[tuple[str, ...], ...]:
        table: dict[Value, list[str]] = {}
        for use in self.uses.values():
            if use.kind in ("linear", "experts"):
                table.setdefault(canonical(use.read), []).append(use.path)
        groups = [tuple(dict.fromkeys(paths)) for paths in table.values()]
        return tuple(dict.fromkeys(group for group in groups if len(group) > 1))

    def _batch_norms(self) -> dict[str, str]:
        pairs = {}
        for node, norm in self.norms.items():
            maker = node.inputs[0].producer
            if norm.kind == "batch" and maker in self.uses and self.readers_of[maker.out] == [node]:
                pairs[self.uses[maker].path] = norm.path
        return pairs

    # ---- heads

    def _attentions(self) -> tuple[tuple[Attention, ...], tuple[Coupled, ...]]:
        found, groups = [], []
        for q, k, v, out, index in self.cores:
            sides = [self.nearest_back(operand) for operand in (q, k, v)]
            ahead = self.nearest_ahead(out)
            single = [side[0] if len(side) == 1 else None for side in (*sides, ahead)]
            names = [self.uses[node].path if node is not None else None for node in single]
            spans = [self._head_spans(node, operand) for node, operand in zip(single, (q, k, v), strict=False)]
            heads = len(spans[0]) if spans[0] else (q.shape[1] if len(q.shape) == 4 else 1)
            kv_heads = len(spans[1]) if spans[1] else (k.shape[1] if len(k.shape) == 4 else heads)
            block = next((i for i, call in enumerate(self.block_calls) if call.start <= index < call.end), None)
            found.append(Attention(block, names[0], names[1], names[2], names[3], heads, kv_heads, q.shape[-1]))
            outs = self._output_spans(out, single[3], heads)
            if not all(spans) or outs is None or heads % kv_heads or len(spans[2] or ()) != kv_heads:
                continue
            share = heads // kv_heads
            members = [
                self._member(names[0], "out", spans[0] or [], share),
                self._member(names[1], "out", spans[1] or [], 1),
                self._member(names[2], "out", spans[2] or [], 1),
                self._member(names[3], "in", outs, share),
            ]
            for side, node, operand, part in zip(spans, single, (q, k, v), (share, 1, 1), strict=False):
                for norm in self._norms_between(node, operand):  # over all heads at once: its scale is cut with them
                    members.append(self._member(norm, "norm", side or [], part))
            if all(isinstance(m, Member) for m in members):
                groups.append(Coupled(kv_heads, tuple(members), "heads"))
        return tuple(found), tuple(dict.fromkeys(groups))

    def _norms_between(self, node: Node | None, operand: Value) -> list[str]:
        assert node is not None
        inner = operand.ancestors & ~node.out.ancestors
        return [
            norm.path for at, norm in self.norms.items()
            if inner >> at.out.number & 1 and norm.width == node.out.shape[-1] and norm.weight is not None
        ]  # fmt: skip

    @staticmethod
    def _member(path: str | None, side: Any, spans: list[tuple[int, int]], share: int) -> Any:
        """One `Member` for evenly spaced spans, `share` of them to a unit; None where they are uneven."""
        units = [spans[i : i + share] for i in range(0, len(spans), share)]
        for unit in units:
            if any(a[0] + a[1] != b[0] for a, b in pairwise(unit)):
                return None
        starts, repeat = [unit[0][0] for unit in units], share * spans[0][1]
        gaps = {b - a for a, b in pairwise(starts)} or {repeat}
        if len(gaps) != 1 or path is None or len({length for _, length in spans}) != 1:
            return None
        return Member(path, side, starts[0], repeat, gaps.pop())

    def _head_spans(self, node: Node | None, operand: Value) -> list[tuple[int, int]] | None:
        """(first channel, length) of each head of an attention operand, as channels of its linear."""
        if node is None or node.out.shape[-1] != self.uses[node].shape[-2 if self.uses[node].kind == "experts" else 0]:
            return None
        labels = torch.arange(node.out.shape[-1]).expand(node.out.shape).clone()
        carried = self._carry(node.out, labels, operand)
        return None if carried is None else _spans(carried)

    def _output_spans(self, out: Value, node: Node | None, heads: int) -> list[tuple[int, int]] | None:
        """(first channel, length) of each head at the input of the linear that reads the attention's output."""
        if node is None:
            return None
        size = out.shape[-1]
        if len(out.shape) == 4 and out.shape[1] == heads:
            head = torch.arange(heads).view(1, heads, 1, 1).expand(out.shape)
        elif len(out.shape) == 3 and out.shape[0] % heads == 0:
            head = (torch.arange(out.shape[0]) % heads).view(-1, 1, 1).expand(out.shape)
        else:
            return None
        carried = self._carry(out, head.clone(), self.uses[node].read)
        if carried is None or carried.shape[-1] != heads * size:
            return None
        line = carried.reshape(-1, carried.shape[-1])[0].tolist()
        starts = [line.index(h) if h in line else -1 for h in range(heads)]
        if any(s < 0 or line[s : s + size] != [h] * size for h, s in enumerate(starts)):
            return None
        return [(s, size) for s in starts]

    def _carry(self, start: Value, labels: Tensor, end: Value) -> Tensor | None:
        """Follow labels through the views between two values by replaying them."""
        held: dict[int, Tensor] = {start.number: labels}
        queue, path, seen = [end], [], set()
        while queue:  # the nodes between
            node = queue.pop().producer
            if node is None or node in seen or node is start.producer:
                continue
            seen.add(node)
            path.append(node)
            queue += [v for v in node.inputs if v.ancestors >> start.number & 1]
        for node in sorted(path, key=lambda n: n.index):
            known = [held[v.number] for v in node.inputs if v.number in held]
            if not known:
                continue
            if node.op in RESHAPES:
                results = [known[0].reshape(node.out.shape)]
            elif node.op in VIEWS - CASTS:

                def fill(item: Any) -> Any:
                    if isinstance(item, Ref):
                        shape = self.graph.values[item.number].shape
                        return held.get(item.number, torch.full(shape, -1))
                    return [fill(i) for i in item] if isinstance(item, (list, tuple)) else item

                try:
                    result = node.call(*fill(node.args), **{key: fill(item) for key, item in node.kwargs.items()})
                except RuntimeError:
                    return None
                results = [result] if isinstance(result, torch.Tensor) else list(result)
            elif node.outputs and known[0].shape == node.out.shape:
                results = [known[0]]
            else:
                return None
            for value, tensor in zip(node.outputs, results, strict=False):
                held[value.number] = tensor
        return held.get(end.number)

    # ---- all together

    def map(self) -> ModelMap:
        self.blocks = tuple(dict.fromkeys(call.path for call in self.block_calls))
        self._walk()
        self.sublayers = self._make_sublayers()
        self.residual = self._make_residual()
        self._assign_roles()
        attentions, heads = self._attentions()
        uses = {n: (u.path, u.read, u.shape, u.groups) for n, u in self.uses.items()}
        norms = {
            n: (norm.path, 1 if norm.kind in ("batch", "group") else -1, norm.kind != "group")
            for n, norm in self.norms.items()
        }
        channels = Coupler(self.graph, uses, norms).groups()
        sites: dict[str, Site] = {}
        for node, use in self.uses.items():
            role = self.roles[use.path]
            kind: Kind = "head" if role in ("lm_head", "classifier") and use.kind == "linear" else use.kind
            reuse = 1
            for size in node.out.shape[2:] if use.kind == "conv" else ():
                reuse *= size
            sites.setdefault(
                use.path,
                Site(use.path, kind, use.shape, self.block_of(use.path), role, use.transposed, use.groups, reuse),
            )
        found = {norm.path: norm for _, norm in sorted(self.norms.items(), key=lambda pair: pair[0].index)}
        parameters = dict(self.model.named_parameters())
        tied = [tuple(names) for names in self.graph.aliases.values() if len(names) > 1]
        return ModelMap(
            self.blocks,
            tuple(sites.values()),
            self.roles,
            self._foldable(),
            self._siblings(),
            self.sublayers,
            self.residual,
            (*heads, *channels),
            tuple(tied),
            sum(p.numel() for p in parameters.values()),
            tuple(found.values()),
            attentions,
            self._batch_norms(),
            self.idle,
        )


def _spans(labels: Tensor) -> list[tuple[int, int]] | None:
    """The distinct runs of channels along the last dimension, in order; None where one is broken or unlabelled."""
    flat, size = labels.reshape(-1, labels.shape[-1]), labels.shape[-1]
    first = {label: row for row, label in enumerate(flat[:, 0].tolist())}  # rows of one head begin with one label
    ordered = flat[list(first.values())].sort(dim=1).values
    low = ordered[:, 0]
    if (low < 0).any() or not torch.equal(ordered, low[:, None] + torch.arange(size)):
        return None
    spans = [(start, size) for start in sorted(low.tolist())]
    broken = any(a + n > b for (a, n), (b, _) in pairwise(spans))
    return None if broken else spans
