"""Which dimensions of which weights must be cut together.

Every output dimension of a weight is a variable of so many channels. Following the recorded forward, each dimension of
each activation is a row of segments of such variables; an addition equates segments, a weight that reads one joins its
input dimension to it, and whatever cannot follow a cut (a softmax, a model output, an unequal reshape) locks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

from .trace import CASTS, Graph, Node, Ref, Value

UNTAGGED = ("copy", "masked_fill", "where", "hardswish")  # pointwise, and torch does not say so
ZERO, OPAQUE = -1, -2  # segments that belong to no weight: zero padding, and channels from elsewhere


@dataclass(frozen=True)
class Member:
    """One dimension in a `Coupled` group: unit i is its indices `offset + i * stride + [0, repeat)`.

    Fields:
        path: the site or norm, or the parameter's name where side is `param`.
        side: `out`, `in`, `norm` (scale, shift and running statistics), `depthwise` (out, and the groups fall with it),
            or `param`.
        dim: the parameter's dimension, where side is `param`.
    """

    path: str
    side: Literal["out", "in", "norm", "depthwise", "param"]
    offset: int = 0
    repeat: int = 1
    stride: int = 1
    dim: int = 0


@dataclass(frozen=True)
class Coupled:
    """Dimensions that must be cut together.

    Fields:
        width: how many units there are.
        members: where each unit lives.
        kind: `channels`, or `heads` (a unit is one key-value head with the query heads that share it).
        padded: some member meets zero padding of its channel dimension, whose amount must follow the cut.
    """

    width: int
    members: tuple[Member, ...]
    kind: Literal["channels", "heads"] = "channels"
    padded: bool = False

    def indices(self, member: Member, units: tuple[int, ...] | list[int]) -> list[int]:
        """The indices of `member`'s dimension that the given units occupy."""
        return [member.offset + unit * member.stride + k for unit in units for k in range(member.repeat)]


class Segment(NamedTuple):
    var: int
    start: int
    length: int
    repeat: int = 1

    @property
    def size(self) -> int:
        return self.length * self.repeat


Axis = tuple[Segment, ...]
Axes = tuple[Axis | None, ...]


def _take(axis: Axis, start: int, length: int) -> Axis | None:
    """Positions `start` to `start + length` of an axis, or None where that would split a repeated channel."""
    taken, position = [], 0
    for segment in axis:
        low, high = max(start, position), min(start + length, position + segment.size)
        if low < high:
            if (low - position) % segment.repeat or (high - low) % segment.repeat:
                return None
            taken.append(
                Segment(
                    segment.var,
                    segment.start + (low - position) // segment.repeat,
                    (high - low) // segment.repeat,
                    segment.repeat,
                )
            )
        position += segment.size
    return tuple(taken)


def _size(axis: Axis) -> int:
    return sum(segment.size for segment in axis)


