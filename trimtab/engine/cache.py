"""A cache of which older tokens are packed, for models that run on torch: the method's own arithmetic behind the face
of a cache of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from trimtab.core.method import Cacher, method
from trimtab.formats.cache import CacheFormat, Stored


class PackedLayer(DynamicLayer):
    """One layer: whole windows as the method stores them, the newest tokens in 16 bits. No step crosses a window."""

    def __init__(self, cacher: Cacher, window: int) -> None:
        super().__init__()
        self.cacher, self.window = cacher, window
        self.stored: list[Stored] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens `[batch, heads, tokens, size]`; all keys and values so far, as the new ones see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (t[..., :0, :].half() for t in (key_states, value_states))
        if self.keys.shape[-2] == self.window:
            self.stored.append(self.cacher.store(self.keys, self.values))
            self.keys, self.values = self.keys[..., :0, :], self.values[..., :0, :]
        self.keys = torch.cat((self.keys, rounded(key_states)), -2)
        self.values = torch.cat((self.values, rounded(value_states)), -2)
        assert self.keys.shape[-2] <= self.window, "a step crosses the end of a window"
        parts = [*(stored.dense() for stored in self.stored), (self.keys, self.values)]
        keys, values = (torch.cat([t.to(self.dtype) for t in each], -2) for each in zip(*parts, strict=True))
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return len(self.stored) * self.window + (self.keys.shape[-2] if self.is_initialized else 0)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, their number given as a negative one; what is left of a packed window becomes floats
        again, as far as it still can.
        """
        length = self.get_seq_length() + tokens_to_remove
        whole, rest = divmod(length, self.window)
        if whole < len(self.stored):
            self.keys, self.values = (rounded(t) for t in self.stored[whole].dense())
            del self.stored[whole:]
        else:
            rest = length - len(self.stored) * self.window  # a full window that is not yet packed stays
        self.keys, self.values = self.keys[..., :rest, :], self.values[..., :rest, :]


def rounded(x: Tensor) -> Tensor:
    """In 16 bits; too large a number becomes the largest."""
    return x.clamp(-65504, 65504).half()


def packed_cache(form: CacheFormat) -> Cache:
    """An empty cache of that form."""
    cacher = method(form.method, bits=form.bits, group=form.group, residual=form.window)
    assert isinstance(cacher, Cacher)
    return cache_of(cacher, form.window)


def cache_of(cacher: Cacher, window: int) -> Cache:
    """An empty cache whose windows a method stores."""
    return Cache(layer_class_to_replicate=lambda: PackedLayer(cacher, window))  # type: ignore[arg-type]
