"""Modules watched while a model runs: what they are given, before they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

See = Callable[[nn.Module, tuple[Tensor, ...]], None]


@contextmanager
def watched(model: nn.Module, sees: Mapping[str, See]) -> Iterator[None]:
    """Show modules, and the tensors among their arguments, in order, to functions for as long as the `with` lasts.

    Args:
        sees: by the module's path.

    >>> import torch
    >>> model, seen = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), []
    >>> with watched(model, {"1": lambda module, tensors: seen.append(tuple(tensors[0].shape))}):
    ...     _ = model(torch.ones(5, 2))
    >>> _ = model(torch.ones(4, 2)); seen
    [(5, 3)]
    """

    def hook(see: See, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        see(module, tuple(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)))

    with ExitStack() as stack:
        for path, see in sees.items():
            handle = model.get_submodule(path).register_forward_pre_hook(partial(hook, see), with_kwargs=True)
            stack.callback(handle.remove)
        yield