class Coupler:
    """Walks a graph once, in order, and collects equalities, members and locks."""

    def __init__(self, graph: Graph, uses: dict[Node, tuple], norms: dict[Node, tuple]) -> None:
        """
        Args:
            uses: node of a weight -> (path, value read, shape of the weight (out, in, ...), groups).
            norms: node of a norm -> (path, dimension that it scales counted from the end, whether a cut can follow).
        """
        self.graph, self.uses, self.norms = graph, uses, norms
        self.axes: dict[Value, Axes] = {}
        self.widths: list[int] = []
        self.vars: dict[tuple[str, str, int], int] = {}
        self.read: dict[tuple[str, str], Axis] = {}
        self.members: list[tuple[int, int, int, Member]] = []  # variable, start, length, member of its first channel
        self.equal: list[tuple[int, int, int, int, int]] = []
        self.locked: list[tuple[int, int, int]] = []
        self.padded: list[tuple[int, int, int]] = []

    def groups(self) -> tuple[Coupled, ...]:
        for node in self.graph.live():
            self._visit(node)
        for value in self.graph.outputs:
            self._lock_all(value)
        return self._solve()

    def _variable(self, path: str, side: str, width: int, dim: int = 0) -> Axis:
        key = (path, side, dim)
        if key not in self.vars:
            self.vars[key] = len(self.widths)
            self.widths.append(width)
            self.members.append((self.vars[key], 0, width, Member(path, side, 0, 1, 1, dim)))  # type: ignore[arg-type]
        return (Segment(self.vars[key], 0, width),)

    def _axes(self, value: Value) -> Axes:
        if value not in self.axes:
            axes: Axes = (None,) * len(value.shape)
            if value.parameter and value.name:
                axes = tuple(
                    self._variable(value.name, "param", size, dim) if size > 1 else None
                    for dim, size in enumerate(value.shape)
                )
            self.axes[value] = axes
        return self.axes[value]

    def _lock(self, axis: Axis | None) -> None:
        self.locked += [segment[:3] for segment in axis or () if segment.var >= 0]

    def _lock_all(self, value: Value) -> None:
        for axis in self._axes(value):
            self._lock(axis)

    def _join(self, path: str, side: str, axis: Axis | None) -> None:
        """A weight's dimension reads this axis."""
        if axis is None:
            return
        if (path, side) in self.read:
            self._unify(self.read[path, side], axis)
            return
        self.read[path, side] = axis
        position = 0
        for var, start, length, repeat in axis:
            if var >= 0:
                member = Member(path, side, position, repeat, repeat)  # type: ignore[arg-type]
                self.members.append((var, start, length, member))
            position += length * repeat

    def _unify(self, a: Axis | None, b: Axis | None) -> Axis | None:
        if a is None or b is None or _size(a) != _size(b):
            self._lock(a)
            self._lock(b)
            return None
        if a == b:
            return a
        joined: list[Segment] = []
        position = 0
        cuts = {0}
        for axis in (a, b):
            end = 0
            for segment in axis:
                end += segment.size
                cuts.add(end)
        for low, high in pairwise(sorted(cuts)):
            position = high - low
            left, right = _take(a, low, position), _take(b, low, position)
            if not left or not right or (left[0].repeat != right[0].repeat and min(left[0].var, right[0].var) >= 0):
                self._lock(a)
                self._lock(b)
                return None
            one, other = left[0], right[0]
            if one.var < 0:
                one, other = other, one
            if one.var >= 0:
                if other.var >= 0:
                    self.equal.append((one.var, one.start, other.var, other.start, one.length))
                elif other.var == OPAQUE:
                    self._lock((one,))
                else:
                    self.padded.append(one[:3])
            joined.append(one)
        return tuple(joined)

    def _visit(self, node: Node) -> None:
        if node in self.uses:
            return self._weight(node)
        if node in self.norms:
            path, dim, cuttable = self.norms[node]
            axes = self._axes(node.inputs[0])
            if cuttable:
                self._join(path, "norm", axes[dim])
            else:
                self._lock(axes[dim])
            self.axes[node.out] = tuple(a if cuttable or i != dim % len(axes) else None for i, a in enumerate(axes))
            return
        if not any(value.active or value.parameter or value.source for value in node.inputs):
            return
        handler = getattr(self, f"_on_{node.op}", None)
        if handler is None and (node.pointwise or node.op in UNTAGGED):
            handler = self._pointwise
        if handler is None and node.op in CASTS:
            handler = self._same
        if handler is None and ("pool" in node.op or node.op.startswith("upsample")):
            handler = self._pool
        result = handler(node) if handler else None
        if result is None:
            for value in node.inputs:
                self._lock_all(value)
        else:
            for value, axes in zip(node.outputs, result, strict=False):
                self.axes[value] = axes

    def _weight(self, node: Node) -> None:
        path, read, shape, groups = self.uses[node]
        out, axes = node.out, self._axes(read)
        result: list[Axis | None] = [None] * len(out.shape)
        image = node.op.startswith("conv")
        channel = 1 if image else -1
        width = out.shape[channel]
        stacked = len(shape) == 3 and not image  # experts: (experts, out, in)
        whole = width == (shape[-2] if stacked else shape[1] if node.op == "embedding" else shape[0])
        if node.op != "embedding":
            inner = axes[channel]
            if image:
                result[0] = axes[0]
            elif len(axes) == len(out.shape):
                result[:-1] = axes[:-1]
            if groups == read.shape[channel] == width and groups > 1 and inner is not None:
                self._join(path, "depthwise", inner)
                result[channel] = inner
                self.axes[out] = tuple(result)
                return
            if groups > 1 or not whole:
                self._lock(inner)
            else:
                self._join(path, "in", inner)
        if whole and groups == 1:
            result[channel] = self._variable(path, "out", width)
        self.axes[out] = tuple(result)

    def _same(self, node: Node) -> list[Axes]:
        return [self._axes(node.inputs[0])]

    def _pointwise(self, node: Node) -> list[Axes]:
        shape = node.out.shape
        result: list[Axis | None] = []
        inputs = [v for v in node.inputs if v.shape]
        for back in range(len(shape), 0, -1):
            facing = [self._axes(v)[-back] for v in inputs if len(v.shape) >= back and v.shape[-back] > 1]
            joined = facing[0] if facing else None
            for axis in facing[1:]:
                joined = self._unify(joined, axis)
            result.append(joined if shape[-back] > 1 else None)
        return [tuple(result)] * len(node.outputs)

    def _pool(self, node: Node) -> list[Axes]:
        axes = self._axes(node.inputs[0])
        spatial = next((n for n in (1, 2, 3) if f"{n}d" in node.op), len(axes) - 2)
        return [axes[: len(axes) - spatial] + (None,) * spatial] * len(node.outputs)

    def _reduce(self, node: Node) -> list[Axes] | None:
        value = node.inputs[0]
        axes, rank = self._axes(value), len(value.shape)
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if dims is None:
            return None
        gone = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])} or set(range(rank))
        for dim in gone:
            self._lock(axes[dim])
        kept = len(node.out.shape) == rank
        return [tuple(None if d in gone else a for d, a in enumerate(axes) if kept or d not in gone)] * len(
            node.outputs
        )

    _on_mean = _on_sum = _on_amax = _on_amin = _on_var = _on_max = _on_min = _on_std = _reduce

    def _on_softmax(self, node: Node) -> list[Axes]:
        axes = list(self._axes(node.inputs[0]))
        self._lock(axes[node.args[1]])
        axes[node.args[1]] = None
        return [tuple(axes)]

    _on__softmax = _on__log_softmax = _on_softmax

    def _on_transpose(self, node: Node) -> list[Axes]:
        axes = list(self._axes(node.inputs[0]))
        a, b = node.args[1:3]
        axes[a], axes[b] = axes[b], axes[a]
        return [tuple(axes)]

    def _on_t(self, node: Node) -> list[Axes]:
        return [self._axes(node.inputs[0])[::-1]]

    def _on_permute(self, node: Node) -> list[Axes]:
        axes = self._axes(node.inputs[0])
        return [tuple(axes[d] for d in node.args[1])]

    def _on_expand(self, node: Node) -> list[Axes]:
        value, shape = node.inputs[0], node.out.shape
        axes = (None,) * (len(shape) - len(value.shape)) + self._axes(value)
        return [axes]

    def _on_slice(self, node: Node) -> list[Axes] | None:
        value = node.inputs[0]
        axes = list(self._axes(value))
        given = [*node.args[1:], *[0, None, None, 1][len(node.args) - 1 :]]
        dim, start, step = given[0], given[1], given[3]
        axis, size = axes[dim], value.shape[dim]
        if axis is not None and node.out.shape[dim] != size:
            first = (start or 0) + (size if (start or 0) < 0 else 0)
            piece = _take(axis, first, node.out.shape[dim]) if step == 1 else None
            if piece is None:
                self._lock(axis)
            axes[dim] = piece
        return [tuple(axes)]

    def _on_select(self, node: Node) -> list[Axes]:
        axes = list(self._axes(node.inputs[0]))
        self._lock(axes.pop(node.args[1] % len(axes)))
        return [tuple(axes)]

    def _on_split(self, node: Node) -> list[Axes]:
        value = node.inputs[0]
        axes = self._axes(value)
        dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(axes)
        pieces, position = [], 0
        for out in node.outputs:
            axis = axes[dim]
            piece = None if axis is None else _take(axis, position, out.shape[dim])
            if axis is not None and piece is None:
                self._lock(axis)
            pieces.append((*axes[:dim], piece, *axes[dim + 1 :]))
            position += out.shape[dim]
        return pieces

    _on_split_with_sizes = _on_chunk = _on_split

    def _on_cat(self, node: Node) -> list[Axes] | None:
        inputs = [v for v in node.inputs if v.shape != (0,)]
        dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(node.out.shape)
        result: list[Axis | None] = []
        for d in range(len(node.out.shape)):
            axes = [self._axes(v)[d] for v in inputs]
            if d != dim:
                joined = axes[0]
                for axis in axes[1:]:
                    joined = self._unify(joined, axis) if node.out.shape[d] > 1 else None
                result.append(joined)
            elif all(axis is None for axis in axes):
                result.append(None)
            else:
                pieces = [
                    axis if axis is not None else (Segment(OPAQUE, 0, v.shape[d]),)
                    for axis, v in zip(axes, inputs, strict=True)
                ]
                result.append(tuple(segment for piece in pieces for segment in piece))
        return [tuple(result)]

    def _on_constant_pad_nd(self, node: Node) -> list[Axes] | None:
        axes = list(self._axes(node.inputs[0]))
        pads = node.args[1]
        for pair in range(len(pads) // 2):
            low, high, dim = pads[2 * pair], pads[2 * pair + 1], len(axes) - 1 - pair
            axis = axes[dim]
            if axis is None or (low, high) == (0, 0):
                continue
            if low < 0 or high < 0:
                return None
            zero = ((Segment(ZERO, 0, low),) if low else (), (Segment(ZERO, 0, high),) if high else ())
            axes[dim] = zero[0] + axis + zero[1]
        return [tuple(axes)]

    def _on_index(self, node: Node) -> list[Axes] | None:
        value, places = node.inputs[0], node.args[1]
        axes = self._axes(value)
        picked = [i for i, place in enumerate(places) if place is not None]
        if picked != list(range(len(picked))) or not picked:
            return None
        for dim in picked:
            self._lock(axes[dim])
        rest = axes[len(picked) :]
        return [(None,) * (len(node.out.shape) - len(rest)) + rest]

    def _on_index_select(self, node: Node) -> list[Axes]:
        axes = list(self._axes(node.inputs[0]))
        self._lock(axes[node.args[1]])
        axes[node.args[1]] = None
        return [tuple(axes)]

    def _on_repeat_interleave(self, node: Node) -> list[Axes] | None:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        if dim is None or not isinstance(node.args[0], Ref):
            return None
        axes = list(self._axes(node.inputs[0]))
        self._lock(axes[dim])
        axes[dim] = None
        return [tuple(axes)]

    def _on_view(self, node: Node) -> list[Axes]:
        value, shape = node.inputs[0], node.out.shape
        axes = self._axes(value)
        result: list[Axis | None] = [None] * len(shape)
        for before, after in _chunks(value.shape, shape):
            tracked = [d for d in before if axes[d] is not None]
            if not tracked:
                continue
            solid = [d for d in before if value.shape[d] > 1]
            wide = [d for d in after if shape[d] > 1]
            d = tracked[0]
            axis = axes[d]
            assert axis is not None
            if len(tracked) == 1 and solid == [d] and len(wide) == 1:
                result[wide[0]] = axis
            elif len(tracked) == 1 and solid[:1] == [d] and len(wide) == 1:
                inner = prod(value.shape[s] for s in solid[1:])
                result[wide[0]] = tuple(s._replace(repeat=s.repeat * inner) for s in axis)
            elif len(tracked) == 1 and solid == [d] and wide:
                inner = prod(shape[s] for s in wide[1:])
                if all(s.repeat % inner == 0 for s in axis):
                    result[wide[0]] = tuple(s._replace(repeat=s.repeat // inner) for s in axis)
                else:
                    self._lock(axis)
            elif len(tracked) == 1 and not wide:
                self._lock(axis)
            else:
                for t in tracked:
                    self._lock(axes[t])
        return [tuple(result)]

    _on__unsafe_view = _on_reshape = _on__reshape_alias = _on_unsqueeze = _on_squeeze = _on_view

    def _solve(self) -> tuple[Coupled, ...]:
        cuts: list[set[int]] = [{0, width} for width in self.widths]
        for var, start, length in [m[:3] for m in self.members] + self.locked + self.padded:
            cuts[var] |= {start, start + length}
        for a, i, b, j, n in self.equal:
            cuts[a] |= {i, i + n}
            cuts[b] |= {j, j + n}
        changed = True
        while changed:  # a boundary in one variable is a boundary in every variable equated with it
            changed = False
            for a, i, b, j, n in self.equal:
                for source, low, target, high in ((a, i, b, j), (b, j, a, i)):
                    moved = {c - low + high for c in cuts[source] if low < c < low + n} - cuts[target]
                    cuts[target] |= moved
                    changed = changed or bool(moved)
        order = [sorted(points) for points in cuts]
        width = {(v, p): q - p for v, points in enumerate(order) for p, q in pairwise(points)}
        parent = {piece: piece for piece in width}

        def find(piece: tuple[int, int]) -> tuple[int, int]:
            while parent[piece] != piece:
                parent[piece] = parent[parent[piece]]
                piece = parent[piece]
            return piece

        def pieces(var: int, start: int, length: int) -> list[tuple[int, int]]:
            return [(var, p) for p in order[var][:-1] if start <= p < start + length]

        for a, i, b, j, n in self.equal:
            for left, right in zip(pieces(a, i, n), pieces(b, j, n), strict=True):
                parent[find(left)] = find(right)
        barred = {find(piece) for lock in self.locked for piece in pieces(*lock)}
        padded = {find(piece) for pad in self.padded for piece in pieces(*pad)}
        found: dict[tuple[int, int], list[Member]] = {}
        for var, start, length, member in self.members:
            for piece in pieces(var, start, length):
                root = find(piece)
                if root not in barred:
                    offset = member.offset + (piece[1] - start) * member.stride
                    place = Member(member.path, member.side, offset, member.repeat, member.stride, member.dim)
                    if place not in found.setdefault(root, []):
                        found[root].append(place)
        groups = []
        for root, members in found.items():
            sides = {member.side for member in members}
            if "out" in sides and sides & {"in", "norm", "depthwise"}:
                groups.append(Coupled(width[root], tuple(members), padded=root in padded))
        return tuple(groups)


def _chunks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Split two shapes of one tensor into the smallest runs of dimensions with equal products."""
    if prod(before) == 0:
        return [([*range(len(before))], [*range(len(after))])]
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        left, right, a, b = [], [], 1, 1
        if i < len(before):
            left, a, i = [i], before[i], i + 1
        if j < len(after):
            right, b, j = [j], after[j], j + 1
        while a != b:
            if a < b and i < len(before):
                left, a, i = [*left, i], a * before[i], i + 1
            elif j < len(after):
                right, b, j = [*right, j], b * after[j], j + 1
            else:
                left, a, i = [*left, i], a * before[i], i + 1
        runs.append((left, right))
    return runs
