"""Run a model on torch: packed linears that unpack as they are used, and the check of an artifact in a new process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.formats.packed import Packed
from trimtab.parts.frozen import Frozen, product, unpacked_linear

ROUNDS, PAUSE, LONG = 5, 0.1, 5.0  # of a measurement; seconds between them; seconds after which there is no other


class PackedLinear(nn.Module):
    """A linear whose weight stays packed in memory and is unpacked for each use.

    Args:
        packed: the stored weight `[out, in]`.
        bias: added to the output, or None.
    """

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.packed, self.bias = packed, bias
        self.out_features, self.in_features = packed.shape
        shift = packed.bias()
        if shift is not None:
            self.bias = shift if bias is None else bias + shift

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in]` to `[..., out]`; for a gradient the weight is unpacked again, and not kept."""
        if x.requires_grad and torch.is_grad_enabled():
            return product(x, Frozen(self))
        return unpacked_linear(x, self.packed, self.bias)


class PackedEmbedding(nn.Module):
    """A table of tokens that stays packed in memory; the rows that are looked up are unpacked.

    Args:
        packed: the stored table `[tokens, channels]`.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed
        self.num_embeddings, self.embedding_dim = packed.shape

    def forward(self, ids: Tensor) -> Tensor:
        """Numbers of tokens `[...]` to rows `[..., channels]`, fp32."""
        return self.packed.take(ids.reshape(-1)).reshape(*ids.shape, -1)


def main_output(output: Any) -> Tensor:
    """The tensor of an output that counts: logits, else the last hidden state, else the output itself."""
    return next((getattr(output, n) for n in ("logits", "last_hidden_state") if hasattr(output, n)), output)


@torch.no_grad()
def decoded(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits `[items, length, vocabulary]` computed token by token with the cache, as text is written."""
    steps, past = [], None
    for i in range(tokens.shape[1]):
        out = model(input_ids=tokens[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits.float())
    return torch.cat(steps, 1)


def worst(a: Tensor, b: Tensor) -> float:
    """Largest difference of two outputs, as a share of the largest magnitude."""
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)) if a.shape == b.shape else float("inf")


def seconds_of(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median wall time of a call, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def quiet_seconds_of(work: Callable[[], Any]) -> float:
    """Median wall time of a call in the quietest of several rounds.

    Where other work has the cores, a call can take many times as long for a second on end, which says nothing of it.
    """
    quietest, began = float("inf"), time.perf_counter()
    for _ in range(ROUNDS):
        quietest = min(quietest, seconds_of(work))
        if time.perf_counter() - began > LONG:
            break
        time.sleep(PAUSE)
    return quietest
