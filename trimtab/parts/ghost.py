"""Norms of every example's gradient, without any of these gradients: from what a module reads and what comes back.

The gradient of a linear of one example is G^T X, with X `[tokens, in]` and G `[tokens, out]`; its squared length is
sum over pairs of tokens of (x_t . x_s)(g_t . g_s). An embedding's is the same with [same token] in place of x_t . x_s.
A matrix that both use adds twice the product of the two. What is no matrix is small, and worked out example by example.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import UserError


def linear_square(x: Tensor, g: Tensor) -> Tensor:
    """Squared lengths of G^T X for each example, from `x [items, tokens, in]` and `g [items, tokens, out]`: by pairs of
    tokens, or by the gradients one after the other where these are smaller.

    >>> x, g = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    >>> linear_square(x, g)
    tensor([180., 180.])
    """
    if x.shape[1] ** 2 <= x.shape[2] * g.shape[2]:
        x, g = x.double(), g.double()  # pairs cancel
        return (torch.bmm(x, x.mT) * torch.bmm(g, g.mT)).sum((1, 2)).float()
    return torch.stack([(g[i].T @ x[i]).square().sum() for i in range(len(x))])


def lookup_square(tokens: Tensor, g: Tensor) -> Tensor:
    """The same for an embedding, from `tokens [items, tokens]` and `g [items, tokens, width]`."""
    same, g = tokens[:, :, None] == tokens[:, None, :], g.double()
    return (torch.bmm(g, g.mT) * same).sum((1, 2)).float()


def crossed(tokens: Tensor, g: Tensor, x: Tensor, back: Tensor) -> Tensor:
    """Inner products of both gradients of one matrix `[tokens, width]`, which an embedding reads (`tokens`, `g`) and a
    linear too (`x [items, tokens, width]`, `back [items, tokens, vocabulary]`).
    """
    picked = torch.gather(back, 2, tokens[:, None, :].expand(-1, back.shape[1], -1))  # [items, s, t]: back[s, token_t]
    return (torch.bmm(x, g.mT) * picked).sum((1, 2))


class Ghosts:
    """Squared norms of examples' gradients, gathered while a backward pass goes by."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.squares = torch.zeros(0)
        self.names = {id(p): n for n, p in model.named_parameters()}
        weights = [id(p) for m in model.modules() for _, p in _own(m)]
        self._common = {key for key in weights if weights.count(key) > 1}
        self._read: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: set[str] = set()
        self._waiting: set[str] = set()
        self._over = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one forward pass, and the backward passes of what it gives."""
        self.squares, self._read, self._over = torch.zeros(0), {}, False
        self._seen, self._waiting = set(), set()
        owners = [(n, m) for n, m in self.model.named_modules() if any(True for _ in _own(m))]
        handles = [m.register_forward_hook(self._hook(n)) for n, m in owners]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if path in self._seen:
                raise UserError(f"{path} is used twice in one pass; ghost norms are of modules that are used once")
            self._seen.add(path)
            self._waiting.add(path)
            x = args[0].detach()
            out.register_hook(lambda g: self._add(path, module, x, g.detach()))

        return hook

    def norms(self) -> Tensor:
        """The norms `[items]`, once a backward pass is over; later ones add nothing.

        Raises:
            UserError: a module's output took no part in it.
        """
        self._over = True
        if self._waiting:
            raise UserError(f"no gradient came back to {min(self._waiting)}, and its share of the norms is not known")
        return self.squares.clamp_min(1e-24).sqrt()

    def _add(self, path: str, module: nn.Module, x: Tensor, g: Tensor) -> None:
        if self._over:
            return
        self._waiting.discard(path)
        if len(self.squares) == 0:
            self.squares = torch.zeros(len(g))
        if len(x) != len(g) or len(g) != len(self.squares):
            raise UserError(f"{path} reads {tuple(x.shape)} for {len(self.squares)} examples, and mixes them")
        own = dict(_own(module))
        found = torch.zeros(len(g))
        if isinstance(module, nn.Linear) or hasattr(module, "nf"):
            x, g = (t.reshape(len(t), -1, t.shape[-1]).float() for t in (x, g))
            if "weight" in own:
                found += linear_square(x, g) + self._shared(own["weight"], x, g, False)
            if "bias" in own:
                found += g.sum(1).square().sum(1)
        elif isinstance(module, nn.Embedding):
            x, g = x.reshape(len(x), -1), g.reshape(len(g), -1, g.shape[-1]).float()
            found += lookup_square(x, g) + self._shared(own["weight"], x, g, True)
        else:
            found += _by_example(module, own, x, g)
        self.squares += found

    def _shared(self, weight: nn.Parameter, x: Tensor, g: Tensor, lookup: bool) -> Tensor:
        """Twice the product with what another module did with the same matrix; later than it, for backward is."""
        if id(weight) not in self._common:
            return torch.zeros(len(g))
        before = self._read.get(id(weight))
        self._read[id(weight)] = (x, g)
        if before is None:
            return torch.zeros(len(g))
        if not lookup:
            raise UserError(
                f"{self.names[id(weight)]} is used by two linears; ghost norms know an embedding and a head"
            )
        return 2 * crossed(x, g, *before)


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in module.named_parameters(recurse=False) if p.requires_grad)


def _by_example(module: nn.Module, own: dict[str, nn.Parameter], x: Tensor, g: Tensor) -> Tensor:
    """Squared lengths of the gradients of a module's parameters, one example at a time."""
    found = torch.zeros(len(x))
    with torch.enable_grad():
        for i in range(len(x)):
            grads = torch.autograd.grad(module.forward(x[i : i + 1]), list(own.values()), g[i : i + 1])
            found[i] = sum(float(grad.float().square().sum()) for grad in grads)
    return found
