"""Networks stitched of trained ones: blocks of one, a linear map, blocks of another; which, is chosen when it runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Leg(NamedTuple):
    """Blocks `start` to `stop` (behind the last) of one of the anchors; to the end, its head too."""

    anchor: int
    start: int
    stop: int


Route = tuple[Leg, ...]


def seam(first: Leg, second: Leg) -> str:
    """Name of the stitch between two legs.

    >>> seam(Leg(0, 0, 2), Leg(1, 4, 6))
    '0_2__1_4'
    """
    return f"{first.anchor}_{first.stop}__{second.anchor}_{second.start}"


def least_squares(joint: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """W `[out, in]` and b `[out]` of least E |W x + b - y|^2, from E[u u^T], u = [x, y, 1].

    Args:
        joint: the second moments, double.
        width: size of x.

    >>> x, one = torch.randn(50, 2).double(), torch.ones(50, 1).double()
    >>> u = torch.cat([x, 3 * x[:, :1] + 1, one], 1)
    >>> weight, bias = least_squares(u.T @ u / 50, 2)
    >>> torch.cat([weight, bias[:, None]], 1).round().long()
    tensor([[3, 0, 1]])
    """
    ones = len(joint) - 1
    read = torch.tensor([*range(width), ones])
    made = torch.arange(width, ones)
    solved = torch.linalg.pinv(joint[read][:, read], hermitian=True) @ joint[read][:, made]
    return solved[:-1].T.float(), solved[-1].float()


class Stitch(nn.Module):
    """A linear map from the states of one anchor to those of another; with a rank, W + B A with W frozen.

    Args:
        weight, bias: W `[out, in]` and b `[out]`.
        rank: of the trained change B A, which begins at zero; 0: W itself is trained.
    """

    def __init__(self, weight: Tensor, bias: Tensor, rank: int = 0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=not rank), nn.Parameter(bias)
        if rank:
            self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
            self.up = nn.Parameter(torch.zeros(len(weight), rank))
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        return y + nn.functional.linear(nn.functional.linear(x, self.down), self.up) if self.rank else y


class _Left(Exception):
    """An anchor has come to the block that another takes over from."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state


class _Pass(nn.Module):
    """In place of a block that another anchor has stood in for."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


class Stitched(nn.Module):
    """Anchors and stitches; `place` says which route the next forward takes.

    A route of one leg is that anchor as it is. The anchors share no weights, and all weights stay in memory, so
    changing the route costs nothing. Blocks must take and return one tensor of states.

    Args:
        anchors: whole models that take the same inputs.
        blocks: paths of each anchor's blocks.
        routes: the routes, of which `place` chooses.
        stitches: by `seam`.
    """

    def __init__(
        self,
        anchors: Sequence[nn.Module],
        blocks: Sequence[Sequence[str]],
        routes: Sequence[Route],
        stitches: dict[str, Stitch],
    ) -> None:
        super().__init__()
        self.anchors, self.stitches = nn.ModuleList(anchors), nn.ModuleDict(stitches)
        self.blocks, self.routes = tuple(map(tuple, blocks)), tuple(routes)
        self.place = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route, state = self.routes[self.place], None
        for leg, after in zip(route, (*route[1:], None), strict=True):
            with self._prepared(leg, state, after is not None) as anchor:
                try:
                    output = anchor(*args, **kwargs)
                except _Left as left:
                    output = left.state
            if after is None:
                return output
            state = self.stitches[seam(leg, after)](output)
        raise AssertionError("a route has at least one leg")

    def cost(self, place: int) -> int:
        """Weights that a route multiplies each state with: those of its blocks and stitches."""
        route = self.routes[place]
        paths = [(leg.anchor, self.blocks[leg.anchor][i]) for leg in route for i in range(leg.start, leg.stop)]
        parts = [self.anchors[a].get_submodule(path) for a, path in paths]  # type: ignore[union-attr]
        parts += [self.stitches[seam(a, b)] for a, b in itertools.pairwise(route)]
        return sum(p.numel() for part in parts for p in part.parameters() if p.dim() > 1)

    @contextmanager
    def _prepared(self, leg: Leg, state: Tensor | None, leaves: bool) -> Iterator[nn.Module]:
        anchor, paths = self.anchors[leg.anchor], self.blocks[leg.anchor]
        with ExitStack() as stack:
            if state is not None:
                for path in paths[: leg.start]:
                    stack.callback(anchor.set_submodule, path, anchor.get_submodule(path))  # type: ignore[union-attr]
                    anchor.set_submodule(path, _Pass())  # type: ignore[operator, union-attr]
                entry = anchor.get_submodule(paths[leg.start])  # type: ignore[union-attr]
                hook = entry.register_forward_pre_hook(lambda _, args: (state, *args[1:]))
                stack.callback(hook.remove)
            if leaves:

                def leave(module: nn.Module, args: tuple[Any, ...]) -> None:
                    raise _Left(args[0])

                exit_ = anchor.get_submodule(paths[leg.stop])  # type: ignore[union-attr]
                stack.callback(exit_.register_forward_pre_hook(leave).remove)
            yield anchor
