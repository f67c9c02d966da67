"""How well a model reads on through a cache: the loss of each token, and a probe of what it still knows of long ago."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.core.method import Method, method
from trimtab.formats.cache import CacheFormat

if TYPE_CHECKING:
    from trimtab.engine.cache import Caching, Held

STEP = 64  # tokens that are read together, at most


def caching(
    keeper: str | Method, model: Any, found: Any, length: int, sample: Callable[[], Tensor] | None = None
) -> Caching:
    """A cache of a model: by a text as `--cache` takes it, or by a method; `fp16` keeps all of `length` tokens."""
    from trimtab.engine.cache import Caching

    if isinstance(keeper, str):
        form = CacheFormat.parse(keeper)
        worker, window = form.worker() or method("kivi"), form.window or length
    else:
        worker, window = keeper, keeper.residual  # type: ignore[attr-defined]
    return Caching(worker, window, model, found, sample)


@torch.no_grad()
def read(cache: Caching, tokens: Tensor) -> tuple[Tensor, Held]:
    """Nats of each token `[texts, tokens - 1]` but the first, and the cache afterwards."""
    held, found = cache.new(), []
    for first, last in CacheFormat(window=cache.window).cuts(0, tokens.shape[1], STEP):
        logits = cache.run(held, tokens[:, first:last]).logits.float()
        told = logits[:, : tokens.shape[1] - 1 - first].log_softmax(-1)
        targets = tokens[:, first + 1 : last + 1, None]
        found.append(-told.gather(-1, targets).squeeze(-1))
    return torch.cat(found, 1), held


def perplexity(nats: Tensor) -> float:
    """The perplexity a token."""
    return math.exp(float(nats.double().mean()))


def read_again(tokens: Tensor, passage: Tensor, at: int) -> Tensor:
    """Texts `[texts, tokens]` with a passage `[texts, span]` in them from token `at` on, and once more at their end."""
    made, span = tokens.clone(), passage.shape[1]
    made[:, at : at + span] = passage
    made[:, -span:] = passage
    return made


def recalled(nats: Tensor, span: int, known: int = 4) -> float:
    """Mean nats of a passage that ends the text, behind its first `known` tokens, which say which passage it is."""
    return float(nats[:, known - span :].double().mean())
